"""`serve-app plan`: the table for a config, how replicas are packed, and what it exits with."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from serve_app.cli import main
from serve_app.configfile import load
from serve_app.launch import least_resources
from serve_app.plan import Plan, gpus_at_start, packed, plan, replica_counts
from serve_app.reranker.memory import GIB, budget_bytes

ROOT = Path(__file__).parents[2]
FLEET = ROOT / "configs" / "fleet.yaml"


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def planned(path: Path, gpu_memory_gib: float = 80) -> Plan:
    return plan(load(path), gpu_memory_gib)


def changed(tmp_path: Path, old: str, new: str) -> Path:
    text = FLEET.read_text("utf-8")
    assert old in text
    path = tmp_path / "config.yaml"
    path.write_text(text.replace(old, new))
    return path


def one(tmp_path: Path, args: dict[str, Any], **deployment: Any) -> Path:
    reranker = {"name": "Reranker", **deployment}
    application = {"name": "v", "import_path": "serve_app.reranker:build", "route_prefix": None, "args": args}
    path = tmp_path / "one.yaml"
    path.write_text(yaml.safe_dump({"applications": [{**application, "deployments": [reranker]}]}))
    return path


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        # Weights by hand: parameters x bytes. KV: 8208 tokens x layers x 2 x 8 heads x 128 x 2 bytes.
        # Workspace: 16384 tokens x 2 bytes x (4 hidden + 3 inner), and 0.75 GiB.
        ("", [(1.110, 0.877, 1.156, 0.05), (7.491, 1.127, 1.953, 0.15), (14.096, 1.127, 2.375, 0.24)]),
        (
            ", quantization: fp8_per_tensor",
            [(0.700, 0.877, 1.156, 0.05), (4.107, 1.127, 1.953, 0.11), (7.627, 1.127, 2.375, 0.16)],
        ),
    ],
    ids=["bf16", "fp8"],
)
def test_the_fleet_on_80_gib(
    tmp_path: Path, quantization: str, expected: list[tuple[float, float, float, float]]
) -> None:
    made = planned(
        changed(tmp_path, "engine: {max_model_len: 8192", "engine: {max_model_len: 8192" + quantization)
    )
    assert made.fits
    assert [v.variant for v in made.variants] == ["qwen3-0.6b", "qwen3-4b", "qwen3-8b"]
    for variant, (weights, kv, workspace, smallest) in zip(made.variants, expected, strict=True):
        assert variant.needs_gib == pytest.approx((weights, kv, workspace), abs=0.006)
        assert variant.smallest_num_gpus == smallest
        assert variant.source == "built-in table"
        # By hand once more: the least share s with 0.95 s 80 - 0.5, and at most 0.92 s 80, above the sum.
        assert variant.total_needs_gib is not None
        least = max((variant.total_needs_gib + 0.5) / 0.95, variant.total_needs_gib / 0.92) / 80
        assert smallest == math.ceil(least * 100) / 100
    assert (made.gpus_at_min, made.gpus_at_start, made.gpus_at_max) == (2, 2, 6)


def test_tokens_that_fit_are_the_budget_less_weights_and_workspace() -> None:
    small = planned(FLEET).variants[0]
    assert small.needs_gib is not None
    assert small.kv_tokens is not None
    left = budget_bytes(0.25, 80 * GIB) - (small.needs_gib[0] + small.needs_gib[2]) * GIB
    assert 0 <= left / 114_688 - small.kv_tokens < 33
    assert small.prompts == small.kv_tokens // 8192


def test_a_share_that_is_too_small_fails_with_the_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = changed(tmp_path, "num_gpus: 0.5", "num_gpus: 0.1")
    assert main(["plan", str(path), "--gpu-memory", "80"]) == 1
    printed = capsys.readouterr().out
    assert "qwen3-4b: num_gpus is 0.1: 8.00 GiB of the GPU's 80.00 GiB" in printed
    assert "smallest num_gpus that fits: 0.15" in printed
    assert "no, from 0.15" in printed


def test_the_table_and_the_json_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(FLEET), "--gpu-memory", "80"]) == 0
    table = capsys.readouterr().out.splitlines()
    row = "qwen3-4b 0.5 40.00 10.58 = 7.50 + 1.13 + 1.96 199,168 24 2 1 to 4 yes, from 0.15"
    assert " ".join(table[2].split()) == row
    assert table[-1] == "GPUs of 80 GiB, fractions packed: 2 at the least replicas, 6 at the most."
    assert main(["plan", str(FLEET), "--gpu-memory", "80", "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert seen["fits"] is True
    assert seen["gpus_at_max"] == 6
    assert seen["variants"][1]["kv_tokens"] == 199_168


def test_variants_on_the_cpu_take_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(ROOT / "configs" / "local.yaml"), "--gpu-memory", "24"]) == 0
    printed = capsys.readouterr().out
    assert "CPU" in printed
    assert "0 at the least replicas, 0 at the most" in printed


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"model": "someone/unknown"}, "model is 'someone/unknown', whose config.json"),
        (
            {"model": "Qwen/Qwen3-Reranker-0.6B", "engine": {"tensor_parallel_size": 2}},
            "tensor_parallel_size is 2",
        ),
    ],
)
def test_what_cannot_be_said_is_a_failure_too(tmp_path: Path, args: dict[str, Any], message: str) -> None:
    path = one(tmp_path, {"kind": "qwen3-reranker", **args}, ray_actor_options={"num_gpus": 0.25})
    made = planned(path)
    assert not made.fits
    assert message in str(made.variants[0].problem)
    assert message in made.table()


def test_a_model_that_names_no_longest_prompt_is_planned_all_the_same(tmp_path: Path) -> None:
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 64, "head_dim": 32,
              "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
              "vocab_size": 1000}  # fmt: skip
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    args = {"model": str(tmp_path / "m"), "kind": "qwen3-reranker"}
    (variant,) = planned(one(tmp_path, args, ray_actor_options={"num_gpus": 0.25})).variants
    assert variant.prompts is None
    assert variant.kv_tokens
    assert variant.problem is None


def test_a_hub_that_is_down_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def down(name: str, revision: str | None) -> dict[str, Any]:
        asked.append(name)
        raise ConnectionError("no network")

    monkeypatch.setattr("serve_app.plan.hub_config", down)
    made = planned(changed(tmp_path, "model: Qwen/Qwen3-Reranker-", "model: someone/"))
    assert [variant.source for variant in made.variants] == [None] * 3
    assert asked == ["someone/0.6B"]


@pytest.mark.parametrize(("arguments", "code"), [(["nowhere.yaml", "--gpu-memory", "80"], 2)])
def test_a_config_that_is_none_is_a_wrong_command(arguments: list[str], code: int) -> None:
    assert main(["plan", *arguments]) == code


@pytest.mark.parametrize("size", ["0", "x", "nan", "-1"])
def test_a_gpu_without_memory_is_a_wrong_command(size: str) -> None:
    with pytest.raises(SystemExit) as error:
        main(["plan", str(FLEET), "--gpu-memory", size])
    assert error.value.code == 2


@pytest.mark.parametrize(
    ("deployment", "counts"),
    [
        ({}, (1, 1, 1)),
        ({"num_replicas": 3}, (3, 3, 3)),
        ({"num_replicas": "auto"}, (1, 1, 100)),
        ({"num_replicas": "auto", "autoscaling_config": {"max_replicas": 5}}, (1, 1, 5)),
        ({"num_replicas": "auto", "autoscaling_config": {"min_replicas": 2}}, (2, 2, 100)),
        ({"autoscaling_config": {"min_replicas": 0, "max_replicas": 4}}, (0, 0, 4)),
        ({"autoscaling_config": {"min_replicas": 1, "initial_replicas": 2, "max_replicas": 4}}, (1, 2, 4)),
        ({"autoscaling_config": {}}, (1, 1, 1)),
    ],
)
def test_replica_counts_are_serve_s(deployment: dict[str, Any], counts: tuple[int, int, int]) -> None:
    assert replica_counts(deployment) == counts


def test_initial_replicas_are_said(tmp_path: Path) -> None:
    scaling = {"min_replicas": 0, "initial_replicas": 2, "max_replicas": 4}
    args = {"model": "Qwen/Qwen3-Reranker-8B", "kind": "qwen3-reranker", "engine": {"max_model_len": 8192}}
    made = planned(one(tmp_path, args, autoscaling_config=scaling, ray_actor_options={"num_gpus": 2}))
    assert (made.gpus_at_min, made.gpus_at_start, made.gpus_at_max) == (0, 4, 8)
    assert "0 at the least replicas, 4 at first, 8 at the most" in made.table()
    assert "0 to 4, first 2" in made.table()
    assert "1 on 2" in made.table()


def test_shares_that_add_up_to_two_gpus_may_need_three(tmp_path: Path) -> None:
    args = {"model": "Qwen/Qwen3-Reranker-0.6B", "kind": "qwen3-reranker"}
    config = load(one(tmp_path, args, num_replicas=3, ray_actor_options={"num_gpus": 0.6}))
    assert least_resources(config)["num_gpus"] == pytest.approx(1.8)
    assert gpus_at_start(config) == 3


def test_shares_that_fill_the_gpus_are_counted_as_ray_counts_them(tmp_path: Path) -> None:
    """0.8 + 0.8 + 0.8 + 6 * 0.1 is more than 3 in floating point."""
    args = {"model": "Qwen/Qwen3-Reranker-0.6B", "kind": "qwen3-reranker"}
    path = one(tmp_path, args, num_replicas=3, ray_actor_options={"num_gpus": 0.8})
    raw = yaml.safe_load(path.read_text())
    second = {"name": "Reranker", "num_replicas": 6, "ray_actor_options": {"num_gpus": 0.1}}
    raw["applications"].append({**raw["applications"][0], "name": "w", "deployments": [second]})
    path.write_text(yaml.safe_dump(raw))
    assert least_resources(load(path))["num_gpus"] == 3
    assert gpus_at_start(load(path)) == 3


def test_a_share_that_rays_numbers_round_to_nothing_is_shown(tmp_path: Path) -> None:
    args = {"model": "Qwen/Qwen3-Reranker-0.6B", "kind": "qwen3-reranker"}
    assert "no" in planned(one(tmp_path, args, ray_actor_options={"num_gpus": 0.00001})).table()


@pytest.mark.parametrize(
    ("shares", "gpus"),
    [
        ([], 0),
        ([0, 0], 0),
        ([2500] * 4, 1),
        ([2500] * 5, 2),
        # Two of 0.4 leave 0.2, which a third is never split over.
        ([4000] * 5, 3),
        ([3333] * 3, 1),
        ([6000, 4000, 6000, 4000], 2),
        ([10_000, 20_000, 5000], 4),
    ],
)
def test_fractions_are_packed_and_never_split(shares: list[int], gpus: int) -> None:
    assert packed(shares) == gpus


@given(st.lists(st.integers(1, 10_000), max_size=60))
def test_packing_lies_between_the_sum_and_one_each(shares: list[int]) -> None:
    assert math.ceil(sum(shares) / 10_000) <= packed(shares) <= len(shares)
