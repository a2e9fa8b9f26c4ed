"""The replica that a chunk belongs to: the same for the same query, and hardly moved by others."""

import asyncio
from collections import Counter
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from serve_app.gateway.scoring import even_chunk
from serve_app.reranker.messages import ScoreRequest
from serve_app.reranker.router import PrefixRouter, home

IDS = st.lists(st.text(st.characters(codec="ascii"), min_size=1, max_size=12), min_size=1, max_size=8, unique=True)


def chunk(query: str, part: int = 0, instruction: str | None = None) -> ScoreRequest:
    return ScoreRequest(query, ["a document"], instruction, part=part)


@given(st.text(), IDS)
def test_chunks_of_one_call_belong_to_different_replicas(query: str, ids: list[str]) -> None:
    assert len({home(chunk(query, part), ids) for part in range(len(ids))}) == len(ids)


@given(st.text(), IDS, st.randoms(use_true_random=False))
def test_the_order_in_which_replicas_are_known_does_not_matter(query: str, ids: list[str], rng) -> None:
    shuffled = rng.sample(ids, len(ids))
    assert ids[home(chunk(query), ids)] == shuffled[home(chunk(query), shuffled)]


def test_queries_spread_evenly_and_a_lost_replica_moves_only_its_own() -> None:
    ids = [f"replica-{i:x}" for i in range(5)]
    queries = [chunk(f"query {i}") for i in range(5000)]
    before = [ids[home(query, ids)] for query in queries]
    counts = Counter(before)
    # Binomial(5000, 1/5): five standard deviations are 141.
    assert all(abs(counts[name] - 1000) < 141 for name in ids), counts
    left = ids[1:]
    after = [left[home(query, left)] for query in queries]
    assert all(a == b for a, b in zip(before, after, strict=True) if b != ids[0] and a != ids[0])
    assert home(chunk("q", instruction="a"), ids) == home(chunk("q", instruction="a"), ids)


def test_the_router_puts_a_querys_own_replica_first_and_adds_others_by_chance() -> None:
    replicas = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=f"r{i}")) for i in range(4)]
    router = PrefixRouter.__new__(PrefixRouter)

    def choose(*args: object) -> list[SimpleNamespace]:
        (ranked,) = asyncio.run(router.choose_replicas(replicas, SimpleNamespace(args=args)))
        return ranked

    own = replicas[home(chunk("cats"), [f"r{i}" for i in range(4)])]
    others: Counter[str] = Counter()
    for _ in range(200):
        chosen = choose(chunk("cats"))
        assert chosen[0] is own
        assert 2 <= len(chosen) == len({id(replica) for replica in chosen}) <= 3
        others.update(replica.replica_id.unique_id for replica in chosen[1:])
    assert len(others) == 3
    # What isn't a chunk, such as the question for the fingerprint, goes anywhere.
    assert {choose()[0].replica_id.unique_id for _ in range(100)} == {"r0", "r1", "r2", "r3"}


@given(st.integers(1, 5000), st.integers(1, 300))
def test_chunks_are_as_few_as_can_be_and_even(pairs: int, at_most: int) -> None:
    size = even_chunk(pairs, at_most)
    sizes = [min(size, pairs - i) for i in range(0, pairs, size)]
    assert max(sizes) <= at_most
    assert len(sizes) <= -(-pairs // at_most)
    assert max(sizes) == -(-pairs // -(-pairs // at_most))
