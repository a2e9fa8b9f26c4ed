"""The rollout store of one machine, in a SQLite file."""

import json
import sqlite3
import time
from collections.abc import Iterable
from typing import Any

from serve_app.rollout.sqlite_file import SqliteFile
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

# A change of it is a new number in `__init__`.
SCHEMA = """
CREATE TABLE lease (token INTEGER, holder TEXT, renewed_at REAL, ttl_s REAL);
INSERT INTO lease VALUES (0, '', 0, 0);
CREATE TABLE rollouts (seq INTEGER PRIMARY KEY, id TEXT UNIQUE, route TEXT, spec TEXT, state TEXT,
  finished INTEGER, version INTEGER, created_at REAL, updated_at REAL);
CREATE UNIQUE INDEX active ON rollouts (route) WHERE NOT finished;
CREATE TABLE history (rollout_id TEXT, version INTEGER, at REAL, entry TEXT, PRIMARY KEY (rollout_id, version));
CREATE TABLE commands (seq INTEGER PRIMARY KEY, rollout_id TEXT, id TEXT, action TEXT, body TEXT, at REAL,
  status TEXT, reason TEXT, UNIQUE (rollout_id, id));
CREATE INDEX waiting ON commands (seq) WHERE status = 'waiting';
CREATE TABLE figures (rollout_id TEXT, role TEXT, bucket INTEGER, value TEXT, source TEXT, seq INTEGER,
  PRIMARY KEY (rollout_id, source, seq, role, bucket));
CREATE INDEX buckets ON figures (bucket);
CREATE INDEX figures_of ON figures (rollout_id, bucket);
CREATE TABLE searches (seq INTEGER PRIMARY KEY, query_id TEXT UNIQUE, rollout_id TEXT, role TEXT, at REAL,
  shown INTEGER DEFAULT 0, clicked INTEGER DEFAULT 0, top INTEGER DEFAULT 0);
CREATE INDEX searches_at ON searches (at);
CREATE TABLE event_ids (seq INTEGER PRIMARY KEY, id TEXT UNIQUE, at REAL);
CREATE INDEX event_ids_at ON event_ids (at);
CREATE TABLE counts (rollout_id TEXT, minute INTEGER, role TEXT, figure TEXT, n INTEGER,
  PRIMARY KEY (rollout_id, minute, role, figure)) WITHOUT ROWID;
CREATE INDEX minutes ON counts (minute);
"""
ROLLOUT = "id, route, spec, state, finished, version, created_at, updated_at"
COMMAND = "rollout_id, id, action, body, at, status, reason"


class SqliteStore:
    def __init__(self, path: str, limits: Limits) -> None:
        self.url = f"sqlite://{path}"
        self.limits = limits
        self._file = SqliteFile(path, self.url, SCHEMA, version=1)

    def __repr__(self) -> str:
        return f"SqliteStore({self.url!r})"

    def acquire(self, holder: str, ttl_s: float) -> Lease | None:
        with self._file.write() as db:
            token, owner, renewed_at, ttl = db.execute(
                "SELECT token, holder, renewed_at, ttl_s FROM lease"
            ).fetchone()
            now = time.time()
            if _live(now, renewed_at, ttl) and owner != holder:
                return None
            db.execute(
                "UPDATE lease SET token = ?, holder = ?, renewed_at = ?, ttl_s = ?",
                (token + 1, holder, now, ttl_s),
            )
            return Lease(holder, token + 1, ttl_s)

    def renew(self, lease: Lease) -> None:
        with self._file.write() as db:
            db.execute("UPDATE lease SET renewed_at = ?, ttl_s = ?", (_fence(db, lease), lease.ttl_s))

    def release(self, lease: Lease) -> None:
        with self._file.write() as db:
            db.execute("UPDATE lease SET ttl_s = 0 WHERE token = ? AND holder = ?", (lease.token, lease.holder))

    def create(self, rollout: Rollout, transition: Transition) -> Rollout:
        check_name("the rollout's id", rollout.id)
        spec, state, entry = dump(rollout.spec), dump(rollout.state), entry_of(transition)
        with self._file.write() as db:
            if there := _find(db, rollout.id):
                if (there.route, dump(there.spec)) != (rollout.route, spec):
                    raise taken("rollout", rollout.id)
                return there
            if not rollout.finished:
                _check_route(db, rollout)
            now = time.time()
            db.execute(
                f"INSERT INTO rollouts ({ROLLOUT}) VALUES (?, ?, ?, ?, ?, 1, ?, ?)",
                (rollout.id, rollout.route, spec, state, rollout.finished, now, now),
            )
            db.execute("INSERT INTO history VALUES (?, 1, ?, ?)", (rollout.id, now, entry))
            return _known(db, rollout.id)

    def commit(
        self, rollout: Rollout, transition: Transition | None, lease: Lease, consumed_command_id: str | None = None
    ) -> Rollout:
        state, entry = dump(rollout.state), transition and entry_of(transition)
        with self._file.write() as db:
            now = _fence(db, lease)
            there = _known(db, rollout.id)
            if there.version != rollout.version:
                raise moved_on(rollout, there.version)
            if consumed_command_id is not None:
                _settle(db, rollout.id, consumed_command_id, "applied", "")
            if not rollout.finished:
                _check_route(db, there)
            version = there.version + 1
            db.execute(
                "UPDATE rollouts SET state = ?, finished = ?, version = ?, updated_at = ? WHERE id = ?",
                (state, rollout.finished, version, now, rollout.id),
            )
            if entry:
                db.execute("INSERT INTO history VALUES (?, ?, ?, ?)", (rollout.id, version, now, entry))
            return _known(db, rollout.id)

    def get(self, rollout_id: str) -> Rollout:
        with self._file.read() as db:
            return _known(db, rollout_id)

    def active(self) -> list[Rollout]:
        return self._rollouts("WHERE NOT finished ORDER BY seq")

    def recent(self, limit: int = 100, route: str | None = None) -> list[Rollout]:
        if route is None:
            return self._rollouts("ORDER BY seq DESC LIMIT ?", limit)
        return self._rollouts("WHERE route = ? ORDER BY seq DESC LIMIT ?", route, limit)

    def history(self, rollout_id: str) -> list[Transition]:
        with self._file.read() as db:
            rows = db.execute(
                "SELECT entry, version, at FROM history WHERE rollout_id = ? ORDER BY version", (rollout_id,)
            )
            return [transition_of(entry, version, at) for entry, version, at in rows]

    def add_command(self, command: Command) -> Command:
        check_name("the command's id", command.id)
        body = dump(command.body)
        with self._file.write() as db:
            _known(db, command.rollout_id)
            there = _commands(db, "WHERE rollout_id = ? AND id = ?", command.rollout_id, command.id)
            if not there:
                waiting = db.execute("SELECT count(*) FROM commands WHERE status = 'waiting'").fetchone()[0]
                if waiting >= self.limits.waiting_commands:
                    raise too_many_waiting(self.limits.waiting_commands)
                db.execute(
                    f"INSERT INTO commands ({COMMAND}) VALUES (?, ?, ?, ?, ?, 'waiting', '')",
                    (command.rollout_id, command.id, command.action, body, time.time()),
                )
                there = _commands(db, "WHERE rollout_id = ? AND id = ?", command.rollout_id, command.id)
            elif (there[0].action, dump(there[0].body)) != (command.action, body):
                raise taken("command", command.id)
            return there[0]

    def refuse_command(self, command: Command, reason: str, lease: Lease) -> None:
        with self._file.write() as db:
            _fence(db, lease)
            _settle(db, command.rollout_id, command.id, "refused", reason)

    def commands(self, rollout_id: str) -> list[Command]:
        with self._file.read() as db:
            return _commands(db, "WHERE rollout_id = ? ORDER BY seq", rollout_id)

    def waiting_commands(self) -> list[Command]:
        with self._file.read() as db:
            return _commands(db, "WHERE status = 'waiting' ORDER BY seq")

    def add_figures(self, reports: Iterable[Report]) -> int:
        rows = [(r.rollout_id, r.role, r.bucket, dump(r.value), r.source, r.seq, r.rollout_id) for r in reports]
        with self._file.write() as db:
            before = db.total_changes
            oldest = time.time() - self.limits.figures_ttl_s
            db.executemany(
                "INSERT OR IGNORE INTO figures SELECT ?, ?, ?, ?, ?, ?"
                " WHERE EXISTS (SELECT 1 FROM rollouts WHERE id = ?)",
                [row for row in rows if row[2] >= oldest],
            )
            added = db.total_changes - before
            db.execute("DELETE FROM figures WHERE bucket < ?", (oldest,))
            for rollout_id in {row[0] for row in rows}:
                db.execute(
                    "DELETE FROM figures WHERE rowid IN (SELECT rowid FROM figures WHERE rollout_id = ?"
                    " ORDER BY bucket DESC, rowid DESC LIMIT -1 OFFSET ?)",
                    (rollout_id, self.limits.figures),
                )
            return added

    def figures(self, rollout_id: str, since_bucket: int = 0, until_bucket: int | None = None) -> list[Report]:
        with self._file.read() as db:
            rows = db.execute(
                "SELECT role, bucket, value, source, seq FROM figures WHERE rollout_id = ?1 AND bucket >= ?2"
                " AND (?3 IS NULL OR bucket < ?3) ORDER BY bucket, source, seq, role",
                (rollout_id, since_bucket, until_bucket),
            ).fetchall()
        return [Report(rollout_id, role, bucket, json.loads(value), *rest) for role, bucket, value, *rest in rows]

    def add_searches(self, searches: Iterable[Search]) -> None:
        now = time.time()
        rows = [(key(search.query_id), search.rollout_id, search.role, min(search.at, now)) for search in searches]
        with self._file.write() as db:
            db.executemany(
                "INSERT OR IGNORE INTO searches (query_id, rollout_id, role, at) VALUES (?, ?, ?, ?)", rows
            )
            self._prune(db, "searches", self.limits.searches)

    def add_events(self, events: Iterable[Event]) -> EventsAdded:
        outcomes = {"counted": 0, "repeated": 0, "unknown": 0}
        events = list(events)
        with self._file.write() as db:
            self._prune(db, "searches", self.limits.searches)
            for event in events:
                outcomes[_count(db, event)] += 1
            self._prune(db, "event_ids", self.limits.event_ids)
            db.execute("DELETE FROM counts WHERE minute < ?", ((time.time() - self.limits.counts_ttl_s) // 60,))
        return EventsAdded(**outcomes)

    def event_counts(self, rollout_id: str, since_minute: int = 0) -> list[EventCounts]:
        with self._file.read() as db:
            return event_counts(
                db.execute(
                    "SELECT minute, role, figure, n FROM counts WHERE rollout_id = ? AND minute >= ?",
                    (rollout_id, since_minute),
                )
            )

    def close(self) -> None:
        self._file.close()

    def _rollouts(self, which: str, *values: object) -> list[Rollout]:
        with self._file.read() as db:
            return [_rollout(row) for row in db.execute(f"SELECT {ROLLOUT} FROM rollouts {which}", values)]

    def _prune(self, db: sqlite3.Connection, table: str, most: int) -> None:
        db.execute(f"DELETE FROM {table} WHERE at < ?", (time.time() - self.limits.search_ttl_s,))
        db.execute(f"DELETE FROM {table} WHERE seq <= (SELECT max(seq) FROM {table}) - ?", (most,))


def _live(now: float, renewed_at: float, ttl_s: float) -> bool:
    # A clock that was set back ends a lease too: its end could be hours away.
    return 0 <= now - renewed_at < ttl_s


def _fence(db: sqlite3.Connection, lease: Lease) -> float:
    """The time, when the lease is good."""
    token, holder, renewed_at, ttl_s = db.execute("SELECT token, holder, renewed_at, ttl_s FROM lease").fetchone()
    now = time.time()
    if (token, holder) != (lease.token, lease.holder) or not _live(now, renewed_at, ttl_s):
        raise stale(lease)
    return now


def _check_route(db: sqlite3.Connection, rollout: Rollout) -> None:
    row = db.execute(
        "SELECT id FROM rollouts WHERE route = ? AND NOT finished AND id != ?", (rollout.route, rollout.id)
    ).fetchone()
    if row:
        raise RouteBusyError(rollout.route, row[0])


def _settle(db: sqlite3.Connection, rollout_id: str, command_id: str, status: str, reason: str) -> None:
    settled = db.execute(
        "UPDATE commands SET status = ?, reason = ? WHERE rollout_id = ? AND id = ? AND status = 'waiting'",
        (status, reason, rollout_id, command_id),
    )
    if not settled.rowcount:
        raise not_waiting(command_id)


def _count(db: sqlite3.Connection, event: Event) -> str:
    query_id = key(event.query_id)
    search = db.execute(
        "SELECT rollout_id, CAST(at / 60 AS INTEGER), role, shown, clicked, top FROM searches WHERE query_id = ?",
        (query_id,),
    ).fetchone()
    if not search:
        return "unknown"
    ids = db.execute("INSERT OR IGNORE INTO event_ids (id, at) VALUES (?, ?)", (key(event.id), time.time()))
    if not ids.rowcount:
        return "repeated"
    *cell, shown, clicked, top = search
    changes = {} if shown else {"impressions": 1}
    if event.kind == "click":
        changes |= {"clicks": 1} if clicked else {"clicks": 1, "clicked": 1}
        clicked = True
        if event.position and event.position <= RANKS and (not top or event.position < top):
            changes |= {str(event.position): 1} | ({str(top): -1} if top else {})
            top = event.position
    db.executemany(
        "INSERT INTO counts VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET n = n + excluded.n",
        [(*cell, figure, n) for figure, n in changes.items()],
    )
    db.execute("UPDATE searches SET shown = 1, clicked = ?, top = ? WHERE query_id = ?", (clicked, top, query_id))
    return "counted"


def _find(db: sqlite3.Connection, rollout_id: str) -> Rollout | None:
    row = db.execute(f"SELECT {ROLLOUT} FROM rollouts WHERE id = ?", (rollout_id,)).fetchone()
    return row and _rollout(row)


def _known(db: sqlite3.Connection, rollout_id: str) -> Rollout:
    if found := _find(db, rollout_id):
        return found
    raise UnknownRolloutError(rollout_id)


def _rollout(row: tuple[Any, ...]) -> Rollout:
    rollout_id, route, spec, state, finished, *rest = row
    return Rollout(rollout_id, route, json.loads(spec), json.loads(state), bool(finished), *rest)


def _commands(db: sqlite3.Connection, which: str, *values: str) -> list[Command]:
    rows = db.execute(f"SELECT {COMMAND} FROM commands {which}", values)
    return [
        Command(rollout_id, id_, action, json.loads(body), *rest) for rollout_id, id_, action, body, *rest in rows
    ]
