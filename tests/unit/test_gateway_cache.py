"""The score cache over a fleet whose replicas are functions: only what stands behind Serve handles is replaced."""

import asyncio
import functools
import json
import random
import time
import tracemalloc
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.config import Cache, GatewaySettings
from serve_app.gateway.cache import ScoreTable, pair_names
from serve_app.gateway.fingerprints import Fingerprints
from serve_app.gateway.fleet import Fleet
from serve_app.gateway.pipeline import StageFailure
from serve_app.gateway.scoring import Scoring
from serve_app.reranker.messages import EngineError, PromptTooLongError, ScoreRequest, ScoreResult
from serve_app.rollout.figures import Figures
from serve_app.rollout.messages import Splits
from serve_app.rollout.split import Split
from serve_app.status import AppStatus
from tests.unit.gateway_double import SETTINGS, Gateway

MIB = 2**20


class Clock:
    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def score_of(fingerprint: str, query: str, document: str) -> float:
    """What a variant of this fingerprint gives for a pair."""
    return random.Random(f"{fingerprint} {query} {document}").random()


class Replicas(Fleet):
    """A fleet whose calls end here. `fingerprint` is what the next call is answered with; `before` is awaited by
    each and may raise."""

    def __init__(self, fingerprint: str = "f1") -> None:
        super().__init__()
        self.fingerprint: Callable[[], str] | str = fingerprint
        self.before: Callable[[ScoreRequest], Awaitable[None]] | None = None
        self.calls: list[ScoreRequest] = []
        # As a status that has been read would have had it asked.
        self.fingerprints.heard("v", fingerprint, 0.0)

    @property
    def computed(self) -> Counter[str]:
        """How often each document was sent to a replica."""
        return Counter(document for call in self.calls for document in call.documents)

    async def _call(self, app: str, deployment: str, method: str, *arguments: Any) -> Any:
        fingerprint = self.fingerprint if isinstance(self.fingerprint, str) else self.fingerprint()
        if method == "info":
            return {"fingerprint": fingerprint}
        (request,) = arguments
        self.calls.append(request)
        if self.before is not None:
            await self.before(request)
        scores = [score_of(fingerprint, request.query, document) for document in request.documents]
        return ScoreResult(scores, scores, len(scores), 0, 0, f"r {fingerprint}", 1.0, fingerprint)


def cached(fleet: Fleet, **settings: Any) -> Scoring:
    scoring = Scoring(fleet)
    scoring.configure(Cache(max_bytes=MIB, **settings))
    return scoring


async def ask(
    scoring: Scoring, documents: Sequence[str], query: str = "q", timeout_s: float = 10, size: int = 4, **more: Any
) -> ScoreResult:
    fields = {name: more.pop(name) for name in ("instruction", "max_tokens_per_doc") if name in more}
    request = ScoreRequest(query, list(documents), **fields)
    return await scoring.score(more.pop("variant", "v"), request, size, timeout_s, **more)


def expected(documents: Sequence[str], fingerprint: str = "f1", query: str = "q") -> list[float]:
    return [score_of(fingerprint, query, document) for document in documents]


# ---- names and the table


@given(
    st.lists(
        st.tuples(
            st.text(max_size=4), st.text(max_size=4), st.none() | st.text(max_size=4), st.none() | st.just(7)
        ),
        min_size=2,
        max_size=2,
        unique=True,
    )
)
def test_pairs_that_differ_in_anything_have_other_names(pairs):
    names = [pair_names(query, [document], instruction, most) for query, document, instruction, most in pairs]
    assert names[0] != names[1]


def test_a_name_is_the_same_in_every_process():
    (name,) = pair_names("headphones", ["WH-1000XM4 降噪耳机"], None, 512)
    assert name.hex() == "43146467e0824cf1765b67a39f2605a5"
    assert pair_names("q", ["half a pair: \ud83d"], None, None)


def table_of(entries: int, clock: Callable[[], float] = time.time) -> tuple[ScoreTable, np.ndarray, np.ndarray]:
    table = ScoreTable(MIB, clock)
    keys = np.random.default_rng(3).integers(0, 2**64, (entries, 2), np.uint64)
    return table, keys, np.arange(entries, dtype=np.float64)


def test_the_table_gives_what_was_put_until_its_time_is_over():
    clock = Clock()
    table, keys, scores = table_of(500, clock)
    table.put(keys, scores, np.full(500, 1060, np.uint32))
    table.put(keys[:1], scores[1:2], np.full(1, 1060, np.uint32))
    found, there = table.get(keys)
    assert there.all()
    assert found.tolist() == [1.0, *scores[1:]]
    assert table.entries == 500
    clock.now = 1059.9
    assert table.get(keys)[1].all()
    clock.now = 1060
    assert not table.get(keys)[1].any()
    assert table.get(keys[:0])[0].shape == (0,)


def test_the_table_keeps_what_is_used():
    clock = Clock()
    table, keys, scores = table_of(200_000, clock)
    popular = keys[:1000]
    for i in range(0, len(keys), 1000):
        clock.now += 1
        table.put(keys[i : i + 1000], scores[i : i + 1000], np.full(1000, 2**31, np.uint32))
        table.get(popular)
    assert table.get(popular)[1].mean() > 0.97
    # The others came once: those of the last third of a table's worth are there, older ones gone.
    assert table.get(keys[-10_000:])[1].mean() > 0.9
    assert table.get(keys[10_000:100_000])[1].mean() < 0.05


def test_the_table_takes_no_more_memory_than_it_may():
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        table = ScoreTable(16 * MIB)
        random_keys = np.random.default_rng(4)
        for _ in range(1000):
            keys = random_keys.integers(0, 2**64, (1000, 2), np.uint64)
            table.put(keys, np.zeros(1000), np.full(1000, 2**31, np.uint32))
            assert table.get(keys)[1].all()
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert 0.9 * 16 * MIB < taken <= 1.01 * 16 * MIB
    assert table.entries > 0.95 * 16 * MIB / 32


# ---- what is computed and what is not


def test_a_repeated_question_is_answered_without_a_replica():
    async def check():
        fleet = Replicas()
        scoring = cached(fleet)
        documents = [f"d{i}" for i in range(10)]
        first = await ask(scoring, documents)
        assert (first.scores, first.cache_hits, first.tokens) == (expected(documents), 0, 10)
        again = await ask(scoring, documents[::-1])
        assert (again.scores, again.cache_hits, again.tokens) == (expected(documents)[::-1], 10, 0)
        assert len(fleet.calls) == 3
        assert scoring.stats()["memory_hits"] == 10

    asyncio.run(check())


def test_of_an_overlapping_question_only_the_new_part_is_computed():
    async def check():
        fleet = Replicas()
        scoring = cached(fleet)
        await ask(scoring, [f"d{i}" for i in range(100)])
        fleet.calls.clear()
        later = [f"d{i}" for i in range(50, 150)]
        random.Random(5).shuffle(later)
        result = await ask(scoring, later)
        assert (result.scores, result.cache_hits, result.tokens) == (expected(later), 50, 50)
        assert fleet.computed == Counter(f"d{i}" for i in range(100, 150))

    asyncio.run(check())


def test_the_same_document_twice_is_computed_once():
    async def check():
        fleet = Replicas()
        result = await ask(cached(fleet), ["a", "b", "a", "a"])
        assert result.scores == expected(["a", "b", "a", "a"])
        assert fleet.computed == {"a": 1, "b": 1}
        assert (result.cache_hits, result.tokens) == (0, 2)

    asyncio.run(check())


@pytest.mark.parametrize(
    "other", [{"query": "p"}, {"instruction": "i"}, {"max_tokens_per_doc": 9}, {"variant": "w"}]
)
def test_what_decides_a_score_and_who_gives_it_keep_questions_apart(other):
    async def check():
        fleet = Replicas()
        fleet.fingerprints.heard("w", "f1", 0.0)
        scoring = cached(fleet)
        await ask(scoring, ["a"])
        assert (await ask(scoring, ["a"], **other)).cache_hits == 0
        assert (await ask(scoring, ["a"], **other)).cache_hits == 1

    asyncio.run(check())


def test_scores_are_computed_again_after_their_time():
    async def check():
        fleet = Replicas()
        scoring = cached(fleet, ttl_s=1)
        await ask(scoring, ["a"])
        give_up_at = time.monotonic() + 10
        while (await ask(scoring, ["a"])).cache_hits:
            assert time.monotonic() < give_up_at
            await asyncio.sleep(0.05)
        assert fleet.computed == {"a": 2}

    asyncio.run(check())


def test_a_shorter_time_goes_for_what_is_known_already():
    async def check():
        scoring = cached(Replicas(), ttl_s=3600)
        await ask(scoring, ["a"])
        scoring.configure(Cache(max_bytes=MIB, ttl_s=3599))
        assert (await ask(scoring, ["a"])).cache_hits == 0
        assert (await ask(scoring, ["a"])).cache_hits == 1

    asyncio.run(check())


def test_a_fresh_and_a_mirrored_question_are_computed_and_leave_their_scores():
    async def check():
        fleet = Replicas()
        scoring = cached(fleet)
        await ask(scoring, ["a"])
        for how in ({"fresh": True}, {"mirrored": True}):
            result = await ask(scoring, ["a", "b"], **how)
            assert (result.scores, result.cache_hits) == (expected(["a", "b"]), 0)
        assert (await ask(scoring, ["b"])).cache_hits == 1

    asyncio.run(check())


def test_a_cache_that_is_off_computes_everything():
    async def check():
        fleet = Replicas()
        scoring = Scoring(fleet)
        scoring.configure(None)
        for _ in range(2):
            result = await ask(scoring, ["a", "a"])
            assert (result.scores, result.cache_hits) == (expected(["a", "a"]), 0)
        assert fleet.computed == {"a": 4}
        scoring.configure(Cache(max_bytes=MIB))
        await ask(scoring, ["a"])
        scoring.configure(Cache(max_bytes=MIB, ttl_s=7200))
        assert (await ask(scoring, ["a"])).cache_hits == 1, "other settings of the same size lose nothing"

    asyncio.run(check())


def test_errors_come_through_and_what_came_before_them_is_kept():
    async def check():
        fleet = Replicas()
        scoring = cached(fleet)

        async def breaks(request):
            if "d9" in request.documents:
                await asyncio.sleep(0.05)
                raise EngineError("broke")

        fleet.before = breaks
        with pytest.raises(StageFailure, match="EngineError"):
            await ask(scoring, [f"d{i}" for i in range(10)])
        fleet.before = None
        assert (await ask(scoring, [f"d{i}" for i in range(10)])).cache_hits == 8

        async def refuses(request):
            raise PromptTooLongError("no room: the limit is 512")

        fleet.before = refuses
        with pytest.raises(PromptTooLongError, match="512"):
            await ask(scoring, ["x"])

    asyncio.run(check())


def test_known_scores_are_given_while_the_variant_is_down():
    async def check():
        fleet = Replicas()
        scoring = cached(fleet)
        await ask(scoring, ["a"])

        async def breaks(request):
            raise EngineError("broke")

        fleet.before = breaks
        assert (await ask(scoring, ["a"])).scores == expected(["a"])
        with pytest.raises(StageFailure):
            await ask(scoring, ["a", "b"])

    asyncio.run(check())


def test_scores_that_are_no_numbers_are_not_kept():
    async def check():
        fleet = Replicas()
        scoring = cached(fleet)
        nan = float("nan")

        async def call(*arguments: Any) -> ScoreResult:
            return ScoreResult([nan], [nan], 1, 0, 0, "r", 1.0, "f1")

        fleet._call = call
        assert np.isnan((await ask(scoring, ["a"])).scores).all()
        assert (await ask(scoring, ["a"])).cache_hits == 0

    asyncio.run(check())


# ---- one revision


def test_known_scores_are_thrown_away_when_the_rest_comes_from_another_revision():
    async def check():
        fleet = Replicas()
        scoring = cached(fleet)
        await ask(scoring, ["a", "b", "c"])
        fleet.fingerprint = "f2"
        result = await ask(scoring, ["a", "b", "c", "d"])
        assert (result.scores, result.cache_hits) == (expected(["a", "b", "c", "d"], "f2"), 0)
        assert (await ask(scoring, ["a", "b"])).scores == expected(["a", "b"], "f2")
        fleet.fingerprint = "f1"
        assert (await ask(scoring, ["a", "b", "x"])).scores == expected(["a", "b", "x"], "f1")

    asyncio.run(check())


@given(st.integers(0, 2**32), st.integers(1, 30), st.integers(1, 3), st.booleans())
@settings(deadline=None, max_examples=150)
def test_no_answer_mixes_revisions_while_replicas_are_replaced(seed, n, revisions, on):
    async def check():
        rng = random.Random(seed)
        fleet = Replicas()
        fleet.fingerprint = lambda: f"f{rng.randint(1, revisions)}"
        scoring = cached(fleet)
        if not on:
            scoring.configure(None)
        for _ in range(4):
            documents = [f"d{rng.randint(0, 40)}" for _ in range(n)]
            fleet.calls.clear()
            result = await ask(scoring, documents)
            assert result.scores == expected(documents, result.fingerprint)
            assert sum(len(call.documents) for call in fleet.calls) <= 3 * n
        results = await asyncio.gather(*(ask(scoring, [f"d{i}" for i in range(n)]) for _ in range(4)))
        for result in results:
            assert result.scores == expected([f"d{i}" for i in range(n)], result.fingerprint)

    asyncio.run(check())


def test_an_answer_of_a_replica_on_its_way_out_changes_nothing():
    async def check():
        fleet = Replicas()
        scoring = cached(fleet)
        release = asyncio.Event()

        async def waits(request):
            if request.documents == ["slow"]:
                await release.wait()

        fleet.before = waits
        slow = asyncio.create_task(ask(scoring, ["slow"]))
        await asyncio.sleep(0.01)
        fleet.fingerprint = "f2"
        await ask(scoring, ["a"])
        release.set()
        assert (await slow).fingerprint == "f1"
        assert fleet.fingerprints.of("v") == "f2"
        assert (await ask(scoring, ["slow"])).scores == expected(["slow"], "f2")

    asyncio.run(check())


def test_nothing_is_shared_or_kept_of_a_variant_that_does_not_say_what_it_is():
    async def check():
        fleet = Replicas("")
        scoring = cached(fleet)
        results = await asyncio.gather(ask(scoring, ["a"]), ask(scoring, ["a"]))
        results.append(await ask(scoring, ["a"]))
        assert [result.cache_hits for result in results] == [0, 0, 0]
        assert fleet.computed == {"a": 3}

    asyncio.run(check())


# ---- a variant's fingerprint


def follow(
    fingerprints: Fingerprints, status: str = "RUNNING", running: int = 1, deployed_at_s: float = 1.0
) -> bool:
    return fingerprints.follow("v", status, running, deployed_at_s)


def test_a_variant_is_asked_while_it_changes_and_not_when_it_is_at_rest():
    clock = Clock()
    fingerprints = Fingerprints(clock)
    assert follow(fingerprints), "a gateway that has just started"
    fingerprints.heard("v", "f1", clock.now)
    clock.now += 11
    assert not follow(fingerprints)
    assert follow(fingerprints, running=2)
    clock.now += 11
    assert not follow(fingerprints, running=2)
    assert follow(fingerprints, running=2, deployed_at_s=2.0)
    clock.now += 11
    assert follow(fingerprints, "DEPLOYING", 2, 2.0)
    clock.now += 60
    assert follow(fingerprints, "DEPLOYING", 2, 2.0), "models load for minutes"
    assert follow(fingerprints, "RUNNING", 2, 2.0)


def test_a_sleeping_variant_is_not_woken_and_forgotten_when_it_is_deployed_again():
    clock = Clock()
    fingerprints = Fingerprints(clock)
    follow(fingerprints)
    fingerprints.heard("v", "f1", clock.now)
    clock.now += 11
    assert not follow(fingerprints, running=0)
    assert fingerprints.of("v") == "f1"
    clock.now += 11
    assert not follow(fingerprints, "DEPLOYING", 0, 2.0)
    assert fingerprints.of("v") == "f1"
    assert not follow(fingerprints, "RUNNING", 0, 2.0)
    assert fingerprints.of("v") == ""
    fingerprints.heard("v", "f2", clock.now + 1)
    assert not follow(fingerprints, "RUNNING", 0, 2.0)
    assert fingerprints.of("v") == "f2"


def test_a_gateway_that_finds_all_scores_in_its_cache_hears_of_a_new_revision():
    async def check():
        fleet = Replicas()
        scoring = cached(fleet)
        await ask(scoring, ["a"])
        fleet.fingerprint = "f2"
        apps = {"v": AppStatus("RUNNING", {"Front": 1, "Reranker": 1}, 2.0)}
        fleet._follow_fingerprints(apps)
        await asyncio.gather(*fleet._asking.values())
        assert (await ask(scoring, ["a"])).scores == expected(["a"], "f2")
        fleet._follow_fingerprints({})
        assert fleet.fingerprints.of("v") == "", "deleted"

    asyncio.run(check())


# ---- pairs under way


class Gate:
    """Holds calls until it is opened; lets those through that have none of the `held` documents."""

    def __init__(self, *held: str) -> None:
        self.held = set(held)
        self.open = asyncio.Event()
        self.arrived = asyncio.Semaphore(0)

    async def __call__(self, request: ScoreRequest) -> None:
        if not self.held or self.held & set(request.documents):
            self.arrived.release()
            await self.open.wait()


def test_a_pair_under_way_is_computed_once():
    async def check():
        fleet = Replicas()
        fleet.before = gate = Gate()
        scoring = cached(fleet)
        first = asyncio.create_task(ask(scoring, ["a", "b", "c"]))
        await gate.arrived.acquire()
        second = asyncio.create_task(ask(scoring, ["c", "d", "b"]))
        await gate.arrived.acquire()
        third = asyncio.create_task(ask(scoring, ["d", "a"]))
        await asyncio.sleep(0.01)
        gate.open.set()
        results = await asyncio.gather(first, second, third)
        assert [result.scores for result in results] == [
            expected(d) for d in (["a", "b", "c"], ["c", "d", "b"], ["d", "a"])
        ]
        assert [result.cache_hits for result in results] == [0, 2, 2]
        assert fleet.computed == {"a": 1, "b": 1, "c": 1, "d": 1}
        assert not scoring._flights

    asyncio.run(check())


def test_a_pair_is_there_for_others_as_soon_as_its_chunk_is():
    async def check():
        fleet = Replicas()
        fleet.before = gate = Gate("d9")
        scoring = cached(fleet)
        whole = asyncio.create_task(ask(scoring, [f"d{i}" for i in range(10)]))
        await gate.arrived.acquire()
        part = await asyncio.wait_for(ask(scoring, ["d0", "d1"]), 1)
        assert part.cache_hits == 2
        assert not whole.done()
        gate.open.set()
        await whole

    asyncio.run(check())


@pytest.mark.parametrize("end", ["cancelled", "failed", "late"])
def test_who_waits_computes_by_itself_when_the_other_call_comes_to_nothing(end):
    async def check():
        fleet = Replicas()
        arrived = asyncio.Event()

        async def first_ends_badly(request):
            if len(fleet.calls) == 1:
                arrived.set()
                await asyncio.sleep(0.1 if end == "failed" else 60)
                raise EngineError("broke")

        fleet.before = first_ends_badly
        scoring = cached(fleet)
        first = asyncio.create_task(ask(scoring, ["a", "b"], timeout_s=0.1 if end == "late" else 10))
        await arrived.wait()
        others = [asyncio.create_task(ask(scoring, ["b", "a"])) for _ in range(5)]
        await asyncio.sleep(0.01)
        if end == "cancelled":
            first.cancel()
        results = await asyncio.wait_for(asyncio.gather(*others), 5)
        assert all(result.scores == expected(["b", "a"]) for result in results)
        assert fleet.computed == {"a": 2, "b": 2}, "by one of them for all"
        (outcome,) = await asyncio.gather(first, return_exceptions=True)
        assert isinstance(outcome, asyncio.CancelledError if end == "cancelled" else StageFailure)
        assert not scoring._flights

    asyncio.run(check())


class OneByOne:
    """Holds each call until it is let go by its number."""

    def __init__(self, fleet: Replicas) -> None:
        self.fleet = fleet
        self.arrived = [asyncio.Event() for _ in range(3)]
        self.go = [asyncio.Event() for _ in range(3)]

    async def __call__(self, request: ScoreRequest) -> None:
        number = len(self.fleet.calls) - 1
        self.arrived[number].set()
        await self.go[number].wait()


def test_a_call_that_hangs_holds_its_pairs_for_nobody():
    async def check():
        fleet = Replicas()
        fleet.before = calls = OneByOne(fleet)
        scoring = cached(fleet)
        hangs = asyncio.create_task(ask(scoring, ["a", "b"], timeout_s=60))
        await calls.arrived[0].wait()
        calls.go[1].set()
        results = await asyncio.gather(*(ask(scoring, ["b", "a"], timeout_s=4) for _ in range(5)))
        assert all(result.scores == expected(["b", "a"]) for result in results)
        assert fleet.computed == {"a": 2, "b": 2}, "by one of them for all"
        assert (await ask(scoring, ["a"])).cache_hits == 1
        calls.go[0].set()
        await hangs
        assert not scoring._flights

    asyncio.run(check())


async def slow_and_impatient(
    fleet: Replicas, documents: Sequence[str]
) -> tuple[OneByOne, Scoring, asyncio.Task[ScoreResult], asyncio.Task[ScoreResult]]:
    """A call that is held, and another of the same pairs, which has less time and computes them by itself now."""
    fleet.before = calls = OneByOne(fleet)
    scoring = cached(fleet)
    slow = asyncio.create_task(ask(scoring, documents))
    await calls.arrived[0].wait()
    impatient = asyncio.create_task(ask(scoring, documents[::-1], timeout_s=4))
    await calls.arrived[1].wait()
    return calls, scoring, slow, impatient


def test_a_call_that_is_slow_may_still_be_first():
    async def check():
        calls, scoring, slow, impatient = await slow_and_impatient(Replicas(), ["a", "b"])
        calls.go[0].set()
        result = await impatient
        assert (result.scores, result.cache_hits) == (expected(["b", "a"]), 2)
        await slow
        assert not scoring._flights

    asyncio.run(check())


def test_a_slow_call_of_another_revision_stops_nobody_who_computes_for_himself():
    async def check():
        fleet = Replicas()
        # What the calls are answered with, in the order in which they are sent.
        fleet.fingerprint = iter(["f2", "f1"]).__next__
        calls, _, slow, impatient = await slow_and_impatient(fleet, ["a"])
        calls.go[0].set()
        await slow
        calls.go[1].set()
        assert (await impatient).scores == expected(["a"])
        assert fleet.computed == {"a": 2}

    asyncio.run(check())


def test_a_slow_call_that_fails_stops_nobody_who_computes_for_himself():
    async def check():
        fleet = Replicas()
        calls, _, slow, impatient = await slow_and_impatient(fleet, ["a"])
        slow.cancel()
        await asyncio.gather(slow, return_exceptions=True)
        calls.go[1].set()
        assert (await impatient).scores == expected(["a"])
        assert fleet.computed == {"a": 2}

    asyncio.run(check())


def test_who_waits_keeps_to_its_own_deadline():
    async def check():
        fleet = Replicas()
        fleet.before = gate = Gate()
        scoring = cached(fleet)
        slow = asyncio.create_task(ask(scoring, ["a"]))
        await gate.arrived.acquire()
        started = time.monotonic()
        with pytest.raises(StageFailure) as failure:
            await ask(scoring, ["a"], timeout_s=0.1)
        assert failure.value.reason == "timeout"
        assert 0.1 <= time.monotonic() - started < 5
        gate.open.set()
        assert (await slow).scores == expected(["a"])

    asyncio.run(check())


def test_a_live_call_waits_for_no_mirrored_or_fresh_one():
    async def check():
        fleet = Replicas()
        fleet.before = gate = Gate()
        scoring = cached(fleet)
        mirrored = asyncio.create_task(ask(scoring, ["a"], mirrored=True))
        await gate.arrived.acquire()
        fleet.before = None
        assert (await asyncio.wait_for(ask(scoring, ["a"]), 1)).cache_hits == 0
        gate.open.set()
        await mirrored

    asyncio.run(check())


# ---- over HTTP


class ReplicasWithRecall(Replicas):
    """The gateway's fleet, where `small` and `large` are of one fingerprint."""

    def __init__(self) -> None:
        super().__init__()
        for variant in ("small", "large"):
            self.fingerprints.heard(variant, "f1", 0.0)


def test_answers_say_how_many_pairs_were_known():
    gateway = Gateway(ReplicasWithRecall())
    body = {"query": "q", "documents": ["a", "", "b"], "model": "small"}
    answers = [gateway.post("/v1/rerank", body).json() for _ in range(2)]
    stages = [answer["meta"]["stages"][0] for answer in answers]
    assert [(stage["pairs"], stage["cache_hits"], stage["tokens"]) for stage in stages] == [(3, 0, 2), (3, 2, 0)]
    assert answers[0]["results"] == answers[1]["results"]
    assert answers[1]["usage"] == {"prompt_tokens": 0, "total_tokens": 0}
    scored = {"text_1": "q", "text_2": ["b", "c"], "model": "small"}
    assert gateway.post("/v1/score", scored).json()["meta"]["stages"][0]["cache_hits"] == 1


def test_a_client_may_have_everything_computed():
    fleet = ReplicasWithRecall()
    gateway = Gateway(fleet)
    body = {"query": "q", "documents": ["a"], "model": "small"}
    for header, hits in (({}, 0), ({}, 1), ({"Cache-Control": "max-age=0, No-Cache"}, 0)):
        answer = gateway.post("/v1/rerank", body, header).json()
        assert answer["meta"]["stages"][0]["cache_hits"] == hits


def test_degraded_answers_are_not_kept():
    fleet = ReplicasWithRecall()
    gateway = Gateway(fleet)

    async def breaks(request):
        raise EngineError("broke")

    fleet.before = breaks
    body = {"query": "cats", "documents": ["a cat", "cats"], "model": "small"}
    assert "degraded" in gateway.post("/v1/rerank", body).json()["meta"]
    fleet.before = None
    answer = gateway.post("/v1/rerank", body).json()
    assert "degraded" not in answer["meta"]
    assert answer["meta"]["stages"][0]["cache_hits"] == 0


# ---- settings


@pytest.mark.parametrize(
    "url",
    [
        "http://:secret@h",
        "redis://:secret@",
        "redis://:secret@h/x",
        "redis://:secret@h:x",
        "redis://:secret@h?a=b",
    ],
)
def test_a_wrong_redis_is_refused_without_showing_its_password(url):
    gateway = Gateway()
    for cache in ({"redis": url}, {"reddis": url}):
        with pytest.raises(ValueError, match=r"cache\.redd?is") as error:
            Gateway(settings={**SETTINGS, "cache": cache})
        assert "secret" not in str(error.value)
        gateway.service.configure({**SETTINGS, "cache": cache})
        assert "secret" not in json.dumps(gateway.service.settings_error)


@pytest.mark.parametrize(
    "cache",
    [
        {"password": "secret"},
        {"redis": {"host": "cache", "password": "secret"}},
        {"redis_password": "secret"},
        {"redis_url": "redis://:pa'secret@h"},
        {"redis": ["redis://:secret@h"]},
    ],
)
def test_a_password_in_a_wrong_place_is_not_shown(cache):
    with pytest.raises(ValueError, match=r"user_config\.cache") as error:
        Gateway(settings={**SETTINGS, "cache": cache})
    assert "secret" not in str(error.value)


def test_a_cache_that_memory_has_no_room_for_leaves_the_old_settings_in_force(monkeypatch):
    def table(max_bytes):
        if max_bytes == 2**40:
            raise MemoryError
        return ScoreTable(max_bytes)

    monkeypatch.setattr("serve_app.gateway.scoring.ScoreTable", table)
    gateway = Gateway(settings={**SETTINGS, "cache": {"max_bytes": MIB}})
    for _ in range(2):
        gateway.service.configure({**SETTINGS, "cache": {"max_bytes": 2**40}})
        assert "cache.max_bytes" in gateway.service.settings_error
        assert gateway.service.settings.cache.max_bytes == MIB
        assert gateway.service.scoring.stats()["size_bytes"] <= MIB
    with pytest.raises(ValueError, match=r"cache\.max_bytes"):
        Gateway(settings={**SETTINGS, "cache": {"max_bytes": 2**40}})
    gateway.service.configure({**SETTINGS, "cache": {"max_bytes": 2 * MIB}})
    assert gateway.service.settings_error is None


def test_a_password_is_not_shown_with_the_settings():
    url = "redis://:secret@127.0.0.1:6379/3"
    loaded = GatewaySettings.model_validate({**SETTINGS, "cache": {"redis": url}})
    assert loaded.cache is not None
    assert "secret" not in repr(loaded)


# ---- rollouts


class RolledOut:
    """A gateway of which `placed` says where the route's calls go: `small` is stable's variant, `large` the
    canary's."""

    def __init__(self, role: str, shadow: float = 0.0) -> None:
        self.fleet = ReplicasWithRecall()
        pipelines = {name: {"stages": [{"variant": v}]} for name, v in (("old", "small"), ("new", "large"))}
        routes = {"default": {"weights": {"old": 100}, "timeout_ms": 5000}}
        self.gateway = Gateway(
            self.fleet, {"variants": SETTINGS["variants"], "pipelines": pipelines, "routes": routes}
        )
        split = Split("r1", "default", "old", "new", 100.0 if role == "canary" else 0.0, shadow)
        self.rollouts = self.gateway.service.rollouts
        self.rollouts._splits = Splits({"default": (split,)})

    def ask(self, *documents: str) -> dict[str, Any]:
        answer: dict[str, Any] = self.gateway.post("/v1/rerank", {"query": "q", "documents": documents}).json()
        return answer

    def figures(self) -> Figures:
        return functools.reduce(Figures.merge, (row[-1] for row in self.rollouts._counters.rows()))


@pytest.mark.parametrize("role", ["stable", "canary"])
def test_a_rollout_times_only_calls_that_are_computed_and_has_one_a_second(role):
    fleet = RolledOut(role)
    clock = Clock()
    fleet.rollouts.clock = clock
    for _ in range(5):
        fleet.ask("a")
    assert fleet.fleet.computed == {"a": 1}
    assert (fleet.figures().calls, fleet.figures().answered) == (5, 1)
    clock.now += 1.01
    for _ in range(5):
        fleet.ask("a")
    assert fleet.fleet.computed == {"a": 2}, "though it was known: the canary is to be tried"
    assert (fleet.figures().calls, fleet.figures().answered) == (10, 2)
    fleet.ask("b")
    fleet.ask("b", "c")
    assert fleet.fleet.computed == {"a": 2, "b": 1, "c": 1}
    assert (fleet.figures().calls, fleet.figures().answered) == (12, 3)


def test_stable_answers_for_a_canary_from_the_cache():
    fleet = RolledOut("canary")

    async def breaks(request):
        raise EngineError("broke")

    fleet.gateway.post("/v1/rerank", {"query": "q", "documents": ["a"], "model": "small"})
    fleet.fleet.before = breaks
    answer = fleet.ask("a")
    assert answer["meta"]["why"] == "fallback"
    assert answer["meta"]["stages"][0]["cache_hits"] == 1
