"""What a rollout needs to outlive its controller: its state and history, operators' commands, the lease that says
which controller acts, and the figures and clicks that guards judge.

`SqliteStore` is for one machine, `RedisStore` for a cluster. Both keep these promises:

- A write that returned is kept (Redis: as far as its append-only file goes, see there). A write that raised
  `StoreUnavailable` may have happened or not. Repeat it where the method says so; after `commit`, read first.
- Each method is one atomic step, except those that take lists: they may be repeated as a whole instead.
- Methods may be called from any thread. Each wait, for another process or for the server, is at most a second; for
  other threads (SQLite) at most four.
- Times are the store's own, in seconds since the epoch.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol
from urllib.parse import unquote, urlsplit

from serve_app.access import redis_password

Document = dict[str, Any]
RANKS = 10
NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")


class StoreError(Exception):
    pass


class StoreUnavailable(StoreError):
    """The store could not be reached, read or written. The message says why, and what helps."""

    # Errors keep what they were made of, so that they can be pickled.
    def __init__(self, url: str, failed: str, todo: str) -> None:
        super().__init__(url, failed, todo)

    def __str__(self) -> str:
        return "the rollout store {} {}; {}".format(*self.args)


class StaleLeaseError(StoreError):
    """The lease has run out, or another controller has a newer one: stop acting and `acquire` again."""


class ConflictError(StoreError):
    """What was to be changed isn't what was read any more: read again."""


class RouteBusyError(StoreError):
    """The route has an unfinished rollout, `rollout_id`."""

    def __init__(self, route: str, rollout_id: str) -> None:
        super().__init__(route, rollout_id)
        self.rollout_id = rollout_id

    def __str__(self) -> str:
        return "route {!r} has the unfinished rollout {!r}; promote or abort that first".format(*self.args)


class UnknownRolloutError(StoreError):
    def __init__(self, rollout_id: str) -> None:
        super().__init__(rollout_id)

    def __str__(self) -> str:
        return "there is no rollout {!r}".format(*self.args)


@dataclass(frozen=True, slots=True)
class Limits:
    """How long and how many, oldest dropped first. Rollouts, their history and commands are kept for good.

    An event's id is remembered as long as its search can be, so only `event_ids` can make a click count twice."""

    search_ttl_s: float = 86_400
    searches: int = 200_000
    event_ids: int = 200_000
    figures_ttl_s: float = 86_400
    figures: int = 100_000  # of one rollout
    counts_ttl_s: float = 30 * 86_400
    waiting_commands: int = 100


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to act. `token` grows with every grant. `holder` must be unique to a controller's life (host,
    pid and something random): a Redis that lost its last writes grants a token twice, and only the name tells."""

    holder: str
    token: int
    ttl_s: float


@dataclass(frozen=True, slots=True)
class Rollout:
    """`id` matches `NAME`. The store sets `version` (1 when created, one more with each commit) and the times."""

    id: str
    route: str
    spec: Document
    state: Document
    finished: bool = False
    version: int = 0
    created_at: float = 0.0
    updated_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Transition:
    """One entry of a rollout's history. `version` is the rollout's after it; the store sets it and the time."""

    from_status: str
    to_status: str
    reason: str
    figures: Document = field(default_factory=dict)
    version: int = 0
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class Command:
    """What an operator wants. The caller chooses `id` (it matches `NAME`, unique within the rollout), so that a
    request sent twice is one command. The store sets the rest."""

    rollout_id: str
    id: str
    action: str
    body: Document = field(default_factory=dict)
    at: float = 0.0
    status: Literal["waiting", "applied", "refused"] = "waiting"
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """What a gateway counted since its last one: report `seq` of `source` (unique to a gateway's life), for calls
    in the `bucket` that began at that second since the epoch. Reports add up; who reads them merges them."""

    rollout_id: str
    role: str
    bucket: int
    value: Document
    source: str
    seq: int


@dataclass(frozen=True, slots=True)
class Search:
    """A call that a pipeline of a rollout answered `at` that second since the epoch."""

    query_id: str
    rollout_id: str
    role: str
    at: float


@dataclass(frozen=True, slots=True)
class Event:
    """`position` counts from 1; a click without one counts, but not for ranks."""

    id: str
    query_id: str
    kind: Literal["impression", "click"]
    position: int | None = None


@dataclass(frozen=True, slots=True)
class EventsAdded:
    """`unknown`: events of searches that no rollout answered, or too long ago. They leave no trace, so that one
    that came before its search counts when it is sent again."""

    counted: int
    repeated: int
    unknown: int


@dataclass(frozen=True, slots=True)
class EventCounts:
    """Of the searches in one minute (seconds since the epoch // 60), whenever their events came. All but `clicks`
    count a search once, and a click implies the impression, so clicked <= impressions."""

    role: str
    minute: int
    impressions: int = 0
    clicks: int = 0
    clicked: int = 0
    # 11 numbers: searches by the position, 1 to 10, of their topmost click; under 0 those with none of these.
    by_rank: tuple[int, ...] = (0,) * 11


class Store(Protocol):
    url: str  # without the password

    # The lease.

    def acquire(self, holder: str, ttl_s: float) -> Lease | None:
        """None while another holder's lease runs. The holder itself gets a new one, which ends its old one."""

    def renew(self, lease: Lease) -> None:
        """For another `ttl_s` from now. Raises StaleLeaseError, also when the lease ran out and nobody took it."""

    def release(self, lease: Lease) -> None:
        """Nothing happens where the lease is stale already."""

    # Rollouts.

    def create(self, rollout: Rollout, transition: Transition) -> Rollout:
        """Stores a rollout and the start of its history; anybody may. May be repeated: the same id, route and spec
        give what is stored. Raises RouteBusyError, or ConflictError where the id is another rollout's."""

    def commit(
        self, rollout: Rollout, transition: Transition | None, lease: Lease, consumed_command_id: str | None = None
    ) -> Rollout:
        """Writes `state` and `finished`, appends the transition (None: the state changed within a status) and
        marks the command as applied: all of it or nothing. Raises StaleLeaseError; ConflictError when
        `rollout.version` is not the stored one or the command isn't waiting; UnknownRolloutError; RouteBusyError
        when a finished rollout is reopened while its route has another."""

    def get(self, rollout_id: str) -> Rollout:
        """Raises UnknownRolloutError."""

    def active(self) -> list[Rollout]:
        """The unfinished ones, at most one a route, oldest first."""

    def recent(self, limit: int = 100, route: str | None = None) -> list[Rollout]:
        """The newest first."""

    def history(self, rollout_id: str) -> list[Transition]:
        """The oldest first; empty where there is no such rollout."""

    # Commands: anybody adds them, only the holder of the lease settles them.

    def add_command(self, command: Command) -> Command:
        """Queues it until it is consumed by `commit` or refused. May be repeated: the same id, action and body
        give what is stored. Raises UnknownRolloutError, or ConflictError where the id is another command's or
        `Limits.waiting_commands` wait already."""

    def refuse_command(self, command: Command, reason: str, lease: Lease) -> None:
        """Raises StaleLeaseError, or ConflictError when the command isn't waiting."""

    def commands(self, rollout_id: str) -> list[Command]:
        """All of a rollout, the oldest first."""

    def waiting_commands(self) -> list[Command]:
        """Of all rollouts, finished ones too, the oldest first."""

    # What guards judge.

    def add_figures(self, reports: Iterable[Report]) -> int:
        """How many were new. May be repeated: what has the same rollout, source, seq, role and bucket is stored
        once. Reports of unknown rollouts and of buckets older than `Limits.figures_ttl_s` are ignored."""

    def figures(self, rollout_id: str, since_bucket: int = 0, until_bucket: int | None = None) -> list[Report]:
        """By bucket, from `since_bucket` on, and before `until_bucket`."""

    def add_searches(self, searches: Iterable[Search]) -> None:
        """May be repeated: the first of a query id stays. Expect their events from the moment this returns."""

    def add_events(self, events: Iterable[Event]) -> EventsAdded:
        """In the order given. May be repeated: an event counts once by its id."""

    def event_counts(self, rollout_id: str, since_minute: int = 0) -> list[EventCounts]:
        """By minute and role, from `since_minute` on; minutes and roles without events are left out."""

    def close(self) -> None: ...


def open_store(url: str, limits: Limits | None = None, setting: str = "store") -> Store:
    """The store at `sqlite:///absolute/path`, `sqlite://relative/path` or `redis://[:password@]host[:port][/db]`
    (special characters of the password as %XX, or SERVE_APP_REDIS_PASSWORD in the environment; fleets that share a
    server take a db each). Reaches for it at first use, not here. Raises ValueError."""
    from serve_app.rollout.redis_store import RedisStore
    from serve_app.rollout.sqlite_store import SqliteStore

    def refused(why: str) -> ValueError:
        return ValueError(
            f"{setting} is {without_password(url)!r}: {why}; "
            "allowed: sqlite:///path/to/file or redis://[:password@]host[:port][/db]"
        )

    limits = limits or Limits()
    scheme, _, rest = url.partition("://")
    if scheme == "sqlite":
        if not rest or rest.endswith("/") or rest.startswith(":memory:"):
            raise refused("it names no file")
        return SqliteStore(rest, limits)
    if scheme != "redis":
        raise refused("it is neither a SQLite file nor a Redis server")
    try:
        parts = urlsplit(url)
        host, port, db = parts.hostname, parts.port or 6379, int(parts.path.strip("/") or 0)
    except ValueError:
        # The error itself would show parts of the password.
        raise refused("port and db are numbers") from None
    if not host or parts.query or parts.fragment or db < 0:
        raise refused("it needs a host, and takes nothing after the number of the database")
    username, password = (unquote(part) if part else None for part in (parts.username, parts.password))
    return RedisStore(host, port, db, limits, username=username, password=password or redis_password())


def without_password(url: str) -> str:
    """Also of urls so wrong that a parser would take the password for something else."""
    scheme, separator, rest = url.rpartition("://") if "://" in url else ("", "", url)
    scheme = scheme.partition("://")[0]
    if scheme == "sqlite":
        return url
    _, at, place = rest.rpartition("@")
    place, slash, db = re.split(r"[?#]", place)[0].partition("/")
    host, colon, port = place.rpartition(":")
    if colon and not port.isdigit() and not port.endswith("]"):
        place = f"{host}:***"
    return f"{scheme}{separator}{'***@' if at else ''}{place}{slash}{db}"


# For the stores.


def dump(document: Any) -> str:
    """Raises ValueError and TypeError for what isn't JSON."""
    return json.dumps(document, allow_nan=False, separators=(",", ":"))


def entry_of(transition: Transition) -> str:
    return dump([transition.from_status, transition.to_status, transition.reason, transition.figures])


def transition_of(entry: str, version: int, at: float) -> Transition:
    from_status, to_status, reason, figures = json.loads(entry)
    return Transition(from_status, to_status, reason, figures, version, at)


def key(outside: str) -> str:
    """An id that a client chose, as one of 32 characters."""
    return hashlib.blake2b(outside.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def event_counts(cells: Iterable[tuple[int, str, str, int]]) -> list[EventCounts]:
    """From (minute, role, figure, number); figures are impressions, clicks, clicked and the ranks 1 to 10."""
    rows: dict[tuple[int, str], dict[str, int]] = {}
    for minute, role, figure, n in cells:
        rows.setdefault((minute, role), {})[figure] = n
    counts = []
    for (minute, role), row in sorted(rows.items()):
        ranks = [row.get(str(rank), 0) for rank in range(1, RANKS + 1)]
        shown, clicks, clicked = (row.get(figure, 0) for figure in ("impressions", "clicks", "clicked"))
        counts.append(EventCounts(role, minute, shown, clicks, clicked, (shown - sum(ranks), *ranks)))
    return counts


def check_name(what: str, name: str) -> None:
    if not NAME.fullmatch(name):
        raise ValueError(f"{what} is {name!r}; allowed: 1 to 100 letters, digits, dots, dashes and underscores")


def stale(lease: Lease) -> StaleLeaseError:
    return StaleLeaseError(f"lease {lease.token} of {lease.holder!r} has run out or was taken over")


def moved_on(rollout: Rollout, version: int) -> ConflictError:
    return ConflictError(f"rollout {rollout.id!r} is at version {version}, but was read at {rollout.version}")


def taken(what: str, name: str) -> ConflictError:
    return ConflictError(f"{what} {name!r} is there already, and differs")


def not_waiting(command_id: str) -> ConflictError:
    return ConflictError(f"command {command_id!r} is not waiting: it is settled already or was never added")


def too_many_waiting(limit: int) -> ConflictError:
    return ConflictError(f"{limit} commands are waiting already; is a controller running?")
