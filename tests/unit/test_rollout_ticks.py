"""A controller's looks, one by one in process: what is slow, stuck, old or much holds nothing up."""

import asyncio
import gc
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serve_app.config import RolloutArgs
from serve_app.gateway.rollouts import deployed
from serve_app.rollout import controller as module
from serve_app.rollout import deployment
from serve_app.rollout.controller import Controller
from serve_app.rollout.document import RolloutDocument
from serve_app.rollout.figures import Figures
from serve_app.rollout.machine import State
from serve_app.rollout.messages import Deployed, News
from serve_app.rollout.split import place
from serve_app.rollout.store import (
    Command,
    Event,
    Report,
    Rollout,
    Search,
    Store,
    StoreUnavailable,
    Transition,
    open_store,
)
from serve_app.rollout.window import Window, clicks
from tests.processes.rollout_gateway import settings
from tests.processes.rollout_process import until

ROUTES = ("a", "b", "c")
GUARDS = {"error_rate": {}}
JUDGED = {"steps": [{"set_weight": 25}, {"analysis": {}}, {"set_weight": 50}], "guards": GUARDS}
UP = {"steps": [{"set_weight": 50}], "guards": GUARDS}
NotReady = Callable[[Sequence[str]], Awaitable[list[str]]]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = open_store(f"sqlite://{tmp_path}/rollouts.db")
    yield store
    store.close()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE_S", 0.05)
    monkeypatch.setattr(module, "_LOOK_S", 0.0)


async def all_ready(variants: Sequence[str]) -> list[str]:
    return []


async def heard(store: Store, not_ready: NotReady = all_ready, **more: Any) -> Controller:
    """A controller that a gateway has told what it serves."""
    controller = Controller(store, not_ready)
    await controller.exchange(News("g", deployed(settings(ROUTES, **more))))
    return controller


async def start(controller: Controller, route: str = "a", **document: Any) -> str:
    document = {"route": route, "stable": "stable", "canary": "canary", **document}
    reply = await controller.start(document, uuid.uuid4().hex, "ann")
    assert reply.error is None, reply
    return str(reply.body["id"])


async def act(controller: Controller, rollout: str, action: Any) -> str | None:
    """The refusal, if it was one."""
    order = asyncio.create_task(controller.act(rollout, action, f"{action}-{time.monotonic()}", "ann"))
    while not order.done():
        await controller.tick()
    reply = order.result()
    return reply.message if reply.error else None


async def ticks_until(controller: Controller, condition: Callable[[], Any], limit_s: float = 20) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        await controller.tick()


def status(store: Store, rollout: str) -> str:
    return str(store.get(rollout).state["status"])


def report(rollout: str, role: str, bucket: int, seq: int, calls: int = 1, errors: int = 0) -> Report:
    return Report(rollout, role, bucket, Figures(calls=calls, errors=errors).to_json(), "g", seq)


def counted_reads(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many reports each read of figures gives from here on."""
    read = store.figures
    took: list[int] = []

    def figures(*arguments: Any) -> list[Report]:
        found = read(*arguments)
        took.append(len(found))
        return found

    monkeypatch.setattr(store, "figures", figures)
    return took


def failing(store: Store, rollout: str) -> None:
    """Two looks' worth of calls that the canary failed, and stable didn't."""
    bucket = int(store.get(rollout).state["window_from"]) + 1
    n = len(store.figures(rollout))
    store.add_figures([report(rollout, "canary", bucket, n, 40, 40), report(rollout, "stable", bucket, n, 40)])


# ---- slow and stuck


def test_a_fleet_that_never_answers_holds_up_only_what_waits_for_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Sequence[str]] = []
    answers = asyncio.Event()

    async def not_ready(variants: Sequence[str]) -> list[str]:
        asked.append(variants)
        if len(asked) > 1:
            await answers.wait()
        return []

    async def scenario() -> None:
        controller = await heard(store, not_ready)
        judged = await start(controller, "a", **JUDGED)
        await ticks_until(controller, lambda: store.get(judged).state["step"] == 1)
        waiting = [await start(controller, "b", **UP), await start(controller, "c", **UP)]
        await ticks_until(controller, lambda: len(asked) > 1)
        for _ in range(2):
            failing(store, judged)
            began = time.monotonic()
            for _ in range(5):
                await controller.tick()
            assert time.monotonic() - began < module.LEASE_S
        assert status(store, judged) == "rolled_back"
        assert {status(store, rollout) for rollout in waiting} == {"warming"}
        # It isn't asked again before it has answered.
        assert asked == [["canary-model"]] * 2
        monkeypatch.setattr("serve_app.rollout.machine.WARMING_LIMIT_S", 0)
        await controller.tick()
        assert {status(store, rollout) for rollout in waiting} == {"rolled_back"}
        answers.set()

    asyncio.run(scenario())


def test_a_fleet_that_fails_is_asked_again(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    failures = 3

    async def not_ready(variants: Sequence[str]) -> list[str]:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise RuntimeError("no status")
        return []

    async def scenario() -> None:
        controller = await heard(store, not_ready)
        rollout = await start(controller, **UP)
        await ticks_until(controller, lambda: status(store, rollout) == "promoted")

    asyncio.run(scenario())
    assert [record.getMessage() for record in caplog.records if record.exc_info] == [
        "the fleet's status stands still"
    ]


def test_figures_that_take_long_to_read_delay_no_command_and_no_other_rollout(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = store.figures
    slow: set[str] = set()
    reading: list[str] = []

    def figures(rollout: str, *arguments: Any) -> list[Report]:
        reading.append(rollout)
        deadline = time.monotonic() + 10
        while rollout in slow and time.monotonic() < deadline:
            time.sleep(0.01)
        return read(rollout, *arguments)

    monkeypatch.setattr(store, "figures", figures)

    async def scenario() -> None:
        first, controller = await heard(store), await heard(store)
        document = {**JUDGED, "steps": [{"set_weight": 25}, {"analysis": {"timeout_s": 0.1}}]}
        judged = await start(first, "a", **document)
        await ticks_until(first, lambda: store.get(judged).state["step"] == 1)
        at = store.get(judged)
        await first.close()
        slow.add(judged)
        reading.clear()
        other = await start(controller, "b", **UP)
        await ticks_until(controller, lambda: status(store, other) == "promoted")
        # Nothing is decided on figures that nobody has seen.
        await ticks_until(controller, lambda: time.time() > at.state["until"])
        assert store.get(judged) == at
        assert reading.count(judged) == 1
        store.add_command(Command(judged, "c1", "pause"))
        await controller.tick()
        assert status(store, judged) == "paused"
        slow.clear()
        assert await act(controller, judged, "resume") is None
        await ticks_until(controller, lambda: status(store, judged) == "inconclusive")

    asyncio.run(scenario())


def test_a_stuck_rollout_is_logged_once(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        controller = await heard(store)
        good = await start(controller, "a", **UP)
        bad = store.create(
            Rollout("bad", "b", {"stable": "stable", "canary": "canary"}, State().to_json()),
            Transition("none", "pending", ""),
        )
        store.add_command(Command(bad.id, "c1", "abort"))
        await ticks_until(controller, lambda: status(store, good) == "promoted")
        for _ in range(5):
            await controller.tick()

    with caplog.at_level(logging.WARNING):
        asyncio.run(scenario())
    assert [record.getMessage() for record in caplog.records] == [
        "command c1 of bad stands still",
        "rollout bad stands still",
    ]


# Python calls it once more, and awaits nothing.
@pytest.mark.filterwarnings("ignore:coroutine 'Rollout.__del__' was never awaited")
def test_a_replica_that_stops_leaves_the_lease_to_the_next(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TICK_S", 0.001)
    monkeypatch.setattr(deployment.serve, "get_replica_context", lambda: SimpleNamespace(replica_tag="r"))

    async def scenario() -> None:
        replica = deployment.Rollout.func_or_class.__new__(deployment.Rollout.func_or_class)
        await replica.__init__(RolloutArgs(store=store.url))
        await until(lambda: replica._controller._lease, "the lease")
        assert store.acquire("next", 60) is None
        await replica.__del__()
        assert store.acquire("next", 60) is not None

    asyncio.run(scenario())
    gc.collect()


def test_a_replica_that_never_started_stops(store: Store) -> None:
    asyncio.run(deployment.Rollout.func_or_class.__del__(SimpleNamespace()))


# ---- windows


def test_a_window_counts_each_report_once_whenever_it_came(store: Store) -> None:
    store.create(Rollout("r", "a", {}, {}), Transition("", "", ""))
    now = time.time()
    # Longer than what is read at once.
    since = now - 2000
    reports = [report("r", role, int(now) - 2010 + 5 * i, i) for i in range(402) for role in ("canary", "stable")]
    in_window = [r for r in reports if r.bucket > int(since)]
    store.add_figures(reports[:500])
    window = Window(since, now)
    counted = sum(r in in_window for r in reports[:500]) // 2
    assert [side.calls for side in window.read(store, "r", now)] == [counted] * 2
    # What a gateway had kept while the store was away.
    store.add_figures(reports[500:])
    beside = window.copy()
    for later_s in (31, 32, 40):
        assert [side.calls for side in window.read(store, "r", now + later_s)] == [len(in_window) // 2] * 2
    assert [side.calls for side in beside.read(store, "r", now + 40)] == [len(in_window) // 2] * 2
    late = report("r", "canary", int(now) + 35, 1000)
    store.add_figures([late])
    canary, stable = window.read(store, "r", now + 41)
    assert (canary.calls, stable.calls) == (len(in_window) // 2 + 1, len(in_window) // 2)
    assert window.read(store, "r", now + 41)[0].calls == canary.calls


def test_a_report_that_is_very_late_is_counted_where_windows_are_kept(store: Store) -> None:
    async def scenario() -> None:
        controller = await heard(store)
        rollout = await start(controller, **JUDGED)
        await ticks_until(controller, lambda: store.get(rollout).state["weight"] == 25)
        state = State.from_json(store.get(rollout).state)
        # As though the weight had been there for long.
        earlier = replace(state, window_from=state.window_from - 500)
        document = RolloutDocument.model_validate(store.get(rollout).spec)
        looks, bucket = controller._looks, int(earlier.window_from) + 100

        async def canary_calls() -> int:
            await looks.look(rollout, document, earlier, 0.0, 10.0)
            return looks.figures(rollout, earlier.window_from)[0].calls

        def news(seq: int) -> News:
            late = report(rollout, "canary", bucket, seq, 40)
            return News("g", deployed(settings(ROUTES)), reports=(late,))

        await controller.exchange(news(1))
        assert await canary_calls() == 40
        await controller.exchange(news(2))
        assert await canary_calls() == 80

    asyncio.run(scenario())


def test_a_window_reads_settled_buckets_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.create(Rollout("r", "a", {}, {}), Transition("", "", ""))
    now = time.time()
    store.add_figures([report("r", "canary", int(now) - 5 * i, i) for i in range(1, 200)])
    took = counted_reads(store, monkeypatch)
    window = Window(now - 1000, now)
    for i in range(5):
        assert window.read(store, "r", now + i)[0].calls == 199
    assert sum(took) < 199 + 4 * 10


def test_a_window_counts_calls_after_the_clock_was_set_back(store: Store) -> None:
    store.create(Rollout("r", "a", {}, {}), Transition("", "", ""))
    now = time.time()
    window = Window(now - 1000, now)
    store.add_figures([report("r", "canary", int(now) - 900 + 5 * i, i) for i in range(180)])
    assert window.read(store, "r", now + 40)[0].calls == 180
    # Ten minutes back, into buckets that there are already, and on from there.
    for i in range(1, 130):
        later = now - 600 + 5 * i
        store.add_figures([report("r", "canary", int(later), 1000 + i)])
        assert window.read(store, "r", later)[0].calls == 180 + i


def test_a_failing_canary_is_found_although_the_clock_was_set_back(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TICK_S", 0.01)
    clock, back_s = time.time, 0.0
    monkeypatch.setattr(module.time, "time", lambda: clock() - back_s)

    async def scenario() -> None:
        nonlocal back_s
        controller = await heard(store)
        running = asyncio.create_task(controller.run())

        async def until(condition: Callable[[], Any]) -> None:
            deadline = time.monotonic() + 20
            while not condition():
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)

        judged = await start(controller, **JUDGED)
        await until(lambda: store.get(judged).state["step"] == 1)
        back_s = 3600
        await until(lambda: store.get(judged).state["window_from"] < time.time())
        failing(store, judged)
        await until(lambda: store.get(judged).state["streaks"])
        failing(store, judged)
        await until(lambda: status(store, judged) == "rolled_back")
        running.cancel()

    asyncio.run(scenario())


def test_figures_of_a_finished_rollout_are_added_up_once_however_often_they_are_shown(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = time.time() - 1000
    state = State("rolled_back", 1, 0.0, since=begun + 900, window_from=begun).to_json()
    spec = {"route": "a", "stable": "stable", "canary": "canary", **JUDGED}
    for i in range(20):
        store.create(Rollout(f"r{i}", "a", spec, state, finished=True), Transition("none", "rolled back", ""))
        store.add_figures([report(f"r{i}", "canary", int(begun) + 1 + 5 * n, n) for n in range(100)])
    took = counted_reads(store, monkeypatch)

    async def scenario() -> None:
        controller = await heard(store)

        async def calls(rollout: str) -> int:
            return int((await controller.show(rollout)).body["figures"]["canary"]["calls"])

        assert [await calls("r0") for _ in range(5)] == [100] * 5
        assert sum(took) == 100
        # After so many others it isn't known any more.
        for i in range(20):
            assert await calls(f"r{i}") == 100
        took.clear()
        assert await calls("r0") == 100
        assert sum(took) == 100

    asyncio.run(scenario())


def test_figures_that_were_judged_are_not_read_again_to_be_shown(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEASE_S", 3600)

    async def scenario() -> None:
        controller = await heard(store)
        rollout = await start(controller, **JUDGED)
        await ticks_until(controller, lambda: store.get(rollout).state["step"] == 1)
        bucket = int(store.get(rollout).state["window_from"]) + 1
        store.add_figures([report(rollout, "stable", bucket + i, i) for i in range(100)])
        # So much later that all of it is settled.
        clock = time.time
        monkeypatch.setattr(module.time, "time", lambda: clock() + 600)
        took = counted_reads(store, monkeypatch)
        await ticks_until(controller, lambda: 100 in took and took[-1] == 0)
        took.clear()
        assert await act(controller, rollout, "abort") is None
        shown = (await controller.show(rollout)).body
        assert (shown["status"], shown["figures"]["stable"]["calls"]) == ("aborted", 100)
        assert not any(took)

    asyncio.run(scenario())


def test_clicks_after_the_clock_was_set_back_are_judged(store: Store) -> None:
    document = RolloutDocument.model_validate(
        {"route": "a", "stable": "stable", "canary": "canary", "guards": {"ctr_at_1": {}}}
    )
    now = time.time() // 60 * 60
    store.create(Rollout("r", "a", {}, {}), Transition("", "", ""))
    store.add_searches([Search(f"q{i}", "r", "canary", now - 60 * i) for i in range(20)])
    store.add_events([Event(f"e{i}", f"q{i}", "impression") for i in range(20)])
    # Of minutes that are long past or lie far ahead all is known; those about now may get more.
    for at, complete in ((now, 16), (now - 600, 15), (now - 7200, 20)):
        assert len(clicks(store, "r", document, 0, at)) == complete
    # From whole minutes on.
    assert [len(clicks(store, "r", document, now - 300 - s, now - 7200)) for s in (0, 1, 60)] == [6, 6, 7]


# ---- what is in force


def test_a_controller_that_was_frozen_gives_gateways_no_old_weights(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        frozen, other = await heard(store), await heard(store)
        rollout = await start(frozen, **JUDGED)
        await ticks_until(frozen, lambda: store.get(rollout).state["weight"] == 25)
        await frozen.close()
        await ticks_until(other, lambda: other._lease is not None)
        assert await act(other, rollout, "abort") is None
        news = News("g", deployed(settings(ROUTES)))
        assert (await other.exchange(news)).by_route == {}
        later = time.monotonic() + module._SPLITS_S
        monkeypatch.setattr(module.time, "monotonic", lambda: later + 1)
        assert (await frozen.exchange(news)).by_route == {}

    asyncio.run(scenario())


def test_without_a_store_gateways_hear_what_was_in_force_when_it_was_read_last(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        controller = await heard(store)
        rollout = await start(controller, **JUDGED)
        await ticks_until(controller, lambda: store.get(rollout).state["weight"] == 25)
        news = News("g", deployed(settings(ROUTES)))
        assert [split.weight for split in (await controller.exchange(news)).by_route["a"]] == [25]
        (tmp_path / "rollouts.db").rename(tmp_path / "away.db")
        later = time.monotonic() + module._SPLITS_S + 1
        monkeypatch.setattr(module.time, "monotonic", lambda: later)
        told = await controller.exchange(news)
        assert (told.old, [split.weight for split in told.by_route["a"]]) == (True, [25])
        # Who has read nothing says nothing.
        away = open_store(f"sqlite://{tmp_path}/away.db/below")
        with pytest.raises(StoreUnavailable):
            await Controller(away, all_ready).exchange(news)
        (tmp_path / "away.db").rename(tmp_path / "rollouts.db")
        assert not (await controller.exchange(news)).old

    asyncio.run(scenario())


def test_weights_go_out_though_what_was_counted_cannot_be_stored(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(reports: Any) -> int:
        raise StoreUnavailable(store.url, "database is locked", "wait")

    async def scenario() -> None:
        controller = await heard(store)
        rollout = await start(controller, **JUDGED)
        await ticks_until(controller, lambda: store.get(rollout).state["weight"] == 25)
        news = News("g", deployed(settings(ROUTES)), reports=(report(rollout, "canary", int(time.time()), 1),))
        assert (await controller.exchange(news)).stored
        monkeypatch.setattr(store, "add_figures", full)
        assert await act(controller, rollout, "abort") is None
        told = await controller.exchange(news)
        assert (told.by_route, told.stored) == ({}, False)

    asyncio.run(scenario())


def test_events_that_are_quicker_than_the_news_of_their_search_count(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_EVENTS_AGAIN_S", 0.0)

    async def scenario() -> None:
        controller = await heard(store)
        rollout = await start(controller, **JUDGED)
        await ticks_until(controller, lambda: store.get(rollout).state["weight"] == 25)
        early = [Event("e1", "q1", "impression"), Event("e2", "q2", "click", 1)]
        assert (await controller.events(early)).body["unknown"] == 2
        search = Search("q1", rollout, "canary", time.time())
        await controller.exchange(News("g", deployed(settings(ROUTES)), searches=(search,)))
        await controller.tick()
        assert [(c.role, c.impressions) for c in store.event_counts(rollout)] == [("canary", 1)]
        assert not controller._early
        for i in range(3):
            await controller.events([Event(f"s{i}-{j}", "nobody's", "click") for j in range(600)])
        for left in (1, 0):
            await controller.tick()
            assert len(controller._early) == left
        for i in range(30):
            await controller.events([Event(f"e{i}-{j}", "nobody's", "click") for j in range(1000)])
        assert sum(len(events) for _, events in controller._early) == module._EVENTS_WAITING

    asyncio.run(scenario())


@pytest.mark.parametrize("promoted", [False, True])
def test_a_rollout_ends_when_its_canary_is_in_no_settings_any_more(
    promoted: bool, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        controller = await heard(store)
        rollout = await start(controller, **(UP if promoted else JUDGED))
        begun = "promoted" if promoted else "step"
        await ticks_until(controller, lambda: status(store, rollout) == begun)
        without = deployed(settings(ROUTES))
        del without.pipelines["canary"]
        # Settings that are being changed are no reason yet, nor are those of a gateway without the route.
        other = deployed(settings(["other"]))
        del other.pipelines["canary"]
        monkeypatch.setattr(controller, "_deployed", {})
        await controller.exchange(News("g", other))
        assert not controller._gone(store.get(rollout))
        assert not controller._gone_since
        for known in (without, deployed(settings(ROUTES)), without):
            await controller.exchange(News("g", known))
            await controller.tick()
            assert status(store, rollout) == begun
        monkeypatch.setattr(controller, "_gone_since", {rollout: time.monotonic() - module._GONE_S - 1})
        await controller.exchange(News("g", without))
        await ticks_until(controller, lambda: not controller._splits.by_route.get("a"))
        assert status(store, rollout) == ("promoted" if promoted else "rolled_back")
        assert bool(store.get(rollout).state.get("retired")) is promoted
        assert "the pipeline 'canary' any more" in store.history(rollout)[-1].reason
        # What comes under its name some day gets no calls by it.
        await controller.exchange(News("g", deployed(settings(ROUTES))))
        await controller.tick()
        assert not controller._splits.by_route.get("a")

    asyncio.run(scenario())


def test_a_promotion_stays_in_force_however_many_rollouts_come_after_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_NEW", 3)

    async def scenario() -> None:
        controller = await heard(store)
        promoted = await start(controller, "a", **UP)
        await ticks_until(controller, lambda: status(store, promoted) == "promoted")
        over_it = await start(controller, "a", stable="canary", canary="cold", steps=UP["steps"], guards=GUARDS)
        await ticks_until(controller, lambda: status(store, over_it) == "promoted")
        under_way = await start(controller, "b", **JUDGED)
        await ticks_until(controller, lambda: store.get(under_way).state["weight"] == 25)
        for i in range(10):
            rolled_back = State("rolled_back", 0).to_json()
            ended = Rollout(f"r{i}", "c", store.get(promoted).spec, rolled_back, finished=True)
            store.create(ended, Transition("none", "rolled back", ""))
        await controller.tick()
        for one in (controller, await heard(store)):
            splits = (await one.exchange(News("g", deployed(settings(ROUTES))))).by_route
            assert [split.rollout for split in splits["a"]] == [promoted, over_it]
            assert [split.rollout for split in splits["b"]] == [under_way]
            assert "c" not in splits

    asyncio.run(scenario())


def test_a_promotion_under_another_one_cannot_be_undone_before_that(store: Store) -> None:
    async def scenario() -> None:
        controller = await heard(store)
        lower = await start(controller, **UP)
        await ticks_until(controller, lambda: status(store, lower) == "promoted")
        upper = await start(controller, stable="canary", canary="cold", steps=UP["steps"], guards=GUARDS)
        await ticks_until(controller, lambda: status(store, upper) == "promoted")
        refusal = await act(controller, lower, "undo")
        assert refusal == f"{upper!r} was promoted over this rollout's canary; undo that first"
        assert await act(controller, upper, "undo") is None
        assert await act(controller, lower, "undo") is None
        await controller.tick()
        assert (await controller.exchange(News("g", deployed(settings(ROUTES))))).by_route == {}

    asyncio.run(scenario())


def test_promotions_that_swap_back_and_forth_can_be_undone_the_last_one_first(store: Store) -> None:
    async def scenario() -> None:
        controller = await heard(store)
        promoted: list[str] = []
        for stable, canary in (("stable", "canary"), ("canary", "stable"), ("stable", "canary")):
            promoted.append(
                await start(controller, stable=stable, canary=canary, steps=UP["steps"], guards=GUARDS)
            )
            await ticks_until(controller, lambda: status(store, promoted[-1]) == "promoted")
        for lower, upper in ((0, 1), (1, 2)):
            refusal = await act(controller, promoted[lower], "undo")
            assert refusal == f"{promoted[upper]!r} was promoted over this rollout's canary; undo that first"
        for rollout in reversed(promoted):
            assert await act(controller, rollout, "undo") is None

    asyncio.run(scenario())


@pytest.mark.parametrize("dies", [False, True])
def test_weights_that_name_the_canary_end_a_promotion_and_the_one_that_took_it_back(
    dies: bool, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipelines = deployed(settings(ROUTES)).pipelines

    async def serving(controller: Controller, weighted: str) -> str:
        news = News("g", Deployed(pipelines, {"a": (weighted,)}))
        await controller.exchange(news)
        await controller.tick()
        splits = (await controller.exchange(news)).by_route.get("a", ())
        return place(splits, weighted, "ann")[0]

    async def scenario() -> None:
        controller = await heard(store)
        promoted: list[str] = []
        for stable, canary in (("stable", "canary"), ("canary", "stable")):
            promoted.append(
                await start(controller, stable=stable, canary=canary, steps=UP["steps"], guards=GUARDS)
            )
            await ticks_until(controller, lambda: status(store, promoted[-1]) == "promoted")
        assert await serving(controller, "stable") == "stable"
        if dies:
            # Between the one's end and the other's.
            commit, commits = store.commit, []

            def dying(*arguments: Any) -> Rollout:
                commits.append(arguments)
                if len(commits) > 1:
                    raise StoreUnavailable(store.url, "is away", "wait")
                return commit(*arguments)

            monkeypatch.setattr(store, "commit", dying)
            with pytest.raises(StoreUnavailable):
                await serving(controller, "canary")
            monkeypatch.setattr(store, "commit", commit)
            await controller.close()
            controller = Controller(store, all_ready)
        assert await serving(controller, "canary") == "canary"
        assert all(store.get(rollout).state["retired"] for rollout in promoted)
        for weighted in ("stable", "canary"):
            assert await serving(controller, weighted) == weighted
        reasons = [store.history(rollout)[-1].reason for rollout in promoted]
        assert reasons == [
            "route 'a' sends no calls to 'stable' any more",
            f"it took {promoted[0]!r} back, from which the weights of route 'a' have taken over",
        ]

    asyncio.run(scenario())


def test_a_promotion_that_overrides_weights_for_both_sides_is_told_once(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        controller = await heard(store)

        async def deploy(*weighted: str) -> dict[str, Any]:
            news = News("g", Deployed(deployed(settings(ROUTES)).pipelines, {"a": weighted}))
            await controller.exchange(news)
            for _ in range(3):
                await controller.tick()
            return (await controller.exchange(news)).by_route

        rollout = await start(controller, **UP)
        await ticks_until(controller, lambda: status(store, rollout) == "promoted")
        assert list(await deploy("stable")) == ["a"]
        assert not caplog.records
        assert list(await deploy("stable", "canary")) == ["a"]
        (told,) = caplog.records
        assert told.getMessage() == (
            f"route 'a' has weights for 'stable' and 'canary', but rollout {rollout}, promoted, "
            f"sends all calls of 'stable' to 'canary'; for both: serve-app rollout undo {rollout}"
        )
        assert await act(controller, rollout, "undo") is None
        assert await deploy("stable", "canary") == {}
        assert len(caplog.records) == 1

    with caplog.at_level(logging.WARNING, logger="ray.serve"):
        asyncio.run(scenario())


def test_what_gets_calls_is_known_at_once_after_a_promotion(store: Store) -> None:
    async def scenario() -> None:
        controller, other = await heard(store), await heard(store)
        first = await start(controller, **UP)
        await other.tick()
        await other.close()
        await ticks_until(controller, lambda: status(store, first) == "promoted")
        # Which this one hasn't looked for since.
        reply = await other.start({"route": "a", "stable": "stable", "canary": "cold"}, "1", "ann")
        assert reply.error == "conflict"
        assert "those go to canary" in reply.message
        await start(other, stable="canary", canary="cold")

    asyncio.run(scenario())


def test_a_route_may_be_called_as_a_model_on_the_hub_is(store: Store) -> None:
    async def scenario() -> None:
        for route in ("Qwen/Qwen3-Reranker-0.6B", "a" * 128):
            controller = Controller(store, all_ready)
            await controller.exchange(News("g", deployed(settings([route]))))
            rollout = await start(controller, route, **UP)
            assert "/" not in rollout
            assert store.get(rollout).route == route
            await ticks_until(controller, lambda rollout=rollout: status(store, rollout) == "promoted")
            await controller.close()

    asyncio.run(scenario())


def test_a_store_that_forgot_rollouts_stops_nobody(store: Store, tmp_path: Path) -> None:
    async def scenario() -> None:
        controller = await heard(store)
        rollout = await start(controller, **JUDGED)
        await ticks_until(controller, lambda: store.get(rollout).state["step"] == 1)
        # As a Redis without an append-only file does when it starts anew.
        controller.store = empty = open_store(f"sqlite://{tmp_path}/empty.db")
        controller._lease = None
        await controller.tick()
        after = await start(controller, **UP)
        await ticks_until(controller, lambda: status(empty, after) == "promoted")
        empty.close()

    asyncio.run(scenario())
