"""The gateway's side of rollouts: no client pays for a canary, everything is counted once, and weights stay in
force whatever becomes of the controller."""

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from ray.exceptions import RayActorError

from serve_app.access import ADMIN_KEY
from serve_app.config import GatewaySettings
from serve_app.gateway import fleet
from serve_app.gateway import rollouts as module
from serve_app.gateway.app import create_app
from serve_app.gateway.canary import _outlasts
from serve_app.gateway.deadline import Deadline
from serve_app.gateway.pipeline import Ranking, StageFailure, StageReport
from serve_app.gateway.rollouts import Rollouts, _Latencies
from serve_app.gateway.service import Service
from serve_app.reranker.messages import PromptTooLongError, ScoreRequest, ScoreResult
from serve_app.rollout.controller import Controller
from serve_app.rollout.figures import Figures
from serve_app.rollout.messages import News, Reply, Splits
from serve_app.rollout.split import Place, Split
from serve_app.rollout.store import open_store
from serve_app.status import AppStatus
from tests.processes.rollout_process import until
from tests.unit.gateway_double import DOCUMENTS, FleetDouble

TIMEOUT_MS = 2000
SETTINGS: dict[str, Any] = {
    "recall": "catalogue",
    "rollout": "rollouts",
    "variants": {"old": {"pairs_per_call": 100}, "new": {"pairs_per_call": 100}},
    "pipelines": {
        "stable": {"recall_k": 10, "stages": [{"variant": "old"}]},
        "canary": {"recall_k": 10, "stages": [{"variant": "new"}]},
    },
    "routes": {"default": {"weights": {"stable": 100}, "timeout_ms": TIMEOUT_MS}},
}
Behaviour = Callable[[ScoreRequest, float], Awaitable[None]]


def split(weight: float = 100, shadow: float = 0.0, rollout: str = "r1", live: bool = True) -> Split:
    return Split(rollout, "default", "stable", "canary", weight, shadow, live)


class Fleet(FleetDouble):
    """`does` says what a variant does before it answers. `news` is what the rollout application heard, `questions`
    what operators and events asked it, with how long they wait; events are answered once `stored` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.does: dict[str, Behaviour] = {}
        self.marked: list[tuple[str, bool, int]] = []
        self.at_once = Counter[str]()
        self.most_at_once = Counter[str]()
        self.splits = Splits()
        self.news: list[News] = []
        self.away: Callable[[], Awaitable[None]] | None = None
        self.questions: list[tuple[str, float]] = []
        self.stored = asyncio.Event()

    async def score(
        self, variant: str, request: ScoreRequest, pairs_per_call: int, timeout_s: float, **more: Any
    ) -> list[ScoreResult]:
        self.marked.append((variant, more.get("mirrored", False), request.priority))
        self.at_once[variant] += 1
        self.most_at_once |= self.at_once
        try:
            if variant in self.does:
                await self.does[variant](request, timeout_s)
            return await super().score(variant, request, pairs_per_call, timeout_s, **more)
        finally:
            self.at_once[variant] -= 1

    async def ask(self, app: str, method: str, *arguments: Any, timeout_s: float) -> Any:
        if method != "exchange":
            self.questions.append((method, timeout_s))
            if method == "events":
                await self.stored.wait()
            return Reply()
        (news,) = arguments
        self.news.append(news)
        splits = self.splits
        if self.away is not None:
            await self.away()
        return splits


class Gateway:
    """HTTP in process, on the loop of the test."""

    def __init__(self, *splits: Split) -> None:
        self.fleet = Fleet()
        self.fleet.splits = Splits({"default": splits} if splits else {})
        self.service = Service(self.fleet)
        self.service.configure(SETTINGS)
        self.rollouts = self.service.rollouts
        transport = httpx.ASGITransport(app=create_app(self.service))
        self.client = httpx.AsyncClient(transport=transport, base_url="http://gateway")

    async def __aenter__(self) -> "Gateway":
        self.rollouts.configure(self.service.settings)
        await until(lambda: self.rollouts.of("default") == self.fleet.splits.by_route.get("default", ()), "splits")
        return self

    async def __aexit__(self, *_: object) -> None:
        await stop(self.rollouts)
        await self.client.aclose()

    async def rerank(self, **more: Any) -> httpx.Response:
        body = {"model": "default", "query": "cats", "documents": DOCUMENTS, **more}
        return await self.client.post("/v1/rerank", json=body)

    async def search(self, query: str = "cats") -> httpx.Response:
        return await self.client.post("/v1/search", json={"query": query, "route": "default"})

    async def score(self) -> httpx.Response:
        body = {"model": "default", "text_1": "cats", "text_2": DOCUMENTS}
        return await self.client.post("/v1/score", json=body)

    async def counted(self) -> dict[str, Figures]:
        """All that was ever sent."""
        heard = len(self.fleet.news)
        await until(lambda: len(self.fleet.news) > heard + 1, "what was counted")
        return counted(self.fleet.news)


async def stop(rollouts: Rollouts) -> None:
    assert rollouts._running is not None
    rollouts._running.cancel()
    await asyncio.gather(rollouts._running, *rollouts._mirrored, return_exceptions=True)


def counted(news: list[News]) -> dict[str, Figures]:
    """By side, each report once."""
    sides = {"canary": Figures(), "stable": Figures()}
    once = {(r.source, r.seq, r.rollout_id, r.role, r.bucket): r for one in news for r in one.reports}
    for report in once.values():
        sides[report.role] = sides[report.role].merge(Figures.from_json(report.value))
    return sides


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_EVERY_S", 0.01)


def raising(error: Callable[[], Exception]) -> Behaviour:
    async def does(request: ScoreRequest, timeout_s: float) -> None:
        raise error()

    return does


async def hangs(request: ScoreRequest, timeout_s: float) -> None:
    await asyncio.sleep(timeout_s)
    raise StageFailure("timeout", "did not answer")


BROKEN: dict[str, Behaviour] = {
    "no-replica": raising(lambda: StageFailure("unavailable", "is not deployed")),
    "raises": raising(lambda: StageFailure("error", "failed with ValueError")),
    "overloaded": raising(lambda: StageFailure("overloaded", "has too many calls waiting")),
    "hangs": hangs,
    "a-fault-of-ours": raising(lambda: KeyError("unexpected")),
    "refuses": raising(lambda: PromptTooLongError("9000 tokens")),
}


# ---- answered by stable


@pytest.mark.parametrize("path", ["rerank", "search", "score"])
@pytest.mark.parametrize("how", BROKEN)
def test_what_the_canary_cannot_answer_stable_answers_in_time(how: str, path: str) -> None:
    async def scenario() -> None:
        async with Gateway(split()) as gateway:
            gateway.fleet.does["new"] = BROKEN[how]
            began = time.monotonic()
            answer = await getattr(gateway, path)()
            assert time.monotonic() - began < TIMEOUT_MS / 1e3
            assert answer.status_code == 200, answer.text
            meta = answer.json()["meta"]
            assert (meta["pipeline"], meta["why"]) == ("stable", "fallback")
            assert meta["rollout"] == {"id": "r1", "role": "stable"}
            assert "degraded" not in meta
            figures = await gateway.counted()
            # By kind, as a stable call is counted: a search or a list to rank is answered without the reranker.
            degraded = path != "score" and how != "a-fault-of-ours"
            canary = figures["canary"]
            assert (canary.calls, canary.errors, canary.degraded) == (1, not degraded, degraded)
            assert figures["stable"].calls == 0
            # Nobody saw the canary's answer, so no click is its own.
            assert not any(news.searches for news in gateway.fleet.news)

    asyncio.run(scenario())


@pytest.mark.parametrize("weight", [100, 1e-9])
def test_nothing_is_done_in_place_of_a_canary_that_fails(weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("serve_app.gateway.lexical.bm25", lambda query, documents: asked.append(query) or [])

    async def scenario() -> None:
        async with Gateway(split(weight, shadow=1.0)) as gateway:
            gateway.fleet.does["new"] = BROKEN["raises"]
            assert "degraded" not in (await gateway.rerank()).json()["meta"]
            await until(lambda: not gateway.rollouts._mirrored, "the mirrored call")
            assert (await gateway.counted())["canary"].asked == (weight == 100)

    asyncio.run(scenario())
    assert not asked


def test_calls_that_ask_no_model_say_nothing_of_it() -> None:
    async def scenario() -> None:
        async with Gateway(split(shadow=1.0)) as gateway:
            gateway.fleet.recalls = lambda request: []
            assert (await gateway.search()).json()["results"] == []
            place = Place(split(), "canary")
            assert gateway.rollouts.wants_computed(place), "for none has been computed"
            canary = (await gateway.counted())["canary"]
            assert (canary.calls, canary.asked, canary.answered) == (1, 0, 0)

    asyncio.run(scenario())


@pytest.mark.parametrize("path", ["search", "rerank"])
@pytest.mark.parametrize("how", ["no-stages", "another-script"])
def test_what_asks_no_model_by_plan_is_judged_like_any_answer(how: str, path: str) -> None:
    settings = json.loads(json.dumps(SETTINGS))
    if how == "no-stages":
        del settings["pipelines"]["stable"]["stages"]
    else:
        settings["variants"]["old"]["scripts"] = ["Cyrillic"]

    async def scenario() -> None:
        async with Gateway(split(0)) as gateway:
            gateway.service.configure(settings)
            assert (await getattr(gateway, path)()).status_code == 200
            stable = (await gateway.counted())["stable"]
            assert (stable.calls, stable.asked, stable.answered) == (1, 1, 1)
            assert not gateway.rollouts.wants_computed(Place(split(0), "stable"))
            # And a canary beside it.
            gateway.fleet.splits = Splits({"default": (split(100),)})
            await until(lambda: gateway.rollouts.of("default") == (split(100),), "the canary's weight")
            gateway.fleet.does["new"] = BROKEN["raises"]
            assert (await getattr(gateway, path)()).json()["meta"]["why"] == "fallback"
            canary = (await gateway.counted())["canary"]
            assert (canary.asked, canary.degraded) == (1, 1)

    asyncio.run(scenario())


def test_a_stable_side_that_fails_is_forced_to_compute_no_more_often() -> None:
    async def scenario() -> None:
        async with Gateway(split(0)) as gateway:
            gateway.fleet.does["old"] = BROKEN["no-replica"]
            assert (await gateway.rerank()).json()["meta"]["degraded"]
            assert not gateway.rollouts.wants_computed(Place(split(0), "stable"))

    asyncio.run(scenario())


@pytest.mark.parametrize(("documents", "mirrored"), [(DOCUMENTS[:1], 0), (DOCUMENTS[:2], 1)])
def test_an_order_of_one_document_agrees_with_nothing(documents: list[str], mirrored: int) -> None:
    async def scenario() -> None:
        async with Gateway(split(0, shadow=1.0)) as gateway:
            assert (await gateway.rerank(documents=documents)).status_code == 200
            await until(lambda: not gateway.rollouts._mirrored, "the mirrored call")
            assert (await gateway.counted())["canary"].mirror.calls == mirrored

    asyncio.run(scenario())


def test_a_whole_answer_of_the_canary_is_its_own() -> None:
    async def scenario() -> None:
        async with Gateway(split()) as gateway:
            meta = (await gateway.search()).json()["meta"]
            assert (meta["pipeline"], meta["why"], meta["rollout"]["role"]) == ("canary", "split", "canary")
            figures = await gateway.counted()
            canary = figures["canary"]
            assert (canary.calls, canary.errors, canary.degraded, canary.answered) == (1, 0, 0, 1)
            (search,) = [search for news in gateway.fleet.news for search in news.searches]
            assert (search.rollout_id, search.role) == ("r1", "canary")

    asyncio.run(scenario())


@pytest.mark.parametrize("weight", [0, 100])
def test_what_the_caller_got_wrong_counts_against_nobody(weight: float) -> None:
    async def scenario() -> None:
        async with Gateway(split(weight)) as gateway:
            gateway.fleet.does = {"old": BROKEN["refuses"], "new": BROKEN["refuses"]}
            answer = await gateway.rerank()
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "prompt_too_long")
            figures = await gateway.counted()
            assert (figures["canary"].calls, figures["stable"].calls) == (0, 0)

    asyncio.run(scenario())


@pytest.mark.parametrize("how", ["no-replica", "a-fault-of-ours"])
@pytest.mark.parametrize(("weight", "side", "other"), [(0, "stable", "canary"), (100, "canary", "stable")])
def test_what_nobody_can_answer_counts_on_the_side_where_it_was_placed(
    how: str, weight: float, side: str, other: str
) -> None:
    async def scenario() -> None:
        async with Gateway(split(weight)) as gateway:
            gateway.fleet.does = {"old": BROKEN[how], "new": BROKEN[how]}
            answer = await gateway.score()
            assert answer.status_code >= 500
            figures = await gateway.counted()
            assert (figures[side].calls, figures[side].errors) == (1, 1)
            assert figures[other].calls == 0

    asyncio.run(scenario())


async def never(request: ScoreRequest, timeout_s: float) -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("weight", "waits_for", "side", "other"),
    [(0, "old", "stable", "canary"), (100, "new", "canary", "stable"), (100, "old", "canary", "stable")],
    ids=["stable", "canary", "stable-in-its-place"],
)
@pytest.mark.parametrize("slow_s", [0, 60, None])
def test_a_client_that_waited_and_left_counts_on_the_side_where_it_was_placed(
    weight: float, waits_for: str, side: str, other: str, slow_s: float | None
) -> None:
    async def scenario() -> None:
        async with Gateway(split(weight)) as gateway:
            gateway.rollouts._latencies["r1"] = _Latencies(slow_s=slow_s)
            gateway.fleet.does = {"new": BROKEN["raises"], waits_for: never}
            call = asyncio.create_task(gateway.search())
            await until(lambda: gateway.fleet.at_once[waits_for], "the call")
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            figures = await gateway.counted()
            found = (figures[side].calls, figures[side].errors, figures[side].hung_up, figures[side].degraded)
            if weight and waits_for == "old":
                assert found == (1, 0, 0, 1), "the canary had failed before, however long the client stays"
            else:
                assert found == ((1, 1, 1, 0) if slow_s == 0 else (0, 0, 0, 0))
            assert figures[other].calls == 0

    asyncio.run(scenario())


def test_a_mirrored_call_that_is_stopped_counts_nowhere() -> None:
    async def scenario() -> None:
        async with Gateway(split(0, shadow=1.0)) as gateway:
            gateway.fleet.does["new"] = never
            assert (await gateway.search()).status_code == 200
            await until(lambda: gateway.fleet.at_once["new"], "the mirrored call")
            for mirrored in tuple(gateway.rollouts._mirrored):
                mirrored.cancel()
            await until(lambda: not gateway.rollouts._mirrored, "its end")
            canary = (await gateway.counted())["canary"]
            assert (canary.calls, canary.mirror.calls) == (0, 0)

    asyncio.run(scenario())


def test_an_answer_of_stable_that_a_canary_would_not_have_had_time_for_is_late_in_the_figures_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Rollouts, "trial_deadline", lambda self, split, deadline: Deadline.after(0))

    async def scenario() -> None:
        async with Gateway(split(0, shadow=1.0)) as gateway:
            answer = await gateway.search()
            assert (answer.status_code, "degraded" in answer.json()["meta"]) == (200, False)
            await until(lambda: not gateway.rollouts._mirrored, "the mirrored call")
            figures = await gateway.counted()
            stable = figures["stable"]
            assert (stable.calls, stable.asked, stable.degraded, stable.late, stable.answered) == (1, 1, 0, 1, 0)
            assert (figures["canary"].mirror.calls, figures["canary"].mirror.errors) == (1, 0)
            # How long stable takes is known all the same.
            assert gateway.rollouts._latencies["r1"].last

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("took_ms", "searched", "late"),
    [
        ((100, 440, 440), False, False),
        # A stage gets its share of what is left: a third, a half, all.
        ((400, 300, 300), False, True),
        ((100, 510, 300), False, True),
        ((100, 400, 510), False, True),
        # Recall gets all there is, and what it leaves is shared.
        ((700, 140, 150), True, False),
        ((700, 160, 130), True, True),
    ],
)
def test_a_stage_of_stable_is_late_where_a_canarys_would_have_been_cut_off(
    took_ms: tuple[float, ...], searched: bool, late: bool
) -> None:
    reports = [StageReport(str(i), took_ms=took) for i, took in enumerate(took_ms)]
    reports.insert(1, StageReport("skipped", took_ms=0, skipped="another script"))
    assert _outlasts(Ranking([], [], [], [], reports), 1.0 + 1e-9, searched) is late


def test_where_both_fail_a_rerank_call_is_degraded_and_counts_against_the_canary() -> None:
    async def scenario() -> None:
        async with Gateway(split()) as gateway:
            gateway.fleet.does = {"old": BROKEN["raises"], "new": BROKEN["raises"]}
            answer = await gateway.rerank()
            assert answer.status_code == 200
            assert answer.json()["meta"]["degraded"]
            figures = await gateway.counted()
            canary = figures["canary"]
            assert (canary.calls, canary.errors, canary.degraded, figures["stable"].calls) == (1, 0, 1, 0)

    asyncio.run(scenario())


def test_a_degraded_answer_of_stable_is_counted_and_not_mirrored() -> None:
    async def scenario() -> None:
        async with Gateway(split(0, shadow=1.0)) as gateway:
            gateway.fleet.does["old"] = BROKEN["raises"]
            answer = await gateway.rerank()
            assert answer.json()["meta"]["why"] == "split"
            figures = await gateway.counted()
            stable = figures["stable"]
            assert (stable.calls, stable.errors, stable.degraded) == (1, 0, 1)
            assert figures["canary"].mirror.calls == 0

    asyncio.run(scenario())


def test_a_promoted_canary_answers_for_itself() -> None:
    async def scenario() -> None:
        async with Gateway(split(live=False)) as gateway:
            gateway.fleet.does["new"] = BROKEN["raises"]
            meta = (await gateway.rerank()).json()["meta"]
            assert (meta["pipeline"], meta["why"]) == ("canary", "split")
            assert meta["degraded"]
            figures = await gateway.counted()
            assert (figures["canary"].calls, figures["stable"].calls) == (0, 0)

    asyncio.run(scenario())


def test_a_trial_leaves_stable_the_time_that_it_needs() -> None:
    place = Place(split(), "stable")
    clock_s = 100.0

    def trial_s(rollouts: Rollouts, left_s: float) -> float:
        deadline = Deadline(clock_s + left_s + 0.1, 0.1, lambda: clock_s)
        return rollouts.trial_deadline(place.split, deadline).remaining_s()

    unknown = Rollouts(FleetDouble().ask)
    assert trial_s(unknown, 2.0) == pytest.approx(1.0)
    assert trial_s(unknown, 0.0) == trial_s(unknown, -1.0) == 0

    for took_s, left_s, expected_s in (
        (0.3, 2.0, 1.4),  # Twice what stable's slow calls take.
        (0.001, 2.0, 1.5),  # At least a quarter.
        (5.0, 2.0, 1.0),  # At most half.
    ):
        rollouts = Rollouts(FleetDouble().ask)
        for _ in range(40):
            rollouts.answered(place, "q", took_s)
        # Neither errors nor the canary's own time say how long stable takes.
        rollouts.answered(place, "q", None, error=True)
        rollouts.answered(Place(split(), "canary"), "q", 60.0)
        assert trial_s(rollouts, left_s) == pytest.approx(expected_s)


def test_a_call_goes_on_with_the_settings_that_it_came_with() -> None:
    async def scenario() -> None:
        async with Gateway(split()) as gateway:

            async def taken_away(request: ScoreRequest, timeout_s: float) -> None:
                without = json.loads(json.dumps(SETTINGS))
                del without["pipelines"]["canary"], without["variants"]["new"]
                gateway.service.configure(without)
                gateway.rollouts.configure(gateway.service.settings)
                gateway.fleet.splits = Splits()
                await until(lambda: not gateway.rollouts.of("default"), "splits that are gone")
                raise StageFailure("unavailable", "is not deployed")

            gateway.fleet.does["new"] = taken_away
            meta = (await gateway.rerank(timeout_ms=20_000)).json()["meta"]
            assert (meta["pipeline"], meta["why"]) == ("stable", "fallback")
            # And the next one with those that came.
            meta = (await gateway.rerank()).json()["meta"]
            assert (meta["pipeline"], meta["why"]) == ("stable", "split")

    asyncio.run(scenario())


@pytest.mark.parametrize("live", [True, False])
def test_a_gateway_that_has_not_heard_of_the_canary_yet_serves_stable(live: bool) -> None:
    async def scenario() -> None:
        unheard_of = Split("r1", "default", "stable", "next", 100, 1.0, live)
        async with Gateway(unheard_of) as gateway:
            for answer in (await gateway.rerank(), await gateway.search(), await gateway.score()):
                meta = answer.json()["meta"]
                assert (answer.status_code, meta["pipeline"], meta["why"]) == (200, "stable", "split")
                assert "rollout" not in meta
            assert not gateway.rollouts._mirrored

    asyncio.run(scenario())


# ---- mirrored


def test_a_part_of_stables_calls_is_mirrored(monkeypatch: pytest.MonkeyPatch) -> None:
    chances = iter([0.24, 0.26, 0.9, 0.0] * 2)
    monkeypatch.setattr(module, "random", SimpleNamespace(random=lambda: next(chances)))

    async def scenario() -> None:
        async with Gateway(split(0, shadow=0.25)) as gateway:
            for i in range(8):
                meta = (await gateway.rerank(query=f"cat {i}")).json()["meta"]
                assert (meta["pipeline"], meta["rollout"]["role"]) == ("stable", "stable")
                await until(lambda: not gateway.rollouts._mirrored, "mirrored calls")
            # They go behind live ones, and open no circuit breaker.
            assert Counter(gateway.fleet.marked) == {("old", False, 0): 8, ("new", True, 10): 4}
            figures = await gateway.counted()
            mirror = figures["canary"].mirror
            assert (figures["canary"].calls, figures["stable"].calls) == (0, 8)
            assert (mirror.calls, mirror.errors, mirror.top1) == (4, 0, 4)

    asyncio.run(scenario())


def test_few_mirrored_calls_are_under_way_at_once_and_none_is_waited_for() -> None:
    over = asyncio.Event()

    async def waits(request: ScoreRequest, timeout_s: float) -> None:
        await over.wait()

    async def scenario() -> None:
        async with Gateway(split(0, shadow=1.0)) as gateway:
            gateway.fleet.does["new"] = waits
            answers = await asyncio.gather(*(gateway.rerank(query=f"cat {i}") for i in range(20)))
            assert {answer.status_code for answer in answers} == {200}
            await until(lambda: gateway.fleet.at_once["new"] == 4, "mirrored calls")
            over.set()
            await until(lambda: not gateway.rollouts._mirrored, "the end of mirrored calls")
            assert gateway.fleet.most_at_once["new"] == 4
            # There is room again.
            await gateway.rerank()
            await until(lambda: not gateway.rollouts._mirrored, "another mirrored call")
            figures = await gateway.counted()
            mirror = figures["canary"].mirror
            assert (mirror.calls, mirror.errors, figures["stable"].calls) == (5, 0, 21)

    asyncio.run(scenario())


@pytest.mark.parametrize("path", ["search", "rerank", "score"])
def test_a_probe_that_asks_the_same_again_and_again_is_mirrored_once(path: str) -> None:
    async def scenario() -> None:
        async with Gateway(split(0, shadow=1.0)) as gateway:
            for _ in range(5):
                assert (await getattr(gateway, path)()).status_code == 200
                await until(lambda: not gateway.rollouts._mirrored, "the mirrored call")
            # Of other documents it is another question.
            await gateway.rerank(documents=DOCUMENTS[:3])
            await until(lambda: not gateway.rollouts._mirrored, "the mirrored call")
            figures = await gateway.counted()
            assert (figures["stable"].calls, figures["canary"].mirror.calls) == (6, 2)

    asyncio.run(scenario())


def test_a_question_is_mirrored_once_until_guards_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KNOWN_QUESTIONS", 2)
    rollouts = Rollouts(FleetDouble().ask)
    at_0, other = split(0, 1.0), split(0, 1.0, "r2")
    anew = replace(at_0, since=1.0)

    def wanted(*questions: str, at: Split = at_0) -> list[bool]:
        return [rollouts.wants_mirror(at, question) for question in questions]

    assert wanted("probe", "probe", "cats", "probe") == [True, False, True, False]
    assert wanted("probe", at=other) == [True]
    # Dropped by a canary that was busy.
    rollouts.was_not_mirrored(at_0, "probe")
    assert wanted("probe", "probe") == [True, False]
    # The oldest is forgotten first.
    assert wanted("dogs", "probe", "cats") == [True, False, True]
    assert wanted("dogs", "dogs", at=anew) == [True, False]


def test_an_older_controllers_split_is_mirrored_too() -> None:
    older = split(0, 1.0)
    # As it is read from a message that has no such field.
    object.__delattr__(older, "since")
    rollouts = Rollouts(FleetDouble().ask)
    assert [rollouts.wants_mirror(older, "probe") for _ in range(2)] == [True, False]


@pytest.mark.parametrize(
    ("how", "weight", "counts"),
    [
        ("raises", 0, True),
        ("raises", 1e-9, True),
        ("refuses", 0, True),
        ("a-fault-of-ours", 0, True),
        ("hangs", 0, True),
        # Live calls go first, and there are some.
        ("hangs", 1e-9, False),
        ("overloaded", 0, False),
        ("overloaded", 1e-9, False),
    ],
)
def test_a_mirrored_call_that_fails_counts_unless_the_canary_was_busy(
    how: str, weight: float, counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.gateway.canary._MIRRORED_TIME", 0.1)

    async def scenario() -> None:
        async with Gateway(split(weight, shadow=1.0)) as gateway:
            gateway.fleet.does["new"] = BROKEN[how]
            assert (await gateway.rerank()).status_code == 200
            await until(lambda: not gateway.rollouts._mirrored, "the mirrored call")
            mirror = (await gateway.counted())["canary"].mirror
            assert (mirror.calls, mirror.errors + mirror.degraded) == ((1, 1) if counts else (0, 0))
            assert mirror.degraded == (counts and how != "a-fault-of-ours")

    asyncio.run(scenario())


# ---- operators and events


async def send(gateway: Gateway) -> httpx.Response:
    event = {"action_name": "click", "query_id": "q1"}
    return await gateway.client.post("/v1/events", json={"events": [event]})


def test_events_that_do_not_count_may_say_what_they_like() -> None:
    click = {"action_name": "click", "query_id": "q1", "event_attributes": {"position": {"ordinal": 1}}}
    others: list[dict[str, Any]] = [
        {"action_name": "add_to_cart", "client_id": "c"},
        {"action_name": "scroll", "query_id": "", "event_attributes": {"position": {"ordinal": 0}}},
        {"action_name": "swipe", "event_attributes": {"position": [1, 2]}},
    ]

    async def scenario() -> None:
        async with Gateway(split()) as gateway:
            gateway.fleet.apps = None
            gateway.fleet.stored.set()
            answer = await gateway.client.post("/v1/events", json={"events": [*others, click]})
            assert (answer.status_code, answer.json()["ignored"]) == (200, 3), answer.text
            for wrong, param in (
                ({"action_name": "click"}, "events[1].query_id"),
                ({"query_id": "q1"}, "events[1].action_name"),
                ({"action_name": 7}, "events[1].action_name"),
                ("click", "events[1]"),
            ):
                refused = await gateway.client.post("/v1/events", json={"events": [others[0], wrong]})
                assert (refused.status_code, refused.json()["error"]["param"]) == (400, param), refused.text

    asyncio.run(scenario())


async def abort(gateway: Gateway) -> httpx.Response:
    return await gateway.client.post("/v1/rollouts/r1/abort", headers={"Authorization": "Bearer secret"})


def test_searches_events_and_operators_keep_each_other_from_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ADMIN_KEY, "secret")
    monkeypatch.setattr("serve_app.gateway.service._BESIDE_CALLS", 1)

    async def scenario() -> None:
        async with Gateway() as gateway:
            gateway.service.configure({**SETTINGS, "limits": {"max_concurrent_calls": 1}})
            waiting = asyncio.create_task(send(gateway))
            await until(lambda: gateway.fleet.questions, "events that wait")
            assert (await gateway.search()).status_code == 200
            assert (await abort(gateway)).status_code == 200
            refused = await send(gateway)
            assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
            assert "allowed for events: 1" in refused.json()["message"]
            gateway.fleet.stored.set()
            assert (await waiting).status_code == 200
            gateway.service.enter()
            assert (await gateway.search()).status_code == 429
            assert (await abort(gateway)).status_code == 200
            assert (await send(gateway)).status_code == 200

    asyncio.run(scenario())


def test_events_do_not_wait_for_a_rollout_application_that_is_not_there() -> None:
    async def scenario() -> None:
        async with Gateway() as gateway:
            gateway.fleet.stored.set()
            for apps in ({}, {"rollouts": AppStatus("DEPLOYING", {"Rollout": 0})}):
                gateway.fleet.apps = apps
                refused = await send(gateway)
                assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
            assert not gateway.fleet.questions
            gateway.fleet.apps = {"rollouts": AppStatus("RUNNING", {"Rollout": 1})}
            assert (await send(gateway)).status_code == 200
            ((_, waits_s),) = gateway.fleet.questions
            assert waits_s <= 3

    asyncio.run(scenario())


class Dying(fleet.Fleet):
    """A fleet whose rollout application is `controller`: it does what operators ask, and dies before it answers
    them. What is sent again, it answers."""

    def __init__(self, controller: Controller) -> None:
        super().__init__()
        self.controller = controller
        self.lost: list[str] = []

    def _method(self, app: str, deployment: str, method: str) -> Any:
        async def answer(*arguments: Any) -> Any:
            reply = await getattr(self.controller, method)(*arguments)
            if method != "exchange" and method not in self.lost:
                self.lost.append(method)
                raise RayActorError
            return reply

        return SimpleNamespace(remote=lambda *arguments: asyncio.ensure_future(answer(*arguments)))


def test_what_a_dying_controller_has_done_is_not_refused_when_it_is_sent_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(ADMIN_KEY, "secret")
    monkeypatch.setattr("serve_app.rollout.controller.TICK_S", 0.01)
    document = {
        "route": "default",
        "stable": "stable",
        "canary": "canary",
        "steps": [{"set_weight": 25}, {"analysis": {}}],
    }

    async def all_ready(variants: Sequence[str]) -> list[str]:
        return []

    async def scenario() -> None:
        store = open_store(f"sqlite://{tmp_path}/rollouts.db")
        controller = Controller(store, all_ready)
        service = Service(Dying(controller))
        service.configure(SETTINGS)
        running = asyncio.create_task(controller.run())
        service.rollouts.configure(service.settings)
        await until(lambda: controller._deployed, "what the gateway serves")
        transport = httpx.ASGITransport(app=create_app(service))
        headers = {"Authorization": "Bearer secret"}
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=headers) as client:
            started = await client.post("/v1/rollouts", json=document)
            assert started.status_code == 200, started.text
            (rollout,) = store.recent()
            assert started.json()["id"] == rollout.id
            await until(lambda: store.get(rollout.id).state["step"] == 1, "the analysis")
            paused = await client.post(f"/v1/rollouts/{rollout.id}/pause")
            assert (paused.status_code, paused.json().get("status")) == (200, "paused"), paused.text
        assert service.fleet.lost == ["start", "act"]
        assert [command.action for command in store.commands(rollout.id)] == ["pause"]
        running.cancel()
        await stop(service.rollouts)
        store.close()

    asyncio.run(scenario())


# ---- exchange


class Application:
    """What gateways exchange with: `fails` before it has heard (None: it doesn't), or `loses` answers after."""

    def __init__(self, *splits: Split) -> None:
        self.splits = Splits({"default": splits})
        self.fails = self.loses = False
        self.asked = self.answered = 0
        self.news: list[News] = []
        self.hold: asyncio.Event | None = None

    async def ask(self, app: str, method: str, *arguments: Any, timeout_s: float) -> Any:
        (news,) = arguments
        self.asked += 1
        splits = self.splits
        if self.fails:
            raise ConnectionError("is gone")
        self.news.append(news)
        if self.hold is not None:
            await self.hold.wait()
        if self.loses:
            raise TimeoutError
        self.answered += 1
        return splits


async def followed(application: Application) -> Rollouts:
    rollouts = Rollouts(application.ask)
    rollouts.configure(GatewaySettings.model_validate(SETTINGS))
    await until(lambda: application.answered, "the first answer")
    return rollouts


async def exchanged(application: Application, times: int = 2) -> None:
    asked = application.asked
    await until(lambda: application.asked >= asked + times, "exchanges")


def test_what_was_counted_while_an_answer_was_lost_is_sent_again_as_it_was() -> None:
    async def scenario() -> None:
        application = Application(split(25))
        rollouts = await followed(application)
        application.loses = True
        for role in ("stable", "canary", "canary"):
            rollouts.answered(Place(split(25), role), f"q-{role}", 0.1, searched=True)  # type: ignore[arg-type]
            await exchanged(application)
        application.loses = False
        await exchanged(application)
        await stop(rollouts)
        assert not application.news[-1].reports
        assert not application.news[-1].searches
        sent = [
            (r.source, r.seq, r.role, r.bucket, json.dumps(r.value)) for n in application.news for r in n.reports
        ]
        often = Counter(sent)
        # Three reports, each more than once, and always the same.
        assert len({one[:4] for one in often}) == len(often) == 3
        assert min(often.values()) > 1
        figures = counted(application.news)
        assert (figures["stable"].calls, figures["canary"].calls) == (1, 2)
        assert {s.query_id for news in application.news for s in news.searches} == {"q-stable", "q-canary"}

    asyncio.run(scenario())


def test_what_waits_is_bounded_and_goes_in_parts_the_oldest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_UNSENT_REPORTS", 50)
    monkeypatch.setattr(module, "_UNSENT_SEARCHES", 100)
    monkeypatch.setattr(module, "_REPORTS_AT_ONCE", 20)
    monkeypatch.setattr(module, "_SEARCHES_AT_ONCE", 40)

    async def scenario() -> None:
        application = Application(split(25))
        rollouts = await followed(application)
        application.fails = True
        for i in range(150):
            rollouts.answered(Place(split(25, rollout=f"r{i}"), "canary"), f"q{i}", 0.1, searched=True)
            if i % 10 == 9:
                await exchanged(application, 1)
        await exchanged(application)
        application.news.clear()
        application.fails = False
        await until(lambda: application.news and not application.news[-1].searches, "all that had waited")
        await stop(rollouts)
        reports = [report.rollout_id for news in application.news for report in news.reports]
        searches = [search.query_id for news in application.news for search in news.searches]
        assert reports == [f"r{i}" for i in range(100, 150)]
        assert searches == [f"q{i}" for i in range(50, 150)]
        assert max(len(news.reports) for news in application.news) == 20
        assert max(len(news.searches) for news in application.news) == 40

    asyncio.run(scenario())


def test_what_is_counted_and_dropped_during_an_exchange_is_neither_lost_nor_sent_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_UNSENT_SEARCHES", 10)

    async def scenario() -> None:
        application = Application(split(25))
        rollouts = await followed(application)
        application.fails = True
        for i in range(10):
            rollouts.answered(Place(split(25), "canary"), f"q{i}", 0.1, searched=True)
        await exchanged(application)
        application.hold, application.fails = asyncio.Event(), False
        application.news.clear()
        await until(lambda: application.news, "an exchange that is under way")
        # Four of those that are being sent give way.
        for i in range(10, 14):
            rollouts.answered(Place(split(25), "canary"), f"q{i}", 0.1, searched=True)
        application.hold.set()
        await until(lambda: not application.news[-1].searches, "all")
        await stop(rollouts)
        sent = [search.query_id for news in application.news for search in news.searches]
        assert sent == [f"q{i}" for i in range(14)]
        assert counted(application.news)["canary"].calls == 14

    asyncio.run(scenario())


def test_weights_stay_in_force_while_the_application_is_away() -> None:
    async def scenario() -> None:
        application = Application(split(25))
        rollouts = await followed(application)
        application.splits = Splits({"default": (split(50),)})
        application.fails = True
        await exchanged(application, 10)
        assert rollouts.of("default") == (split(25),)
        application.fails, application.loses = False, True
        await exchanged(application, 10)
        assert rollouts.of("default") == (split(25),)
        application.loses = False
        await until(lambda: rollouts.of("default") == (split(50),), "the new weights")
        await stop(rollouts)

    asyncio.run(scenario())


def test_weights_of_before_the_store_went_away_are_for_gateways_that_have_none() -> None:
    async def scenario() -> None:
        application = Application(split(25))
        rollouts = await followed(application)
        # From another controller, which has not heard of the last weights.
        application.splits = Splits({"default": (split(5),)}, old=True)
        await exchanged(application)
        assert rollouts.of("default") == (split(25),)
        new = await followed(application)
        await until(lambda: new.of("default") == (split(5),), "what was known last")
        application.splits = Splits({"default": (split(50),)})
        for gateway in (rollouts, new):
            await until(lambda gateway=gateway: gateway.of("default") == (split(50),), "the new weights")
            await stop(gateway)

    asyncio.run(scenario())


def test_a_gateway_that_never_heard_what_is_in_force_says_so(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        application = Application(split(25))
        application.fails = True
        rollouts = Rollouts(application.ask)
        rollouts.configure(GatewaySettings.model_validate(SETTINGS))
        await exchanged(application, 3)
        application.fails = False
        await until(lambda: rollouts.of("default"), "the weights")
        application.fails = True
        await exchanged(application, 3)
        await stop(rollouts)

    with caplog.at_level(logging.WARNING, logger="ray.serve"):
        asyncio.run(scenario())
    assert [record.getMessage() for record in caplog.records] == [
        "no news yet from the rollout application: rollouts and promotions are not in force here: is gone",
        "no news from the rollout application, the last splits stay: is gone",
    ]


@pytest.mark.parametrize("ahead_s", [-600.0, 600.0])
def test_calls_are_counted_by_the_controllers_clock(ahead_s: float) -> None:
    async def scenario() -> None:
        application = Application(split(100))
        application.splits = replace(application.splits, said_at=time.time() + ahead_s)
        rollouts = await followed(application)
        await exchanged(application)
        rollouts.answered(Place(split(100), "canary"), "q", 0.1, searched=True)
        rollouts.mirrored(split(100), None)
        await exchanged(application)
        reports = [report for news in application.news for report in news.reports]
        assert counted(application.news)["canary"].calls == 1
        searches = [search.at for news in application.news for search in news.searches]
        assert all(abs(at - time.time() - ahead_s) < 60 for at in [*searches, *(r.bucket for r in reports)])
        assert searches
        await stop(rollouts)

    asyncio.run(scenario())


def test_a_call_holds_one_whole_table() -> None:
    async def scenario() -> None:
        first = (split(100, rollout="r1", live=False), split(25, rollout="r2"))
        application = Application(*first)
        rollouts = await followed(application)
        held = rollouts.of("default")
        application.splits = Splits({"other": (split(5, rollout="r3"),)})
        await until(lambda: rollouts.of("other"), "the next table")
        assert held == first
        assert rollouts.of("default") == ()
        await stop(rollouts)

    asyncio.run(scenario())


def test_settings_without_a_rollout_application_end_its_hold_for_good() -> None:
    async def scenario() -> None:
        application = Application(split(25))
        rollouts = await followed(application)
        application.hold = asyncio.Event()
        await exchanged(application, 1)
        # While an exchange is under way.
        without = {name: value for name, value in SETTINGS.items() if name != "rollout"}
        rollouts.configure(GatewaySettings.model_validate(without))
        assert rollouts.of("default") == ()
        answered = application.answered
        application.hold.set()
        await until(lambda: application.answered > answered, "the late answer")
        await asyncio.sleep(0)
        assert rollouts.of("default") == ()
        reply = await rollouts.ask("recent", None)
        assert (reply.error, "rollout is not set" in reply.message) == ("not_found", True)
        rollouts.configure(GatewaySettings.model_validate(SETTINGS))
        await until(lambda: rollouts.of("default") == (split(25),), "the weights again")
        await stop(rollouts)

    asyncio.run(scenario())


def test_an_application_that_does_not_answer_operators_is_said() -> None:
    async def scenario() -> None:
        application = Application()
        rollouts = await followed(application)
        application.fails = True
        reply = await rollouts.ask("show", "r1")
        assert (reply.error, reply.message) == ("unavailable", "the rollout application rollouts does not answer")
        await stop(rollouts)

    asyncio.run(scenario())


def test_what_is_known_of_rollouts_that_are_over_is_forgotten() -> None:
    async def scenario() -> None:
        application = Application(split(25, rollout="r0"))
        rollouts = await followed(application)
        for i in range(5):
            place = Place(split(25, rollout=f"r{i}"), "stable")
            rollouts.answered(place, f"q{i}", 0.1, searched=True)
            assert rollouts.wants_computed(Place(split(25, rollout=f"s{i}"), "canary"))
        await exchanged(application, 3)
        assert set(rollouts._latencies) == {"r0"}
        assert {rollout for rollout, _ in rollouts._computed_at} == {"r0"}
        assert not rollouts._unsent
        assert not rollouts._searches
        await stop(rollouts)

    asyncio.run(scenario())
