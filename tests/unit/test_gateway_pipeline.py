"""Pipelines, fusion, deadlines, splitting: the gateway's pure parts."""

import asyncio
import collections
import itertools
import math
import time

import pytest
from grpc import StatusCode
from grpc.aio import AioRpcError, Metadata
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import ActorUnavailableError

from serve_app.config import Fusion, Stage
from serve_app.gateway import lexical
from serve_app.gateway.breaker import Breaker
from serve_app.gateway.deadline import Deadline
from serve_app.gateway.fleet import Fleet, carried_over
from serve_app.gateway.fusion import best_first, fuse
from serve_app.gateway.pipeline import StageFailure, run
from serve_app.gateway.scripts import foreign_letter
from serve_app.reranker.messages import EngineError, EngineFullError, ScoreRequest, ScoreResult
from serve_app.rollout.split import choose
from serve_app.status import AppStatus

scores = st.floats(-50, 50, allow_nan=False)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def run_pipeline(stages, documents, recall_scores, score, fusion=None, fallback=None, skip=lambda stage: None):
    async def scorer(stage, query, texts, timeout_s):
        values = score(stage.variant, texts)
        return ScoreResult(values, values, 0, 0, 0, "", 0.0)

    async def fallback_scores():
        return fallback(documents)

    return asyncio.run(
        run(
            stages,
            fusion,
            "q",
            documents,
            recall_scores,
            score=scorer,
            fallback_scores=fallback_scores,
            skip=skip,
            deadline=Deadline.after(10),
        )
    )


def test_a_cascade_gives_each_stage_what_the_one_before_kept():
    seen = {}

    def score(variant, texts):
        seen[variant] = texts
        return [len(text) / 10 for text in texts] if variant == "a" else [-len(text) / 10 for text in texts]

    documents = ["x" * n for n in (3, 1, 5, 2, 4)]
    ranking = run_pipeline([Stage(variant="a", keep=3), Stage(variant="b")], documents, [5, 4, 3, 2, 1], score)
    assert seen["b"] == ["xxxxx", "xxxx", "xxx"]
    assert [len(documents[p]) for p in ranking.order] == [3, 4, 5, 2, 1]


def test_a_failed_stage_leaves_the_order_and_still_cuts():
    seen = {}

    def score(variant, texts):
        seen[variant] = texts
        if variant == "a":
            raise StageFailure("error", "a broke")
        return list(range(len(texts)))

    ranking = run_pipeline([Stage(variant="a", keep=2), Stage(variant="b")], list("vwxyz"), [5, 4, 3, 2, 1], score)
    assert seen["b"] == ["v", "w"]
    assert ranking.order == [1, 0, 2, 3, 4]
    assert ranking.reports[0].failure.reason == "error"
    assert ranking.reports[1].failure is None


def test_plain_rerank_orders_by_the_fallback_before_a_later_stage_is_cut_for():
    def score(variant, texts):
        if variant == "a":
            raise StageFailure("timeout", "a is slow")
        return [0.5] * len(texts)

    ranking = run_pipeline(
        [Stage(variant="a", keep=2), Stage(variant="b")],
        list("xyz"),
        None,
        score,
        fallback=lambda documents: [0.1, 0.2, 0.3],
    )
    assert ranking.order == [2, 1, 0]


def test_nothing_recalled_asks_no_model():
    ranking = run_pipeline([Stage(variant="a")], [], [], lambda variant, texts: 1 / 0)
    assert ranking.order == []


@given(st.data(), st.lists(scores, min_size=1, max_size=12), st.booleans())
def test_a_ranking_is_a_permutation_with_scores_that_never_rise(data, recall, plain):
    n = len(recall)
    keeps = data.draw(st.lists(st.integers(1, n), max_size=3))
    stages = [Stage(variant=f"v{i}", keep=keep) for i, keep in enumerate(sorted(keeps, reverse=True))]
    fusion = data.draw(st.sampled_from([None, Fusion(), Fusion(method="rrf")]))

    def score(variant, texts):
        if data.draw(st.booleans()):
            raise StageFailure("error", "x")
        return [data.draw(scores) for _ in texts]

    ranking = run_pipeline(
        stages,
        [str(i) for i in range(n)],
        None if plain else sorted(recall, reverse=True),
        score,
        fusion,
        fallback=lambda documents: recall,
    )
    assert sorted(ranking.order) == list(range(n))
    ordered = [ranking.scores[p] for p in ranking.order]
    assert ordered == sorted(ordered, reverse=True)


@given(st.lists(st.tuples(scores, scores), min_size=1, max_size=20), st.sampled_from(["minmax", "rrf"]))
def test_fusion_at_the_ends_of_its_weight_is_one_of_the_two_orders(pairs, method):
    recall, rerank = zip(*pairs, strict=True)
    recall_scale = fuse(Fusion(method=method, recall_weight=1), recall, rerank)
    assert_orders_agree(recall_scale, recall, strict=method == "rrf")
    rerank_scale = fuse(Fusion(method=method, recall_weight=0), recall, rerank)
    assert_orders_agree(rerank_scale, rerank, strict=method == "rrf")


def assert_orders_agree(fused, original, strict):
    order = best_first(fused)
    values = [original[p] for p in order]
    if strict:
        assert values == sorted(values, reverse=True)
    else:
        # Scaling may round neighbours together, never swap them.
        assert all(a >= b or math.isclose(a, b, abs_tol=1e-9) for a, b in itertools.pairwise(values))


def test_fusion_by_hand():
    assert fuse(Fusion(recall_weight=0.25), [4, 2, 0], [0.1, 0.3, 0.2]) == pytest.approx([0.25, 0.875, 0.375])
    assert fuse(Fusion(method="rrf", recall_weight=0.5), [2, 1], [1, 2]) == pytest.approx(
        [0.5 / 61 + 0.5 / 62, 0.5 / 62 + 0.5 / 61]
    )
    assert fuse(Fusion(), None, [0.4]) == [0.4]


def test_bm25_by_hand():
    # Two documents, the term in one: idf = ln(1 + 1.5 / 1.5); length 2 of a mean of 1.5.
    expected = math.log(2) * 2.2 / (1 + 1.2 * (0.25 + 0.75 * 2 / 1.5))
    assert lexical.bm25("cat", ["cat dog", "dog"]) == pytest.approx([expected, 0.0])


def test_bm25_reads_chinese_by_neighbours_and_model_numbers_whole():
    assert lexical.tokens("ＷＨ-1000XM4 降噪") == ["wh", "1000xm4", "降", "降噪", "噪"]
    best = lexical.bm25("降噪耳机", ["有线耳机", "无线降噪耳机", "噪音很大的机器"])
    assert best.index(max(best)) == 1


@given(st.text(max_size=50), st.lists(st.text(max_size=50), max_size=8))
def test_bm25_is_finite_and_never_negative(query, documents):
    values = lexical.bm25(query, documents)
    assert len(values) == len(documents)
    assert all(math.isfinite(value) and value >= 0 for value in values)


def test_text_made_to_be_slow_is_not():
    started = time.monotonic()
    lexical.bm25("cat", ["a" + "\u0301\u0327" * 300_000, "\ufdfa" * 300_000])
    assert time.monotonic() - started < 5


def test_deadline_gives_unused_time_to_later_stages():
    clock = Clock()
    deadline = Deadline.after(1.0, clock)
    assert deadline.share_s(2) == pytest.approx(0.45)
    clock.now += 0.1
    assert deadline.share_s(1) == pytest.approx(0.8)
    clock.now += 5
    assert deadline.remaining_s() == 0


def opened(clock):
    breaker = Breaker(failures_to_open=2, probe_every_s=1.0, clock=clock)
    for _ in range(2):
        breaker.settle(breaker.enter(), True)
    return breaker


def test_the_breaker_lets_one_call_at_a_time_through_until_one_succeeds():
    clock = Clock()
    breaker = opened(clock)
    assert breaker.enter() is None
    clock.now += 1.01
    probe = breaker.enter()
    clock.now += 100
    assert breaker.enter() is None, "a probe is under way"
    breaker.settle(probe, True)
    assert breaker.enter() is None
    clock.now += 1.01
    probe = breaker.enter()
    breaker.succeeded()
    breaker.settle(probe, False)
    assert breaker.enter()
    assert breaker.enter()


def test_calls_too_short_to_tell_anything_do_not_take_the_probe():
    clock = Clock()
    breaker = opened(clock)
    assert breaker.enter(can_probe=False) is None
    clock.now += 1.01
    assert breaker.enter(can_probe=False)
    probe = breaker.enter()
    assert probe.is_probe
    breaker.settle(probe, None)
    assert breaker.enter(), "an undecided probe gives way at once"


def test_calls_too_short_to_tell_anything_are_tried_once_a_second_and_one_that_succeeds_closes_the_breaker():
    clock = Clock()
    breaker = opened(clock)
    for failed in (True, None, True):
        clock.now += 1.01
        tried = breaker.enter(can_probe=False)
        assert tried
        assert breaker.enter(can_probe=False) is None
        breaker.settle(tried, failed)
        assert breaker.enter(can_probe=False) is None
    clock.now += 1.01
    tried = breaker.enter(can_probe=False)
    breaker.succeeded()
    breaker.settle(tried, False)
    assert breaker.enter(can_probe=False)
    assert breaker.enter(can_probe=False)


def test_a_variant_that_failed_under_short_deadlines_is_asked_again():
    class Small(Fleet):
        broken = True

        async def _call(self, *question):
            if self.broken:
                raise EngineError("engine is dead")
            return ScoreResult([0.5], [0.0], 1, 0, 0, "", 0.1)

    async def score(fleet):
        request = ScoreRequest(query="q", documents=["d"])
        return await fleet.score("small", request, 32, timeout_s=0.45)

    async def scenario():
        clock, fleet = Clock(), Small()
        fleet._breakers["small"] = Breaker(clock=clock)
        for _ in range(3):
            with pytest.raises(StageFailure, match="EngineError"):
                await score(fleet)
        fleet.broken = False
        with pytest.raises(StageFailure, match="has not answered its last calls"):
            await score(fleet)
        clock.now += 1.01
        assert (await score(fleet))[0].scores == [0.5]
        assert (await score(fleet))[0].scores == [0.5]

    asyncio.run(scenario())


class Handles(Fleet):
    """Each call to a replica ends as the next of `ends` says."""

    def __init__(self, *ends):
        super().__init__()
        self.ends = list(ends)
        self.sent = []
        self.asked = asyncio.Event()

    def _method(self, app, deployment, method):
        return self

    def remote(self, request):
        self.sent.append(Response(self.ends.pop(0)))
        self.asked.set()
        return self.sent[-1]


class Response:
    def __init__(self, end):
        self.end = end
        self.cancelled = False

    def __await__(self):
        return self.wait().__await__()

    async def wait(self):
        if self.end is None:
            await asyncio.sleep(60)
        if isinstance(self.end, BaseException):
            raise self.end
        return self.end

    def cancel(self):
        self.cancelled = True


def transport(code):
    return AioRpcError(code, Metadata(), Metadata())


SCORED = ScoreResult([0.5], [0.0], 1, 0, 0, "", 0.1)
ONE_PAIR = ScoreRequest(query="q", documents=["d"])


@pytest.mark.parametrize(
    "end",
    [
        ActorUnavailableError("gone", None),
        transport(StatusCode.UNAVAILABLE),
        transport(StatusCode.CANCELLED),
        asyncio.CancelledError(),
    ],
    ids=["dead", "unreachable", "cut off", "gave up"],
)
def test_a_call_that_a_stopping_replica_drops_goes_to_another_one(end):
    async def scenario():
        fleet = Handles(end, end, SCORED)
        assert await fleet.score("small", ONE_PAIR, 32, timeout_s=5) == [SCORED]
        with pytest.raises(StageFailure) as caught:
            await Handles(end, end, end, SCORED).score("small", ONE_PAIR, 32, timeout_s=5)
        assert caught.value.reason == "unavailable"

    asyncio.run(scenario())


def test_a_call_that_is_too_large_to_send_is_sent_once():
    async def scenario():
        fleet = Handles(transport(StatusCode.RESOURCE_EXHAUSTED), SCORED)
        with pytest.raises(StageFailure) as caught:
            await fleet.score("small", ONE_PAIR, 32, timeout_s=5)
        assert caught.value.reason == "error"
        assert len(fleet.sent) == 1

    asyncio.run(scenario())


def test_a_client_that_goes_takes_its_call_back_and_no_other_is_sent():
    async def scenario():
        fleet = Handles(None, SCORED)
        call = asyncio.create_task(fleet.score("small", ONE_PAIR, 32, timeout_s=5))
        await asyncio.wait_for(fleet.asked.wait(), 10)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert [response.cancelled for response in fleet.sent] == [True]

    asyncio.run(scenario())


def test_stale_calls_do_not_end_a_probe():
    clock = Clock()
    breaker = Breaker(failures_to_open=2, probe_every_s=1.0, clock=clock)
    stale = breaker.enter()
    for _ in range(2):
        breaker.settle(breaker.enter(), True)
    clock.now += 1.01
    assert breaker.enter()
    breaker.settle(stale, True)
    clock.now += 1.01
    assert breaker.enter() is None


def test_a_full_engine_is_overloaded_and_no_failure_of_the_variant():
    class Full(Fleet):
        async def _call(self, *question):
            raise EngineFullError("engine is full: 65536 prompts wait, 65536 may")

    async def scenario():
        fleet = Full()
        for _ in range(10):
            with pytest.raises(StageFailure) as caught:
                await fleet.score("small", ScoreRequest(query="q", documents=["d"]), 32, timeout_s=5)
            assert caught.value.reason == "overloaded"

    asyncio.run(scenario())


def test_asking_for_too_much_does_not_open_the_breaker():
    clock = Clock()
    breaker = Breaker(failures_to_open=2, probe_every_s=1.0, clock=clock)
    for _ in range(10):
        call = breaker.enter()
        clock.now += 1
        breaker.succeeded()
        breaker.settle(call, True)
    assert breaker.enter()


@pytest.mark.parametrize(
    ("text", "allowed", "letter"),
    [
        ("noise cancelling", ["Latin"], None),
        ("café №5 ±3 µm", ["Latin"], None),
        ("sony 耳机", ["Latin"], "耳"),
        ("イヤホン", ["Latin", "CJK"], None),
        ("наушники", ["Latin", "CJK"], "н"),
        ("anything 任何", [], None),
        ("sony", ["CJK"], "s"),
    ],
)
def test_letters_outside_a_models_scripts_are_found(text, allowed, letter):
    assert foreign_letter(text, allowed) == letter


@given(st.text(max_size=20))
def test_a_user_keeps_a_pipeline(user):
    weights = {"a": 1.0, "b": 3.0, "never": 0.0}
    assert choose(weights, user, "r") == choose(weights, user, "r") != "never"


def test_the_split_follows_the_weights():
    counted = collections.Counter(choose({"a": 10, "b": 30}, str(i), "route") for i in range(20_000))
    # Four standard deviations of a binomial share of 0.25.
    assert abs(counted["a"] / 20_000 - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 20_000)


def test_replicas_that_serve_while_their_application_is_built_anew_are_called():
    """Serve names no deployments of an application from the deploy of other `args` until they are built."""
    before = {"catalogue": AppStatus("RUNNING", {"Recall": 2}), "gone": AppStatus("RUNNING", {"Reranker": 1})}
    built = carried_over(before, {"catalogue": AppStatus("DEPLOYING"), "gone": AppStatus("DELETING")})
    assert (built["catalogue"].running, built["gone"].running) == ({"Recall": 2}, {})
    # From one look to the next, until there is news.
    assert carried_over(built, {"catalogue": AppStatus("DEPLOYING")})["catalogue"].running == {"Recall": 2}
    news = {"catalogue": AppStatus("DEPLOYING", {"Recall": 0}), "new": AppStatus("DEPLOYING")}
    assert {name: app.running for name, app in carried_over(built, news).items()} == {
        "catalogue": {"Recall": 0},
        "new": {},
    }
