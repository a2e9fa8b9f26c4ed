"""Known candidates of searches, over a fleet whose recall replicas are functions."""

import asyncio
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.config import Cache
from serve_app.gateway.fingerprints import Fingerprints
from serve_app.gateway.fleet import Fleet
from serve_app.gateway.pipeline import StageFailure
from serve_app.gateway.recalling import CandidateCache, Recalled, Recalling
from serve_app.recall.messages import Candidate, RecallRequest, RecallResult
from serve_app.status import AppStatus
from tests.unit.gateway_double import Gateway

KIB = 1024


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Catalogue(Fleet):
    """`build` is the index that the next call finds; `before` is called by each and may raise."""

    def __init__(self) -> None:
        super().__init__()
        self.build = "b1"
        self.before: Callable[[], None] = lambda: None
        self.searches = 0

    async def _call(self, app: str, deployment: str, method: str, *arguments: Any) -> Any:
        self.before()
        if method == "stats":
            return {"fingerprint": self.build}
        (request,) = arguments
        self.searches += 1
        found = [candidate(f"{self.build} {request.query} {i}") for i in range(request.k)]
        return RecallResult(found, 0.1, self.build)


def candidate(id: str, text: str = "some text") -> Candidate:
    return Candidate(id, 1.0, "", text, "{}")


def recall(
    recalling: Recalling, query: str = "q", k: int = 3, app: str = "catalogue", fresh: bool = False
) -> Recalled:
    return asyncio.run(recalling.recall(app, RecallRequest(query, k), fresh=fresh))


def cached(fleet: Fleet, **changes: Any) -> Recalling:
    recalling = Recalling(fleet)
    recalling.configure(Cache(**changes))
    return recalling


def builds(recalled: Recalled) -> set[str]:
    return {candidate.id.split()[0] for candidate in recalled.candidates}


# ---- the table

_PUTS = st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 12)), max_size=40)


@given(_PUTS, st.integers(0, 8 * KIB))
@settings(max_examples=200)
def test_it_holds_the_newest_that_fit_and_never_more_than_its_bytes(puts, max_bytes):
    cache = CandidateCache(max_bytes)
    last: dict[str, list[Candidate]] = {}
    for key, n in puts:
        last[key] = [candidate(f"{key}{i}") for i in range(n)]
        cache.put((key,), last[key], 60)
        assert 0 <= cache.size_bytes <= max_bytes
    for key, candidates in last.items():
        assert cache.get((key,)) in (candidates, None)
    if puts and max_bytes >= 4 * KIB:
        assert cache.get((puts[-1][0],)) == last[puts[-1][0]]


def test_the_least_recently_used_makes_room():
    some = [candidate(str(i)) for i in range(10)]
    one = CandidateCache(10**6)
    one.put(("a",), some, 60)
    cache = CandidateCache(2 * one.size_bytes)
    cache.put(("a",), some, 60)
    cache.put(("b",), some, 60)
    assert cache.get(("a",)) is not None
    cache.put(("c",), some, 60)
    assert [cache.get((key,)) is not None for key in "abc"] == [True, False, True]


def test_what_is_past_its_time_is_gone():
    clock = Clock()
    cache = CandidateCache(KIB, clock)
    cache.put(("a",), [candidate("a")], 60)
    clock.now += 59.9
    assert cache.get(("a",)) is not None
    clock.now += 0.1
    assert cache.get(("a",)) is None
    assert cache.size_bytes == 0


def test_the_size_is_what_the_lists_take():
    def made() -> list[Candidate]:
        texts = (f"{'长' if i % 2 else 'x'}{i} " * 100 for i in range(200))
        return [Candidate(f"id {i}", i / 7, f"title {i}", text, f"{{{text}}}") for i, text in enumerate(texts)]

    cache = CandidateCache(10**8)
    tracemalloc.start()
    try:
        for i in range(10):
            cache.put((str(i),), made(), 60)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert cache.size_bytes == pytest.approx(taken, rel=0.05)


# ---- in front of recall


def test_the_same_search_again_asks_no_recall():
    fleet = Catalogue()
    recalling = cached(fleet)
    first, again = recall(recalling), recall(recalling)
    assert (first.cached, again.cached, fleet.searches) == (False, True, 1)
    assert first.candidates == again.candidates
    assert not recall(recalling, "another").cached
    assert not recall(recalling, k=4).cached
    assert not recall(recalling, app="another").cached
    assert fleet.searches == 4


def test_a_fresh_call_asks_recall_and_leaves_what_it_found():
    fleet = Catalogue()
    recalling = cached(fleet)
    assert not recall(recalling, fresh=True).cached
    assert recall(recalling).cached
    assert not recall(recalling, fresh=True).cached
    assert fleet.searches == 2


@pytest.mark.parametrize("changes", [{"recall_max_bytes": 0}, None])
def test_it_can_be_turned_off(changes):
    fleet = Catalogue()
    recalling = cached(fleet)
    recall(recalling)
    recalling.configure(None if changes is None else Cache(**changes))
    assert not recall(recalling).cached
    assert not recall(recalling).cached
    assert recalling.size_bytes == 0


def test_a_shorter_time_goes_for_what_is_known_already():
    recalling = cached(Catalogue(), ttl_s=3600)
    recall(recalling)
    recalling.configure(Cache(ttl_s=7200))
    assert recall(recalling).cached
    recalling.configure(Cache(ttl_s=3600))
    assert not recall(recalling).cached
    assert recall(recalling).cached


def test_a_failure_is_not_kept_and_what_is_known_needs_no_recall():
    fleet = Catalogue()
    recalling = cached(fleet)
    recall(recalling, "known")

    def breaks() -> None:
        raise RuntimeError("gone")

    fleet.before = breaks
    with pytest.raises(StageFailure):
        recall(recalling, "new")
    assert recall(recalling, "known").cached
    fleet.before = lambda: None
    assert not recall(recalling, "new").cached


def test_candidates_of_a_rebuilt_index_are_found_as_soon_as_recall_has_answered_once():
    fleet = Catalogue()
    recalling = cached(fleet)
    recall(recalling, "a")
    fleet.build = "b2"
    assert builds(recall(recalling, "b")) == {"b2"}
    answer = recall(recalling, "a")
    assert (builds(answer), answer.cached) == ({"b2"}, False)


def test_a_gateway_that_knows_every_search_hears_of_a_rebuilt_index():
    async def check():
        fleet = Catalogue()
        recalling = cached(fleet)
        request = RecallRequest("q", 3)
        apps = {"catalogue": AppStatus("RUNNING", {"Front": 1, "Recall": 1}, 1.0)}

        async def looked_at_the_status() -> bool:
            fleet._follow_fingerprints(apps)
            asking = list(fleet._asking.values())
            await asyncio.gather(*asking)
            return bool(asking)

        assert await looked_at_the_status()
        await recalling.recall("catalogue", request, fresh=False)
        apps["catalogue"].deployed_at_s = 2.0
        fleet.build = "b2"
        assert await looked_at_the_status()
        answer = await recalling.recall("catalogue", request, fresh=False)
        assert (builds(answer), answer.cached) == ({"b2"}, False)

    asyncio.run(check())


def test_a_restarted_replica_is_heard_of_and_a_variant_at_rest_is_left_alone():
    clock = Clock()
    fingerprints = Fingerprints(clock)
    fingerprints.follow("c", "RUNNING", 1, 1.0, every_s=10)
    clock.now += 100
    fingerprints.heard("c", "b1", clock.now)
    clock.now += 9.9
    assert not fingerprints.follow("c", "RUNNING", 1, 1.0, every_s=10)
    clock.now += 0.1
    assert fingerprints.follow("c", "RUNNING", 1, 1.0, every_s=10)
    assert not fingerprints.follow("c", "RUNNING", 0, 1.0, every_s=10), "it would be woken"


# ---- over HTTP


def test_answers_say_that_candidates_were_known():
    gateway = Gateway(Catalogue())
    body = {"query": "q", "model": "bm25"}
    first, again = (gateway.post("/v1/search", body).json() for _ in range(2))
    assert first["results"] == again["results"]
    assert "cached" not in first["meta"]["stages"][0]
    assert again["meta"]["stages"][0]["cached"] is True
    fresh = gateway.post("/v1/search", body, {"Cache-Control": "no-cache"}).json()
    assert "cached" not in fresh["meta"]["stages"][0]
