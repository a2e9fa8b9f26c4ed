"""The rollout store of a cluster: one Redis server (5 or newer, tested with 7; not Redis Cluster). Every write
is a script (`redis_scripts.py`), which Redis runs as a whole or not at all.

Redis keeps what it acknowledged as far as its settings go: `appendonly yes` with `appendfsync always` keeps all of
it; with `everysec` a crash may lose the last two seconds; without `appendonly` a restart loses everything, and a
failover loses what the replica hadn't got. A commit on a store that went back in time raises ConflictError,
StaleLeaseError or UnknownRolloutError. `maxmemory-policy` must be `noeviction`.
"""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, cast

import redis
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError
from redis.retry import Retry

from serve_app.rollout.redis_scripts import SCRIPTS
from serve_app.rollout.store import (
    RANKS,
    Command,
    Event,
    EventCounts,
    EventsAdded,
    Lease,
    Limits,
    Report,
    Rollout,
    RouteBusyError,
    Search,
    StoreUnavailable,
    Transition,
    UnknownRolloutError,
    check_name,
    dump,
    entry_of,
    event_counts,
    key,
    moved_on,
    not_waiting,
    stale,
    taken,
    too_many_waiting,
    transition_of,
)

logger = logging.getLogger(__name__)

WAIT_S = 1.0  # for a connection, and for each answer
PREFIX = "serve-app:"
CHUNK = 500  # entries a script takes at once, because nobody else is served meanwhile
DAY_S = 86_400


class RedisStore:
    def __init__(
        self,
        host: str,
        port: int,
        db: int,
        limits: Limits,
        username: str | None = None,
        password: str | None = None,
    ) -> None:
        place = f"[{host}]" if ":" in host else host
        self.url = f"redis://{'***@' if password else ''}{place}:{port}/{db}"
        self.limits = limits
        self._durability_checked = False
        # RESP 2, because servers before 6 speak nothing else.
        # No retries: a write must not be sent again by anybody who doesn't know what it means.
        self._redis = redis.Redis(
            host,
            port,
            db,
            username=username,
            password=password,
            protocol=2,
            decode_responses=True,
            socket_timeout=WAIT_S,
            socket_connect_timeout=WAIT_S,
            retry=Retry(NoBackoff(), 0),
        )
        self._scripts = {name: self._redis.register_script(script) for name, script in SCRIPTS.items()}

    def __repr__(self) -> str:
        return f"RedisStore({self.url!r})"

    def acquire(self, holder: str, ttl_s: float) -> Lease | None:
        token = self._run("acquire", ["lease", "lease-token"], [holder, _ms(ttl_s)])
        return token and Lease(holder, token, ttl_s)

    def renew(self, lease: Lease) -> None:
        if not self._run("renew", ["lease"], [_lease(lease), _ms(lease.ttl_s)]):
            raise stale(lease)

    def release(self, lease: Lease) -> None:
        self._run("release", ["lease"], [_lease(lease)])

    def create(self, rollout: Rollout, transition: Transition) -> Rollout:
        check_name("the rollout's id", rollout.id)
        values = [rollout.id, rollout.route, dump(rollout.spec), dump(rollout.state), int(rollout.finished)]
        keys = [*_keys(rollout.id, "rollout", "history"), "active", "rollouts", "rollouts-of:" + rollout.route]
        outcome, found = self._run("create", [*keys, "rollout-seq"], [*values, entry_of(transition)])
        if outcome == "taken":
            raise taken("rollout", rollout.id)
        if outcome == "busy":
            raise RouteBusyError(rollout.route, found)
        return _rollout(found)

    def commit(
        self, rollout: Rollout, transition: Transition | None, lease: Lease, consumed_command_id: str | None = None
    ) -> Rollout:
        keys = ["lease", *_keys(rollout.id, "rollout", "history", "commands", "outcomes"), "waiting", "active"]
        entry = entry_of(transition) if transition else ""
        values = [_lease(lease), rollout.id, rollout.version, dump(rollout.state), int(rollout.finished), entry]
        outcome, found = self._run("commit", keys, [*values, consumed_command_id or ""])
        match outcome:
            case "stale":
                raise stale(lease)
            case "unknown":
                raise UnknownRolloutError(rollout.id)
            case "moved":
                raise moved_on(rollout, int(found))
            case "settled":
                raise not_waiting(str(consumed_command_id))
            case "busy":
                raise RouteBusyError(rollout.route, found)
        return _rollout(found)

    def get(self, rollout_id: str) -> Rollout:
        if found := self._rollouts([rollout_id]):
            return found[0]
        raise UnknownRolloutError(rollout_id)

    def active(self) -> list[Rollout]:
        ids = self._call(lambda server: server.hvals(PREFIX + "active"))
        active = [rollout for rollout in self._rollouts(ids) if not rollout.finished]
        return sorted(active, key=lambda rollout: (rollout.created_at, rollout.id))

    def recent(self, limit: int = 100, route: str | None = None) -> list[Rollout]:
        name = PREFIX + ("rollouts" if route is None else "rollouts-of:" + route)
        return self._rollouts(self._call(lambda server: server.zrevrange(name, 0, limit - 1)) if limit > 0 else [])

    def history(self, rollout_id: str) -> list[Transition]:
        rows = self._call(lambda server: server.lrange(f"{PREFIX}history:{rollout_id}", 0, -1))
        entries = [row.split(" ", 2) for row in rows]
        return [transition_of(entry, int(version), float(at)) for version, at, entry in entries]

    def add_command(self, command: Command) -> Command:
        check_name("the command's id", command.id)
        keys = [*_keys(command.rollout_id, "rollout", "commands"), "waiting", "command-seq"]
        values = [
            command.rollout_id,
            command.id,
            dump([command.action, command.body]),
            self.limits.waiting_commands,
        ]
        match self._run("add_command", keys, values):
            case "unknown":
                raise UnknownRolloutError(command.rollout_id)
            case "taken":
                raise taken("command", command.id)
            case "full":
                raise too_many_waiting(self.limits.waiting_commands)
        return next(there for there in self.commands(command.rollout_id) if there.id == command.id)

    def refuse_command(self, command: Command, reason: str, lease: Lease) -> None:
        keys = ["lease", *_keys(command.rollout_id, "commands", "outcomes"), "waiting"]
        match self._run("refuse", keys, [_lease(lease), command.rollout_id, command.id, "refused " + reason]):
            case "stale":
                raise stale(lease)
            case "settled":
                raise not_waiting(command.id)

    def commands(self, rollout_id: str) -> list[Command]:
        rows, outcomes = self._batch(*(("HGETALL", name) for name in _keys(rollout_id, "commands", "outcomes")))
        found = [_command(rollout_id, name, row, outcomes.get(name)) for name, row in rows.items()]
        return [command for _, command in sorted(found, key=lambda pair: pair[0])]

    def waiting_commands(self) -> list[Command]:
        ids = [member.split(" ") for member in self._call(lambda server: server.zrange(PREFIX + "waiting", 0, -1))]
        rows = self._batch(*(("HGET", f"{PREFIX}commands:{rollout_id}", name) for rollout_id, name in ids))
        return [_command(rollout_id, name, row)[1] for (rollout_id, name), row in zip(ids, rows, strict=True)]

    def add_figures(self, reports: Iterable[Report]) -> int:
        by_rollout: dict[str, list[Any]] = {}
        for report in reports:
            name = dump([report.role, report.bucket, report.source, report.seq])
            by_rollout.setdefault(report.rollout_id, []).append((name, report.bucket, dump(report.value)))
        added = 0
        for rollout_id, rows in by_rollout.items():
            keys = _keys(rollout_id, "rollout", "buckets", "figures")
            for chunk in _chunks(rows):
                added += self._run("add_figures", keys, [self.limits.figures_ttl_s, self.limits.figures, *chunk])
        return added

    def figures(self, rollout_id: str, since_bucket: int = 0, until_bucket: int | None = None) -> list[Report]:
        buckets, values = _keys(rollout_id, "buckets", "figures")
        before = "+inf" if until_bucket is None else f"({until_bucket}"
        names = self._call(lambda server: server.zrangebyscore(buckets, since_bucket, before))
        reports = []
        for i in range(0, len(names), CHUNK):
            (found,) = self._batch(("HMGET", values, *names[i : i + CHUNK]))
            for name, value in zip(names[i:], found, strict=False):
                # Pruned since, where there is none.
                if value is not None:
                    role, bucket, *sent = json.loads(name)
                    reports.append(Report(rollout_id, role, bucket, json.loads(value), *sent))
        return sorted(reports, key=lambda report: (report.bucket, report.source, report.seq, report.role))

    def add_searches(self, searches: Iterable[Search]) -> None:
        keys = ["searches", "searches-at"]
        rows = [(key(search.query_id), search.at, dump([search.rollout_id, search.role])) for search in searches]
        for chunk in _chunks(rows):
            self._run("add_searches", keys, [self.limits.search_ttl_s, self.limits.searches, *chunk])

    def add_events(self, events: Iterable[Event]) -> EventsAdded:
        keys = ["searches", "searches-at", "event-ids", "counts:"]
        limits = [self.limits.search_ttl_s, self.limits.event_ids, self.limits.counts_ttl_s]
        rows = [(key(e.id), key(e.query_id), e.kind, e.position or 0) for e in events]
        outcomes = [self._run("add_events", keys, [*limits, RANKS, *chunk]) for chunk in _chunks(rows)]
        return EventsAdded(*(sum(numbers) for numbers in zip(*outcomes, strict=True)) if outcomes else (0, 0, 0))

    def event_counts(self, rollout_id: str, since_minute: int = 0) -> list[EventCounts]:
        now = time.time()
        # A day more on both sides, because the clock here isn't the server's.
        first = max(since_minute * 60, now - self.limits.counts_ttl_s) // DAY_S - 1
        days = range(int(first), int(now // DAY_S) + 2)
        tables = self._batch(*(("HGETALL", f"{PREFIX}counts:{rollout_id}:{day}") for day in days))
        cells = []
        for table in tables:
            for name, n in table.items():
                minute, figure, role = name.split(" ", 2)
                if int(minute) >= since_minute:
                    cells.append((int(minute), role, figure, int(n)))
        return event_counts(cells)

    def close(self) -> None:
        self._redis.close()

    def _rollouts(self, ids: Sequence[str]) -> list[Rollout]:
        rows = self._batch(*(("HGETALL", f"{PREFIX}rollout:{rollout_id}") for rollout_id in ids))
        return [_rollout(row) for row in rows if row]

    def _run(self, script: str, keys: Sequence[str], values: Sequence[Any]) -> Any:
        return self._call(
            lambda _: self._scripts[script]([PREFIX + name.removeprefix(PREFIX) for name in keys], values)
        )

    def _batch(self, *commands: tuple[str, ...]) -> list[Any]:
        def execute(server: redis.Redis) -> Any:
            # As a transaction it would be refused where memory is short, although it only reads.
            with server.pipeline(transaction=False) as pipeline:
                for command in commands:
                    pipeline.execute_command(*command)  # type: ignore[no-untyped-call]
                return pipeline.execute()

        return cast(list[Any], self._call(execute)) if commands else []

    def _call(self, do: Callable[[redis.Redis], Any]) -> Any:
        try:
            if not self._durability_checked:
                self._check_durability()
            return do(self._redis)
        except (redis.RedisError, OSError) as error:
            failed, todo = _explained(error)
            raise StoreUnavailable(self.url, f"{failed} ({error})", todo) from error

    def _check_durability(self) -> None:
        info: Any = {}
        # Not everybody may ask.
        with contextlib.suppress(redis.ResponseError):
            info = self._redis.info("persistence")
        self._durability_checked = True
        if info.get("aof_enabled") == 0:
            logger.warning("%s has no append-only file, so a restart loses rollouts; set appendonly yes", self.url)


def _explained(error: Exception) -> tuple[str, str]:
    text = str(error)
    match error:
        case redis.TimeoutError():
            return (
                f"did not answer within {WAIT_S:g} s",
                "try again; if it stays, look for what keeps the server busy",
            )
        case redis.BusyLoadingError():
            return "is still reading its data", "try again"
        case redis.AuthenticationError() | NoPermissionError():
            return "refused the user or the password", "check redis://:password@host"
        case redis.ReadOnlyError():
            return "is a replica", "name the primary server"
        case redis.OutOfMemoryError():
            return "is out of memory", "raise its maxmemory"
        case redis.ResponseError() if text.startswith("MISCONF"):
            return "cannot write its own files", "free space on the server's disk"
        case redis.ResponseError():
            return (
                "refused the request",
                "see whether this is a Redis server of version 5 or newer, for this project only",
            )
    return (
        "cannot be reached",
        "see whether the server runs and the address is right; it is tried again at each use",
    )


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _lease(lease: Lease) -> str:
    return f"{lease.token} {lease.holder}"


def _keys(rollout_id: str, *kinds: str) -> list[str]:
    return [f"{PREFIX}{kind}:{rollout_id}" for kind in kinds]


def _chunks(rows: Sequence[tuple[Any, ...]]) -> Iterator[list[Any]]:
    for i in range(0, len(rows), CHUNK):
        yield [value for row in rows[i : i + CHUNK] for value in row]


def _rollout(row: Any) -> Rollout:
    if isinstance(row, list):
        row = dict(zip(row[::2], row[1::2], strict=True))
    times = float(row["created_at"]), float(row["updated_at"])
    spec, state = json.loads(row["spec"]), json.loads(row["state"])
    return Rollout(row["id"], row["route"], spec, state, row["finished"] == "1", int(row["version"]), *times)


def _command(rollout_id: str, name: str, row: str, outcome: str | None = None) -> tuple[int, Command]:
    seq, at, document = row.split(" ", 2)
    status, _, reason = (outcome or "waiting").partition(" ")
    settled = cast(Literal["waiting", "applied", "refused"], status)
    action, body = json.loads(document)
    return int(seq), Command(rollout_id, name, action, body, float(at), settled, reason)
