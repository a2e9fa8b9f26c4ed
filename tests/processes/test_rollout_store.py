"""One suite for both rollout stores. Redis is a real server that the tests start; its half is skipped where none
is installed (`scripts/install-tools.sh` does it)."""

import logging
import pickle
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from serve_app.rollout.sqlite_store import SqliteStore
from serve_app.rollout.store import (
    Command,
    ConflictError,
    Event,
    EventCounts,
    EventsAdded,
    Lease,
    Limits,
    Report,
    Rollout,
    RouteBusyError,
    Search,
    StaleLeaseError,
    Store,
    StoreUnavailable,
    Transition,
    UnknownRolloutError,
    open_store,
    without_password,
)
from tests.processes.redis_server import RedisServer, needs_redis

# Two seconds, and what a busy machine adds.
SOON_S = 4
START = Transition("", "pending", "asked for by ann")
Opener = Callable[..., Store]


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    needs_redis()
    with tempfile.TemporaryDirectory() as folder:
        server = RedisServer(Path(folder), "--appendonly", "yes", "--databases", "200")
        yield server
        server.kill()


@pytest.fixture(params=["sqlite", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store's."""
    if request.param == "sqlite":
        return f"sqlite://{tmp_path}/rollouts.db"
    server: RedisServer = request.getfixturevalue("redis_server")
    server_dbs[server.port] = db = server_dbs.get(server.port, -1) + 1
    return f"redis://127.0.0.1:{server.port}/{db}"


server_dbs: dict[int, int] = {}


@pytest.fixture
def opened() -> Iterator[Opener]:
    stores: list[Store] = []

    def open_one(url: str, **limits: float) -> Store:
        stores.append(open_store(url, Limits(**limits)))  # type: ignore[arg-type]
        return stores[-1]

    yield open_one
    for store in stores:
        store.close()


@pytest.fixture
def store(opened: Opener, url: str) -> Store:
    return opened(url)


def rollout(rollout_id: str = "r1", route: str = "default", **state: Any) -> Rollout:
    return Rollout(rollout_id, route, {"route": route, "steps": [{"set_weight": 5}], "note": "größer ☃"}, state)


def led(store: Store, holder: str = "controller-1", ttl_s: float = 60) -> Lease:
    lease = store.acquire(holder, ttl_s)
    assert lease
    return lease


def step(there: Rollout, to: str, **changes: Any) -> tuple[Rollout, Transition]:
    changed = replace(there, state=there.state | {"status": to}, **changes)
    return changed, Transition(there.state.get("status", ""), to, f"to {to}", {"n": there.version})


# Rollouts and their history.


def test_a_rollout_is_read_back_as_it_was_written(store: Store) -> None:
    before = time.time()
    created = store.create(
        rollout(status="pending", weight=0.5, empty=[]), replace(START, figures={"p95": [1, None]})
    )
    assert created == replace(
        rollout(status="pending", weight=0.5, empty=[]),
        version=1,
        created_at=created.created_at,
        updated_at=created.created_at,
    )
    assert abs(created.created_at - before) < 60
    assert store.get("r1") == created
    assert store.active() == store.recent() == [created]
    (entry,) = store.history("r1")
    assert entry == replace(START, figures={"p95": [1, None]}, version=1, at=created.created_at)


def test_a_commit_writes_state_and_history_together(store: Store) -> None:
    lease = led(store)
    first = store.create(rollout(status="pending"), START)
    second = store.commit(*step(first, "warming"), lease)
    third = store.commit(replace(second, state={"status": "warming", "failures": 1}), None, lease)
    last = store.commit(*step(third, "promoted", finished=True), lease)
    assert [r.version for r in (first, second, third, last)] == [1, 2, 3, 4]
    assert store.get("r1") == last
    assert last.finished
    assert last.state == {"status": "promoted", "failures": 1}
    assert first.created_at == last.created_at <= second.updated_at <= last.updated_at
    assert [(t.version, t.from_status, t.to_status, t.figures) for t in store.history("r1")] == [
        (1, "", "pending", {}),
        (2, "pending", "warming", {"n": 1}),
        (4, "warming", "promoted", {"n": 3}),
    ]
    assert store.active() == []


def test_what_another_has_changed_is_not_overwritten(store: Store) -> None:
    lease = led(store)
    read = store.create(rollout(), START)
    stored = store.commit(*step(read, "warming"), lease)
    with pytest.raises(ConflictError, match="'r1' is at version 2, but was read at 1"):
        store.commit(*step(read, "aborted"), lease)
    assert store.get("r1") == stored
    assert len(store.history("r1")) == 2


def test_a_route_has_one_unfinished_rollout(store: Store) -> None:
    lease = led(store)
    first = store.create(rollout("r1"), START)
    with pytest.raises(RouteBusyError, match="'default' has the unfinished rollout 'r1'") as busy:
        store.create(rollout("r2"), START)
    assert busy.value.rollout_id == "r1"
    store.create(rollout("other", route="code search"), START)
    first = store.commit(*step(first, "promoted", finished=True), lease)
    second = store.create(rollout("r2"), START)
    with pytest.raises(RouteBusyError, match="r2"):
        store.commit(*step(first, "step", finished=False), lease)
    # Undone: finished before and after.
    first = store.commit(*step(first, "undone"), lease)
    store.commit(*step(second, "aborted", finished=True), lease)
    reopened = store.commit(*step(first, "step", finished=False), lease)
    assert [r.id for r in store.active()] == ["r1", "other"]
    assert [r.id for r in store.recent()] == ["r2", "other", "r1"]
    assert [r.id for r in store.recent(1)] == ["r2"]
    assert store.recent(5, "default") == [store.get("r2"), reopened]
    assert store.recent(0) == store.recent(5, "nowhere") == []


def test_creating_again_changes_nothing(store: Store) -> None:
    lease = led(store)
    stored = store.commit(*step(store.create(rollout(), START), "warming"), lease)
    assert store.create(rollout(), START) == stored
    with pytest.raises(ConflictError, match="'r1' is there already, and differs"):
        store.create(replace(rollout(), spec={}), START)
    assert len(store.history("r1")) == 2


def test_unknown_rollouts_and_bad_names_are_said(store: Store) -> None:
    lease = led(store)
    for act in (
        lambda: store.get("nobody"),
        lambda: store.commit(rollout("nobody"), START, lease),
        lambda: store.add_command(Command("nobody", "c1", "abort")),
    ):
        with pytest.raises(UnknownRolloutError, match="no rollout 'nobody'"):
            act()
    assert store.history("nobody") == store.commands("nobody") == store.figures("nobody") == []
    with pytest.raises(ValueError, match="id is 'a b'; allowed"):
        store.create(rollout("a b"), START)
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.create(rollout(weight=float("nan")), START)
    assert store.recent() == []


# The lease.


def test_one_holder_at_a_time_and_tokens_grow(store: Store) -> None:
    first = led(store, "a")
    assert store.acquire("b", 60) is None
    store.renew(first)
    again = led(store, "a")
    with pytest.raises(StaleLeaseError, match=f"lease {first.token} of 'a' has run out or was taken over"):
        store.renew(first)
    store.release(first)
    assert store.acquire("b", 60) is None
    store.release(again)
    third = led(store, "b")
    assert first.token < again.token < third.token


def test_a_lease_that_ran_out_is_refused_with_and_without_a_successor(store: Store) -> None:
    there = store.create(rollout(), START)
    waiting = store.add_command(Command("r1", "c1", "pause"))
    old = led(store, "a", ttl_s=0.05)
    time.sleep(0.06)

    def refused() -> None:
        with pytest.raises(StaleLeaseError):
            store.commit(*step(there, "warming"), old)
        with pytest.raises(StaleLeaseError):
            store.refuse_command(waiting, "no", old)
        with pytest.raises(StaleLeaseError):
            store.renew(old)

    refused()
    new = led(store, "b")
    refused()
    store.release(old)
    store.commit(*step(there, "warming"), new)
    assert store.commands("r1") == [waiting]


def test_renewing_keeps_a_lease(store: Store) -> None:
    # As long as a slow disk may take to have the renewal.
    lease = led(store, "a", ttl_s=5)
    store.renew(replace(lease, ttl_s=60))
    time.sleep(5)
    assert store.acquire("b", 1) is None
    store.renew(lease)


def test_the_same_token_of_another_holder_is_refused(store: Store) -> None:
    there = store.create(rollout(), START)
    lease = led(store, "b")
    with pytest.raises(StaleLeaseError):
        store.commit(*step(there, "warming"), replace(lease, holder="a"))


def test_a_clock_set_back_ends_a_lease(opened: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(f"sqlite://{tmp_path}/rollouts.db")
    old = led(store, "a", ttl_s=10)
    hour_ago = time.time() - 3600
    monkeypatch.setattr("serve_app.rollout.sqlite_store.time.time", lambda: hour_ago)
    assert led(store, "b", ttl_s=10).token > old.token
    with pytest.raises(StaleLeaseError):
        store.renew(old)


# Commands.


def test_commands_wait_in_order_and_are_applied_once(store: Store) -> None:
    lease = led(store)
    there = store.create(rollout(), START)
    pause = store.add_command(Command("r1", "c1", "pause", {"by": "ann"}))
    assert (pause.status, pause.reason, pause.at > 0) == ("waiting", "", True)
    resume = store.add_command(Command("r1", "c0", "resume"))
    assert store.waiting_commands() == store.commands("r1") == [pause, resume]
    there = store.commit(*step(there, "paused"), lease, consumed_command_id="c1")
    assert store.waiting_commands() == [resume]
    with pytest.raises(ConflictError, match="'c1' is not waiting"):
        store.commit(*step(there, "paused"), lease, consumed_command_id="c1")
    with pytest.raises(ConflictError, match="'c1' is not waiting"):
        store.refuse_command(pause, "no", lease)
    with pytest.raises(ConflictError, match="'c9' is not waiting"):
        store.commit(*step(there, "paused"), lease, consumed_command_id="c9")
    assert store.get("r1") == there
    store.refuse_command(resume, "it is not paused: allowed is abort", lease)
    assert store.waiting_commands() == []
    assert store.commands("r1") == [
        replace(pause, status="applied"),
        replace(resume, status="refused", reason="it is not paused: allowed is abort"),
    ]


def test_a_commit_that_fails_leaves_its_command_waiting(store: Store) -> None:
    lease = led(store)
    read = store.create(rollout(), START)
    there = store.commit(*step(read, "warming"), lease)
    abort = store.add_command(Command("r1", "c1", "abort"))
    with pytest.raises(ConflictError):
        store.commit(*step(read, "aborted"), lease, consumed_command_id="c1")
    assert store.waiting_commands() == [abort]
    assert store.get("r1") == there


def test_a_command_sent_twice_is_one(store: Store) -> None:
    lease = led(store)
    there = store.create(rollout(), START)
    sent = Command("r1", "c1", "abort", {"by": "ann"})
    assert store.add_command(sent) == store.add_command(sent)
    with pytest.raises(ConflictError, match="'c1' is there already"):
        store.add_command(replace(sent, action="promote"))
    store.commit(*step(there, "aborted", finished=True), lease, "c1")
    assert store.add_command(sent).status == "applied"
    assert store.waiting_commands() == []


def test_waiting_commands_are_bounded_and_of_all_rollouts(opened: Opener, url: str) -> None:
    store = opened(url, waiting_commands=3)
    store.create(rollout("r1", "a"), START)
    store.create(rollout("r2", "b"), START)
    for i in range(3):
        store.add_command(Command(f"r{1 + i % 2}", f"c{i}", "pause"))
    assert [(c.rollout_id, c.id) for c in store.waiting_commands()] == [("r1", "c0"), ("r2", "c1"), ("r1", "c2")]
    with pytest.raises(ConflictError, match="3 commands are waiting already"):
        store.add_command(Command("r1", "c3", "pause"))


# Figures.


def bucket_now() -> int:
    return int(time.time()) // 5 * 5


def test_figures_count_once_however_often_they_are_sent(store: Store) -> None:
    store.create(rollout(), START)
    now = bucket_now()
    sent = [
        Report("r1", role, now - 5 * i, {"calls": i, "latency": [[3, 1]]}, gateway, i)
        for gateway in ("g1", "g2")
        for i in range(3)
        for role in ("canary", "stable")
    ]
    assert store.add_figures(sent[:5]) == 5
    assert store.add_figures(sent) == len(sent) - 5
    assert store.add_figures(iter(sent)) == 0
    assert store.add_figures([]) == 0
    assert store.add_figures([replace(sent[0], value={"calls": 99})]) == 0
    assert store.figures("r1") == sorted(sent, key=lambda r: (r.bucket, r.source, r.seq, r.role))
    assert store.figures("r1", since_bucket=now) == [r for r in sent if r.bucket == now]
    assert store.figures("r1", now - 5, now) == [r for r in sent if r.bucket == now - 5]
    assert store.add_figures([replace(sent[0], rollout_id="nobody")]) == 0


def test_figures_are_bounded_by_age_and_number(opened: Opener, url: str) -> None:
    store = opened(url, figures=1200, figures_ttl_s=3600)
    store.create(rollout(), START)
    now = bucket_now()
    reports = [Report("r1", "canary", now - 1500 + i, {"calls": i}, "g1", i) for i in range(1500)]
    assert store.add_figures(reports[:700]) == 700
    assert store.add_figures(reports[700:]) == 800
    assert store.figures("r1") == reports[300:]
    late = [Report("r1", "canary", now - 3700, {}, "g1", 9999)]
    assert store.add_figures(late) == 0
    short = opened(url, figures=1200, figures_ttl_s=100)
    last = replace(reports[-1], seq=7777)
    # Old ones go a thousand a call.
    assert [short.add_figures([last]), short.add_figures([last])] == [1, 0]
    assert 50 <= len(store.figures("r1")) <= 102
    assert store.figures("r1", now - 1)[-1] == last


# Searches and events.


def clicked(store: Store, *events: tuple[str, str, int | None]) -> EventsAdded:
    """Of (event id, query id, position); position 0: an impression."""
    kinds = [Event(i, q, "click" if p != 0 else "impression", p or None) for i, q, p in events]
    return store.add_events(kinds)


def served(*ids: str, role: str = "canary", at: float | None = None, rollout_id: str = "r1") -> list[Search]:
    return [Search(query_id, rollout_id, role, time.time() if at is None else at) for query_id in ids]


def total(counts: list[EventCounts]) -> dict[str, tuple[int, int, int, int, float]]:
    sums: dict[str, tuple[int, int, int, int, float]] = {}
    for c in counts:
        reciprocal_ranks = sum(n / rank for rank, n in enumerate(c.by_rank) if rank)
        row = (c.impressions, c.clicks, c.clicked, c.by_rank[1], round(reciprocal_ranks, 6))
        sums[c.role] = tuple(map(sum, zip(sums.get(c.role, (0,) * 5), row, strict=True)))  # type: ignore[assignment]
    return sums


def test_events_are_counted_by_role_and_the_search_s_minute(store: Store) -> None:
    now = time.time()
    store.add_searches(served("q1", "q2", "q3", at=now - 600) + served("q4", role="stable", at=now))
    added = clicked(
        store,
        *((f"i{i}", f"q{i}", 0) for i in (1, 2, 3, 4)),
        *(("c1", "q1", 3), ("c2", "q1", 2), ("c3", "q1", 5)),
        *(("c4", "q2", 1), ("c5", "q2", 1), ("c6", "q4", 4)),
        *(("c7", "q3", 12), ("c8", "q3", None)),
    )
    assert added == EventsAdded(12, 0, 0)
    early, late = store.event_counts("r1")
    ranks = (1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0)
    assert early == EventCounts("canary", int((now - 600) // 60), 3, 7, 3, ranks)
    assert late == EventCounts("stable", int(now // 60), 1, 1, 1, (0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0))
    assert store.event_counts("r1", int(now // 60)) == [late]
    assert store.event_counts("r2") == []


def test_an_event_counts_once_by_its_id(store: Store) -> None:
    store.add_searches(served("q1", "q2"))
    batch = [("i1", "q1", 0), ("c1", "q1", 2), ("c1", "q1", 2)]
    assert clicked(store, *batch) == EventsAdded(2, 1, 0)
    store.add_searches(served("q1", role="stable"))
    assert clicked(store, *batch, ("i2", "q1", 0)) == EventsAdded(1, 3, 0)
    assert total(store.event_counts("r1")) == {"canary": (1, 1, 1, 0, 0.5)}


def test_a_click_implies_the_impression(store: Store) -> None:
    store.add_searches(served("q1"))
    assert clicked(store, ("c1", "q1", 1), ("i1", "q1", 0)) == EventsAdded(2, 0, 0)
    assert total(store.event_counts("r1")) == {"canary": (1, 1, 1, 1, 1.0)}


def test_events_of_unknown_searches_are_counted_as_such_and_may_be_sent_again(store: Store) -> None:
    assert clicked(store, ("c1", "q1", 1)) == EventsAdded(0, 0, 1)
    store.add_searches(served("q1"))
    assert clicked(store, ("c1", "q1", 1)) == EventsAdded(1, 0, 0)
    assert clicked(store) == EventsAdded(0, 0, 0)


def test_ids_may_be_anything_that_clients_send(store: Store) -> None:
    odd = ["", " ", "\ud800", "a\x00b", "x" * 100_000, "'; DROP TABLE searches; --", "☃"]
    store.add_searches(served(*odd))
    assert clicked(store, *((query_id, query_id, 1) for query_id in odd)) == EventsAdded(len(odd), 0, 0)


def test_searches_and_event_ids_are_bounded_and_expire(opened: Opener, url: str) -> None:
    store = opened(url, searches=1100, event_ids=2, search_ttl_s=3600)
    now = time.time()
    store.add_searches(served("expired", at=now - 3700))
    ids = [f"q{i}" for i in range(1500)]
    store.add_searches([s for i, q in enumerate(ids) for s in served(q, at=now - 1500 + i)])
    known = clicked(store, *((f"i{q}", q, 0) for q in ids), ("x", "expired", 0))
    assert known == EventsAdded(1100, 0, 401)
    # Only the last two ids are remembered; what counts once a search still does.
    assert clicked(store, ("iq1498", "q1498", 0), ("iq1499", "q1499", 0), ("iq900", "q900", 0)) == EventsAdded(
        1, 2, 0
    )
    assert total(store.event_counts("r1")) == {"canary": (1100, 0, 0, 0, 0)}


def test_a_clock_ahead_keeps_no_search_longer(opened: Opener, url: str) -> None:
    store = opened(url, search_ttl_s=0.2)
    store.add_searches(served("q1", at=time.time() + 1e6))
    time.sleep(0.25)
    assert clicked(store, ("c1", "q1", 1)) == EventsAdded(0, 0, 1)


# Many at once.


RACER = """
import sys, time
from dataclasses import replace
from serve_app.rollout.store import *
url, name, (routes, commits) = sys.argv[1], sys.argv[2], map(int, sys.argv[3:])
store = open_store(url)
start_at = Transition("", "pending", name)
print("ready", flush=True)
sys.stdin.readline()
for i in range(routes):
    try:
        store.create(Rollout(f"{name}-{i}", f"route{i}", {}, {}), start_at)
        print("created", i)
    except RouteBusyError:
        pass
done = 0
while done < commits:
    lease = store.acquire(name, 60)
    if lease is None:
        time.sleep(0.002)
        continue
    print("token", lease.token)
    for _ in range(5):
        read = store.get("shared")
        store.commit(replace(read, state={"n": read.state["n"] + 1}), Transition("", name, ""), lease)
        done += 1
    store.release(lease)
"""


def test_processes_racing_for_routes_and_the_lease(store: Store, url: str) -> None:
    store.create(rollout("shared", "shared", n=0), START)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, url, name, "30", "30"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("a", "b", "c")
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    lines = []
    for racer in racers:
        lines += racer.communicate(timeout=120)[0].splitlines()
        assert racer.returncode == 0
    assert sorted(int(line.split()[1]) for line in lines if line.startswith("created")) == list(range(30))
    assert len(store.active()) == 31
    tokens = [line for line in lines if line.startswith("token")]
    assert len(set(tokens)) == len(tokens) == 18
    assert store.get("shared").state == {"n": 90}
    assert [t.version for t in store.history("shared")] == list(range(1, 92))


def test_threads_racing_for_one_version_and_one_command(store: Store) -> None:
    lease = led(store)
    read = store.create(rollout(), START)
    store.add_command(Command("r1", "c1", "pause"))

    def attempt(i: int) -> bool:
        try:
            store.commit(*step(read, f"by-{i}"), lease, "c1")
        except ConflictError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(attempt, range(16)))
        assert sum(won) == 1
        store.create(rollout("r2", "b"), START)
        store.add_searches(served("q1"))
        report = Report("r2", "canary", bucket_now(), {}, "g", 1)
        assert sum(pool.map(lambda _: store.add_figures([report]), range(16))) == 1
        clicks = list(pool.map(lambda _: clicked(store, ("c1", "q1", 1)), range(16)))
        assert sum(added.counted for added in clicks) == 1
    assert store.get("r1").state["status"] == f"by-{won.index(True)}"
    assert len(store.history("r1")) == 2


def test_a_new_file_may_be_opened_by_many_at_once(opened: Opener, tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        for i in range(5):
            stores = [opened(f"sqlite://{tmp_path}/{i}.db") for _ in range(8)]
            leases = list(pool.map(lambda store, name: store.acquire(f"c{name}", 60), stores, range(8)))
            assert sum(lease is not None for lease in leases) == 1


# Whatever the order of calls.


class Calls(RuleBasedStateMachine):
    """Two controllers and operators against a model; both stores must do what it says."""

    url: str
    rollouts: dict[str, Rollout]

    @initialize()
    def begin(self) -> None:
        type(self).runs = getattr(type(self), "runs", 0) + 1
        self.space = f"x{self.runs}-"
        self.store = open_store(self.url, Limits(waiting_commands=100_000))
        self.rollouts, self.commands, self.steps = {}, {}, {}
        self.leases: dict[str, Lease] = {}
        self.holder: str | None = None
        for name in ("a", "b"):
            self.leases[name] = led(self.store, name)
            self.store.release(self.leases[name])

    @rule(name=st.sampled_from("ab"))
    def acquire(self, name: str) -> None:
        lease = self.store.acquire(name, 60)
        assert (lease is None) == (self.holder not in (None, name))
        if lease:
            assert lease.token > max(old.token for old in self.leases.values())
            self.holder, self.leases[name] = name, lease

    @rule(name=st.sampled_from("ab"))
    def release(self, name: str) -> None:
        self.store.release(self.leases[name])
        if self.holder == name:
            self.holder = None

    @rule(name=st.sampled_from("12345"), route=st.sampled_from("xy"))
    def create(self, name: str, route: str) -> None:
        new = Rollout(self.space + name, self.space + route, {"name": name}, {})
        known = self.rollouts.get(new.id)
        busy = any(r.route == new.route and not r.finished for r in self.rollouts.values())
        try:
            created = self.store.create(new, START)
        except ConflictError:
            assert known
            assert known.route != new.route
        except RouteBusyError:
            assert busy
            assert not known
        else:
            assert created == known if known else not busy
            self.rollouts[new.id] = created
            self.steps.setdefault(new.id, [1])

    @rule(
        name=st.sampled_from("12345"),
        who=st.sampled_from("ab"),
        late=st.booleans(),
        command=st.sampled_from("-mn"),
    )
    def commit(self, name: str, who: str, late: bool, command: str) -> None:
        there = self.rollouts.get(self.space + name)
        if not there:
            return
        read = replace(there, version=there.version - late)
        finished = there.finished or command == "n"
        consumed = None if command == "-" else command
        waits = consumed is None or self.commands.get((there.id, consumed)) == "waiting"
        try:
            stored = self.store.commit(
                replace(read, state={"v": there.version}, finished=finished), START, self.leases[who], consumed
            )
        except StaleLeaseError:
            assert self.holder != who
        except ConflictError:
            assert self.holder == who
            assert late or not waits
        else:
            assert self.holder == who
            assert waits
            assert not late
            assert (stored.version, stored.finished) == (there.version + 1, finished)
            self.rollouts[there.id] = stored
            self.steps[there.id].append(stored.version)
            if consumed:
                self.commands[there.id, consumed] = "applied"

    @rule(name=st.sampled_from("12345"), command=st.sampled_from("mn"))
    def order(self, name: str, command: str) -> None:
        there = self.rollouts.get(self.space + name)
        if there:
            sent = self.store.add_command(Command(there.id, command, "pause"))
            assert sent.status == self.commands.setdefault((there.id, command), "waiting")

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "store"):
            return
        mine = [r for r in self.store.recent(1000) if r.id.startswith(self.space)]
        assert {r.id: r for r in mine} == self.rollouts
        active = {r.id for r in self.store.active() if r.id.startswith(self.space)}
        assert active == {r.id for r in self.rollouts.values() if not r.finished}
        for rollout_id, versions in self.steps.items():
            assert [t.version for t in self.store.history(rollout_id)] == versions
        waiting = {
            (c.rollout_id, c.id) for c in self.store.waiting_commands() if c.rollout_id.startswith(self.space)
        }
        assert waiting == {key for key, status in self.commands.items() if status == "waiting"}

    def teardown(self) -> None:
        if hasattr(self, "store"):
            for lease in self.leases.values():
                self.store.release(lease)
            self.store.close()


def test_any_order_of_calls(url: str) -> None:
    machine = type("Calls", (Calls,), {"url": url})
    checks = list(HealthCheck)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=checks, database=None
        ),
    )


# What goes wrong.


WRITER = """
import sys
from dataclasses import replace
from serve_app.rollout.store import *
store = open_store(sys.argv[1])
lease = store.acquire("writer", 60)
there = store.create(Rollout("r1", "default", {}, {"n": 1}), Transition("", "1", ""))
while True:
    n = there.version + 1
    store.add_command(Command("r1", str(n), "pause"))
    entry = Transition(str(n - 1), str(n), "", {"fill": "x" * 3000})
    there = store.commit(replace(there, state={"n": n}), entry, lease, str(n))
    print(n, flush=True)
"""


def consistent(store: Store, at_least: int) -> None:
    """After a crash: what was acknowledged is there, and state, history and commands tell the same."""
    there = store.get("r1")
    assert there.version >= at_least
    assert there.state == {"n": there.version}
    history = store.history("r1")
    assert [t.version for t in history] == list(range(1, there.version + 1))
    assert [t.to_status for t in history] == [str(t.version) for t in history]
    done = [int(c.id) for c in store.commands("r1") if c.status == "applied"]
    assert done == list(range(2, there.version + 1))


@pytest.mark.parametrize("seed", range(3))
def test_a_writer_killed_at_any_moment_leaves_all_of_a_commit_or_nothing(
    store: Store, url: str, seed: int
) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, url], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout
        assert writer.stdout.readline() == "2\n"
        time.sleep(random.Random(seed).uniform(0, 0.25))
        writer.send_signal(signal.SIGKILL)
        # The last line may be torn.
        acknowledged = [2, *(int(line) for line in writer.stdout.read().split("\n")[:-1])]
    consistent(store, acknowledged[-1])
    # Its lease holds until it runs out, and nobody is locked out meanwhile.
    assert store.acquire("next", 1) is None
    store.add_command(Command("r1", "c-next", "abort"))


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    needs_redis()
    folder = tmp_path / "redis"
    folder.mkdir()
    server = RedisServer(
        folder,
        "--appendonly",
        "yes",
        "--appendfsync",
        "always",
        "--requirepass",
        "s3cret/@",
    )
    yield server
    # Also where it is stopped.
    server.kill()


def test_redis_killed_and_started_again_has_what_it_acknowledged(own_redis: RedisServer, opened: Opener) -> None:
    url = f"redis://:s3cret%2F%40@127.0.0.1:{own_redis.port}"
    store = opened(url)
    lease = led(store)
    with subprocess.Popen(
        [sys.executable, "-c", WRITER.replace('store.acquire("writer", 60)', repr_lease(lease)), url],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as writer:
        assert writer.stdout
        assert writer.stdout.readline() == "2\n"
        time.sleep(0.2)
        own_redis.kill()
        acknowledged = [2, *map(int, writer.stdout.read().split())]
    assert writer.returncode == 1
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="cannot be reached"):
            store.active()
    own_redis.start()
    # By itself, and with the lease that it had.
    consistent(store, acknowledged[-1])
    store.renew(lease)
    assert store.acquire("other", 1) is None
    store.commit(*step(store.get("r1"), "promoted"), lease)


def test_redis_restarted_while_nobody_asked_is_not_noticed(own_redis: RedisServer, opened: Opener) -> None:
    store = opened(f"redis://:s3cret%2F%40@127.0.0.1:{own_redis.port}")
    there = store.create(rollout(), START)
    own_redis.kill()
    own_redis.start()
    assert store.get("r1") == there


def repr_lease(lease: Lease) -> str:
    return f"Lease({lease.holder!r}, {lease.token}, {lease.ttl_s})"


def test_redis_that_hangs_is_given_up_on_in_two_seconds(own_redis: RedisServer, opened: Opener) -> None:
    store = opened(f"redis://:s3cret%2F%40@127.0.0.1:{own_redis.port}/3")
    there = store.create(rollout(), START)
    own_redis.process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match="did not answer within 1 s") as slow:
        store.get("r1")
    assert time.monotonic() - began < SOON_S
    assert "s3cret" not in str(slow.value) + repr(slow.value) + repr(store) + store.url
    own_redis.process.send_signal(signal.SIGCONT)
    assert store.get("r1") == there


def test_a_password_may_be_in_the_environment(
    own_redis: RedisServer, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVE_APP_REDIS_PASSWORD", "s3cret/@")
    store = opened(f"redis://127.0.0.1:{own_redis.port}")
    assert store.active() == []
    assert "s3cret" not in repr(store)


def test_redis_refusals_say_what_to_do(own_redis: RedisServer, opened: Opener) -> None:
    wrong = opened(f"redis://:wr0ng@127.0.0.1:{own_redis.port}")
    with pytest.raises(StoreUnavailable, match="refused the user or the password") as refused:
        wrong.active()
    assert "wr0ng" not in str(refused.value)
    assert f"redis://***@127.0.0.1:{own_redis.port}/0" in str(refused.value)
    with pytest.raises(StoreUnavailable, match="refused the user or the password"):
        opened(f"redis://127.0.0.1:{own_redis.port}").active()
    store = opened(f"redis://:s3cret%2F%40@127.0.0.1:{own_redis.port}")
    store.create(rollout(), START)
    server: Any = store._redis  # type: ignore[attr-defined]
    server.config_set("maxmemory", "1")
    with pytest.raises(StoreUnavailable, match="is out of memory"):
        store.add_command(Command("r1", "c1", "abort"))
    assert [r.id for r in store.active()] == ["r1"]
    server.config_set("maxmemory", "0")
    server.replicaof("127.0.0.1", "1")
    with pytest.raises(StoreUnavailable, match="is a replica"):
        store.add_command(Command("r1", "c1", "abort"))
    server.replicaof("NO", "ONE")
    server.script_flush()
    assert store.add_command(Command("r1", "c1", "abort")).status == "waiting"


def test_redis_without_a_file_is_warned_about(
    own_redis: RedisServer, opened: Opener, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"redis://:s3cret%2F%40@127.0.0.1:{own_redis.port}"
    with caplog.at_level(logging.WARNING):
        opened(url).active()
        assert not caplog.messages
        other = opened(url)
        other._redis.config_set("appendonly", "no")  # type: ignore[attr-defined]
        other.active()
        other.active()
    assert caplog.messages == [
        f"redis://***@127.0.0.1:{own_redis.port}/0 has no append-only file, so a restart loses rollouts; "
        "set appendonly yes"
    ]


def test_redis_that_lost_writes_lets_no_old_holder_write(opened: Opener, redis_server: RedisServer) -> None:
    server_dbs[redis_server.port] = db = server_dbs.get(redis_server.port, -1) + 1
    store = opened(f"redis://127.0.0.1:{redis_server.port}/{db}")
    old = led(store, "a")
    there = store.create(rollout(), START)
    store._redis.delete("serve-app:lease", "serve-app:lease-token")  # type: ignore[attr-defined]
    assert led(store, "b").token == old.token
    with pytest.raises(StaleLeaseError):
        store.commit(*step(there, "warming"), old)


@pytest.fixture
def on_file(opened: Opener, tmp_path: Path) -> SqliteStore:
    store = opened(f"sqlite://{tmp_path}/deep/er/rollouts.db")
    assert isinstance(store, SqliteStore)
    return store


def test_a_commit_is_on_the_disk_before_it_returns(on_file: SqliteStore) -> None:
    on_file.active()
    db = on_file._file._db
    assert db
    assert [db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")] == ["wal", 2]


def test_a_full_disk_stops_a_write_and_keeps_what_is_there(on_file: SqliteStore) -> None:
    lease = led(on_file)
    there = on_file.create(rollout(), START)
    db = on_file._file._db
    assert db
    pages = db.execute("PRAGMA page_count").fetchone()[0]
    db.execute(f"PRAGMA max_page_count = {pages}")
    grown = replace(there, state={"big": "x" * 100_000})
    with pytest.raises(StoreUnavailable, match=r"has no room \(.*full\); free space on its disk"):
        on_file.commit(grown, START, lease)
    assert on_file.get("r1") == there
    assert len(on_file.history("r1")) == 1
    db.execute(f"PRAGMA max_page_count = {pages + 1000}")
    assert on_file.commit(grown, START, lease).version == 2


def test_a_locked_file_is_given_up_on_in_two_seconds(on_file: SqliteStore) -> None:
    on_file.create(rollout(), START)
    other = sqlite3.connect(on_file._file.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match="was locked by another process for 1 s"):
        on_file.add_command(Command("r1", "c1", "abort"))
    assert time.monotonic() - began < SOON_S
    # Readers don't mind.
    assert len(on_file.active()) == 1
    other.execute("ROLLBACK")
    other.close()
    assert on_file.add_command(Command("r1", "c1", "abort")).status == "waiting"


def test_a_damaged_file_is_named_and_a_restored_one_taken_up(on_file: SqliteStore) -> None:
    created = on_file.create(rollout(), START)
    on_file.close()
    kept = on_file._file.path.read_bytes()
    on_file._file.path.write_bytes(kept[:4096] + b"\xff" * (len(kept) - 4096))
    with pytest.raises(StoreUnavailable, match=r"is damaged .*; stop what uses it, and restore it"):
        on_file.active()
    on_file._file.path.write_bytes(b"id,route\n" * 1000)
    with pytest.raises(StoreUnavailable, match=r"is not a SQLite file .*; name another"):
        on_file.active()
    on_file._file.path.write_bytes(kept)
    assert on_file.active() == [created]


@pytest.mark.parametrize("what", ["the file", "its folder"])
def test_a_file_taken_away_is_noticed_before_writes_vanish(on_file: SqliteStore, what: str) -> None:
    created = on_file.create(rollout(), START)
    path = on_file._file.path
    taken = path if what == "the file" else path.parent
    taken.rename(taken.with_name("away"))
    gone = r"is away: the file is gone; put it back, or restart the rollouts application to start empty$"
    for _ in range(3):
        with pytest.raises(StoreUnavailable, match=gone):
            on_file.add_command(Command("r1", "c1", "abort"))
        assert not taken.exists()
    taken.with_name("away").rename(taken)
    assert on_file.active() == [created]


def test_another_file_in_its_place_is_taken_where_it_is_a_store(
    on_file: SqliteStore, opened: Opener, tmp_path: Path
) -> None:
    on_file.create(rollout(), START)
    backup = opened(f"sqlite://{tmp_path}/back up?.db")
    kept = backup.create(rollout("r2"), START)
    backup.close()
    path = on_file._file.path
    (tmp_path / "back up?.db").replace(path)
    with pytest.raises(StoreUnavailable, match="the file was replaced while in use"):
        on_file.active()
    assert on_file.active() == [kept]
    path.unlink()
    path.touch()
    for problem in (
        "the file was replaced while in use",
        "what is there now is no rollout store; put the file back",
    ):
        with pytest.raises(StoreUnavailable, match=problem):
            on_file.active()
    assert path.stat().st_size == 0


def test_a_file_that_cannot_be_is_said(opened: Opener, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        StoreUnavailable, match=r"sqlite://.*/file/rollouts.db failed \(.*(Not a directory|exists)"
    ):
        opened(f"sqlite://{tmp_path}/file/rollouts.db").active()
    with pytest.raises(StoreUnavailable, match="cannot be opened"):
        opened(f"sqlite://{tmp_path}").active()


def test_a_newer_format_is_refused(on_file: SqliteStore) -> None:
    on_file.active()
    db = on_file._file._db
    assert db
    db.execute("PRAGMA user_version = 7")
    on_file.close()
    with pytest.raises(StoreUnavailable, match="its format is 7, and this version of serve-app reads 1"):
        on_file.active()


def test_errors_survive_a_way_between_processes() -> None:
    for error in (
        StoreUnavailable("redis://h", "is down", "wait"),
        RouteBusyError("a", "r1"),
        UnknownRolloutError("r1"),
    ):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (type(error), str(error))


# Addresses.


@pytest.mark.parametrize(
    ("url", "shown", "why"),
    [
        ("rollouts.db", "rollouts.db", "neither a SQLite file nor a Redis server"),
        ("mysql://u:pw0@h/x", "mysql://***@h/x", "neither a SQLite file nor a Redis server"),
        ("sqlite://", "sqlite://", "names no file"),
        ("sqlite://:memory:", "sqlite://:memory:", "names no file"),
        ("redis://", "redis://", "needs a host"),
        ("redis://:pw0@h:x/0", "redis://***@h:***/0", "port and db are numbers"),
        ("redis://:pw0@h:6379/zero", "redis://***@h:6379/zero", "port and db are numbers"),
        ("redis://:pw0@h:6379?password=pw0", "redis://***@h:6379", "takes nothing after"),
        ("redis://:pw0/x@h", "redis://***@h", "port and db are numbers"),
        ("redis://:pw0#x@h", "redis://***@h", "port and db are numbers"),
        ("redis://:pw0", "redis://:***", "port and db are numbers"),
        ("redis:pw0@h", "***@h", "neither"),
    ],
)
def test_a_wrong_address_is_refused_without_its_password(url: str, shown: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as refused:
        open_store(url, setting="rollout.store")
    text = str(refused.value)
    assert text.startswith(f"rollout.store is {shown!r}: ")
    assert "allowed: sqlite:///path/to/file or redis://" in text
    assert "pw0" not in text


def test_addresses_are_shown_without_password() -> None:
    assert open_store("redis://h").url == "redis://h:6379/0"
    assert repr(open_store("redis://u:p%40w@[::1]:7000/2")) == "RedisStore('redis://***@[::1]:7000/2')"
    assert open_store("sqlite:///var/lib/x.db").url == "sqlite:///var/lib/x.db"
    assert without_password("redis://:p@w@h:1/2") == "redis://***@h:1/2"
