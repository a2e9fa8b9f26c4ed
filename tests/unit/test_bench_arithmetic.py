"""What the benchmarks compute by themselves: operations, made work, time budgets, medians."""

import asyncio
import itertools
import json
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from bench import charts, common, engine, gpu, recall
from bench.common import Spread, percentile
from bench.gpu_work import (
    COMMON_TOKENS,
    HEAD_TOKENS,
    PAIRS_A_CALL,
    Case,
    allowed_s,
    calls,
    calls_and_rounds,
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
    assert allowed_s(one, 80) == 80
    assert allowed_s(one, 59) is None
    assert allowed_s(four, 80) is None


def begun(cases: Sequence[Case], part: float) -> list[str]:
    """Those that are begun when each takes `part` of what it may beyond its least; the rest is asserted."""
    left: float = gpu.LIMIT_S - part * (gpu._CEILING_LIMIT_S + gpu._STOP_S)
    names = []
    for i, case in enumerate(cases):
        allowed = gpu.time_of(cases, i, left)
        if allowed is not None:
            assert allowed >= case.least_s
            names.append(case.name)
            left -= case.least_s + part * (allowed - case.least_s) + gpu._STOP_S
    assert left >= 0
    return names


@pytest.mark.parametrize("part", [0.0, 0.5, 1.0])
def test_all_cases_end_in_time_and_each_shape_is_among_them(part):
    names = begun(gpu.CASES, part)
    assert names[:3] == ["0.6B bf16 x1", "4B bf16 x1", "8B bf16 x1"]
    assert len(names) < len(gpu.CASES)
    if part < 1:
        # What was left out fits into further runs, none of which is in vain.
        left_out = [case for case in gpu.CASES if case.name not in names]
        while left_out:
            more = begun(left_out, part)
            assert more
            left_out = [case for case in left_out if case.name not in more]


def test_the_first_shape_leaves_the_others_their_time():
    assert gpu.time_of(gpu.CASES, 0, 480) == 150
    assert gpu.time_of(gpu.CASES, 0, 230) == 80
    assert gpu.time_of(gpu.CASES, 0, 209) is None
    assert gpu.time_of(gpu.CASES, 2, 70) == 60


def test_a_round_is_a_second_of_calls_or_four_of_them():
    assert calls_and_rounds(6400, replicas=1) == (100, 5)
    assert calls_and_rounds(6400, replicas=4) == (25, 5)
    assert calls_and_rounds(128, replicas=1) == (4, 5)
    # 8B at 1,024 tokens: two seconds a call.
    assert calls_and_rounds(32, replicas=1) == (4, 3)
    assert calls_and_rounds(16, replicas=1) == (2, 3)
    assert calls_and_rounds(1, replicas=1) == (1, 3)


def test_a_models_folder_stays_and_has_its_newest_config(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "MODELS", tmp_path)
    folder = gpu.model_folder("0.6B", {"hidden_size": 4})
    assert gpu.model_folder("0.6B", SMALL) == folder
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert json.loads((folder / "config.json").read_text()) == SMALL


def test_what_fails_unforeseen_ends_no_other_case(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "LOGS", tmp_path)
    monkeypatch.setattr(gpu, "MODELS", tmp_path)
    # Neither is JSON, which nobody foresaw.
    configs: dict[str, dict[str, Any]] = {"a": {"odd": object()}, "b": {"odd": object()}}
    result = asyncio.run(gpu._measure([Case("a"), Case("b")], configs, 1, 300, "test"))
    assert "not JSON serializable" in result["ceiling_problem"]
    assert [case["name"] for case in result["cases"]] == ["a bf16 x1", "b bf16 x1"]
    assert all("not JSON serializable" in case["problem"] for case in result["cases"])
    assert len(json.loads((tmp_path / "test.json").read_text())["cases"]) == 2


def test_the_bf16_ceiling_outlives_a_failure_of_fp8s(monkeypatch):
    script = (
        'input(); print(\'{"flops_per_s": {"a": 1e14}, "card": "c"}\', flush=True); input(); raise SystemExit(3)'
    )

    async def start(what: str, name: str) -> gpu.Child:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", script), stdin=pipe, stdout=pipe, start_new_session=True
        )
        return gpu.Child(process, gpu.LOGS / "ceiling.log")

    monkeypatch.setattr(gpu.Child, "start", start)
    result: dict[str, Any] = {"ceiling": None}
    with pytest.raises(gpu.CaseError, match="ended with 3"):
        asyncio.run(gpu._ceiling({"a": SMALL}, 1, result))
    assert result["ceiling"] == {"flops_per_s": {"a": {"bf16": 1e14}}, "card": "c"}


def test_what_was_begun_or_is_wanted_must_be_whole():
    lengths = {str(tokens): {} for tokens in gpu.DOCUMENT_TOKENS}
    whole = {"cases": [{"name": "a", "lengths": lengths}], "left_out": []}
    part = {"name": "b", "lengths": {"64": {}}}
    assert gpu.complete(whole, ["a"])
    assert gpu.complete(whole | {"left_out": ["b"]}, ["a"])
    assert not gpu.complete(whole | {"left_out": ["b"]}, ["a", "b"])
    assert not gpu.complete({"cases": [], "left_out": ["a"]}, ["a"])
    # It failed by itself, or was cut off as the time was up.
    assert not gpu.complete({"cases": [*whole["cases"], part], "left_out": []}, ["a"])
    assert gpu.complete({"cases": [*whole["cases"], part], "left_out": ["b"]}, ["a"])


def test_cases_of_earlier_runs_stay_with_their_own_machine():
    def case(name: str, machine: str, lengths: int) -> dict[str, Any]:
        return {"name": name, "machine": machine, "lengths": dict.fromkeys(gpu.DOCUMENT_TOKENS[:lengths])}

    before = {"machine": "old", "cases": [case("a", "old", 3), case("b", "old", 3), case("c", "old", 1)]}
    result = {"left_out": [], "cases": [case("b", "new", 0), case("c", "new", 2), case("d", "new", 0)]}
    merged = gpu.with_kept(result, before)
    assert {one["name"]: one["machine"] for one in merged["cases"]} == {
        "a": "old",
        "b": "old",
        "c": "new",
        "d": "new",
    }
    assert len(result["cases"]) == 3


def test_a_run_of_one_case_keeps_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)

    async def ceiling(configs: object, tokens: int, result: dict[str, Any]) -> None:
        result["ceiling"] = {"card": "c", "flops_per_s": {"0.6B": {"bf16": 1e14}}}

    async def case(case: Case, config: object, found: dict[str, Any]) -> None:
        one = {"calls": 4, "pairs_per_s": 90.0, "cached_tokens_a_pair": 48.0}
        found["rounds"] |= {str(tokens): [one] for tokens in gpu.DOCUMENT_TOKENS}

    monkeypatch.setattr(gpu, "_ceiling", ceiling)
    monkeypatch.setattr(gpu, "_case", case)
    for names in (["0.6B bf16 x1"], ["0.6B bf16 x2"]):
        cases = [case for case in gpu.CASES if case.name in names]
        asyncio.run(gpu._measure(cases, gpu.CONFIGS, 1, 300, "test"))
    found = common.saved("test")["cases"]
    assert [one["name"] for one in found] == ["0.6B bf16 x1", "0.6B bf16 x2"]
    assert all(one["ceiling"]["card"] == "c" and one["machine"]["cores"] for one in found)
    gpu.draw(common.saved("test"), tmp_path / "test.png")
    assert (tmp_path / "test.png").stat().st_size


def test_shapes_of_earlier_runs_stay_with_their_own_machine_and_are_drawn():
    def ways(rate: float) -> dict[str, Any]:
        return {"bare": {"rates": [rate, rate], "lag_p99_ms": 0.0}}

    older = {"machine": "old", "rounds": 5, "pairs_per_s": {"tiny": ways(1), "25m": ways(2)}}
    run = {"pairs_per_s": {"tiny": {"machine": "new", "rounds": 3, "ways": ways(3)}}}
    merged = engine.with_kept(run, older)
    assert merged["pairs_per_s"] == {
        "tiny": {"machine": "new", "rounds": 3, "ways": ways(3)},
        "25m": {"machine": "old", "rounds": 5, "ways": ways(2)},
    }
    assert engine.with_kept(run, merged) == merged
    assert engine.with_kept(run, {}) == run
    for result in (older, merged):
        assert [bars["bare"]["8 calls"] for _, _, bars in charts._engine(result)] == [
            result["pairs_per_s"][shape].get("ways", result["pairs_per_s"][shape])["bare"]["rates"][1]
            for shape in ("tiny", "25m")
        ]


def test_load_and_time_are_those_before_the_benchmark(monkeypatch):
    before = common.machine()
    monkeypatch.setattr(common.os, "getloadavg", lambda: (99.0, 99.0, 99.0))
    monkeypatch.setattr(common.time, "gmtime", lambda: (2001, 1, 1, 0, 0, 0, 0, 1, 0))
    assert common.machine() == before


def test_figures_are_of_what_was_computed():
    rounds = {
        "64": [{"calls": 4, "pairs_per_s": rate, "cached_tokens_a_pair": 48.0} for rate in (90.0, 100.0, 120.0)]
    }
    ceiling = {"flops_per_s": {"0.6B": {"bf16": 1e14, "fp8": 2e14}}}
    config = gpu.CONFIGS["0.6B"]
    flops = pairs_flops(config, prompt_tokens(64), 48)
    bf16 = gpu.figures(Case("0.6B"), config, rounds, ceiling)["64"]
    assert bf16["pairs_per_s"] == Spread(100, 90, 120)
    assert (bf16["rounds"], bf16["calls_a_round"]) == (3, 4)
    assert bf16["share_of_ceiling"].median == pytest.approx(100 * flops / 1e14)
    fp8 = gpu.figures(Case("0.6B", gpu.FP8), config, rounds, ceiling)["64"]
    assert fp8["share_of_ceiling"].median == pytest.approx(bf16["share_of_ceiling"].median / 2)
    assert gpu.figures(Case("0.6B"), config, rounds, None)["64"]["share_of_ceiling"] is None
    only = {"flops_per_s": {"0.6B": {"bf16": 1e14}}}
    assert gpu.figures(Case("0.6B", gpu.FP8), config, rounds, only)["64"]["share_of_ceiling"] is None


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
