"""What the benchmarks compute by themselves: operations, made work, time budgets, medians."""

import itertools

import pytest

from bench import gpu, recall
from bench.common import Spread, percentile
from bench.gpu_work import (
    COMMON_TOKENS,
    HEAD_TOKENS,
    PAIRS_A_CALL,
    Case,
    allowed_s,
    calls,
    calls_a_round,
    gemm_flops,
    gemms,
    pairs_flops,
    prompt_tokens,
)
from bench.recall_engines import memory, timed
from serve_app.reranker.memory import parameters

SMALL = {
    "model_type": "qwen3",
    "hidden_size": 4,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 2,
    "vocab_size": 64,
}


def test_operations_of_a_pair_by_hand():
    # A layer: queries 4x4, keys 4x2, values 4x2, output 4x4, gate, up and down 4x8 each: 144 weights, twice.
    # Three tokens: 2 x 288 x 3 = 1,728. They see 1, 2 and 3 tokens: 4 x 4 wide x 2 layers x 6 = 192.
    assert pairs_flops(SMALL, tokens=3, cached=0) == 1728 + 192
    # One of them cached: 2 x 288 x 2 = 1,152; the other two see 2 and 3: 4 x 4 x 2 x 5 = 160.
    assert pairs_flops(SMALL, tokens=3, cached=1) == 1152 + 160
    assert pairs_flops(SMALL, tokens=3, cached=1, pairs=10) == 13_120
    assert pairs_flops(SMALL, tokens=3, cached=3) == 0


def test_a_layers_multiplications_are_its_weights():
    assert gemms(SMALL) == [(8, 4), (4, 4), (16, 4), (4, 8)]
    assert gemm_flops((8, 4), tokens=5) == 2 * 5 * 32
    for config in gpu.CONFIGS.values():
        counted = parameters(config)
        assert counted is not None
        weights = sum(outputs * inputs for outputs, inputs in gemms(config))
        assert weights * config["num_hidden_layers"] == counted.linear


def test_operations_of_the_published_shapes():
    # 8B: 36 layers of 4,096 x (4,096 + 2 x 1,024) + 4,096 x 4,096 + 3 x 4,096 x 12,288 weights, nearly 7 billion.
    eight = gpu.CONFIGS["8B"]
    linear = 36 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 12288)
    attention = 4 * 4096 * 36 * (1103 * 1104 / 2)
    assert linear == 6_945_767_424
    assert pairs_flops(eight, prompt_tokens(1024), 0) == 2 * linear * 1103 + attention
    # Two operations a weight and token is most of it; attention's part grows with the length.
    assert (
        1.0 < pairs_flops(eight, 143, 0) / (2 * linear * 143) < pairs_flops(eight, 1103, 0) / (2 * linear * 1103)
    )


def test_calls_share_their_heads_and_nothing_else():
    (one, two), (other, _) = calls(2048, 64, 2, "a"), calls(2048, 64, 2, "b")
    assert len(one) == PAIRS_A_CALL
    assert {len(ids) for ids in one} == {prompt_tokens(64)}
    assert len({tuple(ids[:HEAD_TOKENS]) for ids in one}) == 1
    assert len({tuple(ids) for ids in [*one, *two, *other]}) == 3 * PAIRS_A_CALL
    heads = {tuple(call[0][:HEAD_TOKENS]) for call in (one, two, other)}
    assert len(heads) == 3
    assert len({head[:COMMON_TOKENS] for head in heads}) == 1
    assert one == calls(2048, 64, 1, "a")[0]


def test_a_case_that_has_too_little_time_is_not_begun():
    one, four = Case("0.6B"), Case("0.6B", replicas=4)
    assert allowed_s(one, 300) == one.limit_s
    assert allowed_s(one, 50) == 50
    assert allowed_s(one, 29) is None
    assert allowed_s(four, 50) is None
    assert sum(case.least_s for case in gpu.CASES) < gpu.LIMIT_S


def test_a_round_is_a_second_of_work_or_one_call():
    assert calls_a_round(6400, replicas=1) == 100
    assert calls_a_round(6400, replicas=4) == 25
    assert calls_a_round(30, replicas=1) == 1


def test_figures_are_of_what_was_computed():
    rounds = {"64": [{"pairs_per_s": rate, "cached_tokens_a_pair": 48.0} for rate in (90.0, 100.0, 120.0)]}
    ceiling = {"flops_per_s": {"0.6B": {"bf16": 1e14, "fp8": 2e14}}}
    config = gpu.CONFIGS["0.6B"]
    flops = pairs_flops(config, prompt_tokens(64), 48)
    bf16 = gpu.figures(Case("0.6B"), config, rounds, ceiling)["64"]
    assert bf16["pairs_per_s"] == Spread(100, 90, 120)
    assert bf16["share_of_ceiling"].median == pytest.approx(100 * flops / 1e14)
    fp8 = gpu.figures(Case("0.6B", gpu.FP8), config, rounds, ceiling)["64"]
    assert fp8["share_of_ceiling"].median == pytest.approx(bf16["share_of_ceiling"].median / 2)
    assert gpu.figures(Case("0.6B"), config, rounds, None)["64"]["share_of_ceiling"] is None


def test_the_made_catalogue_is_the_same_each_time_and_follows_zipf():
    documents = list(recall.catalogue(2000))
    assert documents[:500] == list(itertools.islice(recall.catalogue(2000), 500))
    assert {len(words) for words in documents} == set(range(20, 41))
    vocabulary = recall.words()
    assert len(set(vocabulary)) == len(vocabulary)
    counts = {rank: sum(words.count(vocabulary[rank - 1]) for words in documents) for rank in (1, 10)}
    assert counts[1] / counts[10] == pytest.approx(10, rel=0.2)


def test_a_queries_words_are_those_of_one_document(tmp_path):
    rounds = recall._made_catalogue(2000, tmp_path, rounds=1)
    assert [len(queries) for queries in rounds] == [200, 200]
    documents = [set(words) for words in recall.catalogue(2000)]
    query = set(rounds[0][0].split())
    assert len(query) == 4
    assert any(query <= words for words in documents)


def test_each_query_is_timed_and_memory_is_read():
    class Index:
        def search(self, query: str, k: int) -> list[str]:
            return [query] * k

    seconds, took_ms = timed(Index(), ["a", "b", "c"], 2, threads=2)
    assert len(took_ms) == 3
    assert 0 < sum(took_ms) / 1e3 <= 2 * seconds
    assert 0 < memory()["anonymous_bytes"] <= memory()["bytes"]


def test_percentiles_and_spreads():
    assert percentile([4, 1, 3, 2], 0.5) == 2
    assert percentile(range(1, 101), 0.95) == 95
    assert Spread.of([3, 1, 2]) == Spread(2, 1, 3)
