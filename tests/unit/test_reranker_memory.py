"""What a model needs of a GPU and what a share gives: by hand, by law, and against models as they are built."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.config import RerankerArgs
from serve_app.reranker.engine_args import engine_settings
from serve_app.reranker.memory import (
    CONTEXT_BYTES,
    GIB,
    budget_bytes,
    kv_bytes_a_token,
    kv_cache_bytes,
    needs,
    parameters,
    smallest_share,
    utilisation,
)
from serve_app.reranker.model import Model
from serve_app.reranker.share import Shape, check_head_rows, find_shape, judge, stored_parameters


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def args(model: object = "Qwen/Qwen3-Reranker-0.6B", kind: str = "qwen3-reranker", **engine: Any) -> RerankerArgs:
    return RerankerArgs.model_validate({"model": str(model), "kind": kind, "engine": engine})


def published(size: str) -> Shape:
    return find_shape(args(f"Qwen/Qwen3-Reranker-{size}"))


def fit(size: str, gpus: float, card_gib: float = 80, **engine: Any) -> Any:
    asked = args(f"Qwen/Qwen3-Reranker-{size}", **{"max_model_len": 8192, **engine})
    return judge(asked, published(size), gpus, int(card_gib * GIB))


# Counts


@pytest.mark.parametrize(
    ("size", "hidden", "qwen3", "heads"),
    # What Qwen3-0.6B, 4B and 8B have as published, with 151,936 rows of vocabulary; 8B has a head of its own.
    [("0.6B", 1024, 596_049_920, 1), ("4B", 2560, 4_022_468_096, 1), ("8B", 4096, 8_190_735_360, 2)],
)
def test_published_models_have_their_published_number_of_parameters(
    size: str, hidden: int, qwen3: int, heads: int
) -> None:
    shape = published(size)
    assert shape.source == "built-in table"
    assert shape.parameters is not None
    # vLLM's table has 151,680 rows for 151,669 tokens.
    whole = shape.parameters.count + (shape.parameters.head if heads == 2 else 0)
    assert whole == qwen3 - heads * (151_936 - 151_680) * hidden


def built(name: str, **settings: Any) -> tuple[dict[str, Any], int]:
    """A configuration and how many parameters transformers gives it, without memory for them."""
    import torch
    import transformers

    config = getattr(transformers, f"{name}Config")(**settings)
    head = "ForCausalLM" if name in ("Qwen3", "Qwen2", "Llama") else "ForSequenceClassification"
    with torch.device("meta"):
        model = getattr(transformers, name + head)(config)
    if head == "ForCausalLM":
        model = model.model
    return config.to_dict(), sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["Qwen3", "Qwen2", "Llama"])
def test_decoders_count_as_transformers_builds_them(name: str) -> None:
    config, count = built(
        name, vocab_size=6400, hidden_size=320, intermediate_size=704, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, **({"head_dim": 64} if name == "Qwen3" else {}),
    )  # fmt: skip
    counted = parameters(config)
    assert counted is not None
    # Qwen2's output projection has no bias, which is counted.
    assert counted.count - count == (3 * 320 if name == "Qwen2" else 0)


@pytest.mark.parametrize("name", ["Bert", "XLMRoberta"])
def test_encoders_count_as_transformers_builds_them(name: str) -> None:
    config, count = built(
        name, vocab_size=30_528, hidden_size=384, intermediate_size=1536, num_hidden_layers=6,
        num_attention_heads=12, max_position_embeddings=512, type_vocab_size=64, num_labels=1,
    )  # fmt: skip
    counted = parameters(config)
    assert counted is not None
    assert counted.count == count


def test_unknown_architectures_are_not_guessed() -> None:
    assert parameters({"model_type": "mamba", "hidden_size": 8}) is None
    fitting = judge(args(), Shape({"model_type": "mamba", "architectures": ["M"]}, None, "folder"), 0.01, GIB)
    assert fitting.needs is None
    assert fitting.problem is None


# Weights, cache, workspace


@pytest.mark.parametrize(
    ("size", "quantization", "weights_gib"),
    [
        ("0.6B", None, 1.11),
        ("4B", None, 7.49),
        ("8B", None, 14.10),
        # Linear layers at one byte, embeddings at two: (440.4 + 2 x 155.3) M, (3633 + 2 x 388) M, and so on.
        ("0.6B", "fp8_per_tensor", 0.70),
        ("4B", "fp8_per_tensor", 4.11),
        ("8B", "fp8_per_tensor", 7.63),
    ],
)
def test_weights_by_size_and_quantisation(size: str, quantization: str | None, weights_gib: float) -> None:
    assert fit(size, 1, quantization=quantization).needs.weights / GIB == pytest.approx(weights_gib, abs=0.006)


def test_the_least_cache_is_one_prompt_and_a_spare_block() -> None:
    # 28 layers x (keys, values) x 8 heads x 128 x 2 bytes = 114,688 a token.
    assert kv_bytes_a_token(published("0.6B").config, "bfloat16") == 114_688
    assert fit("0.6B", 1).needs.kv_cache == (8192 + 16) * 114_688
    assert fit("0.6B", 1, kv_cache_dtype="fp8").needs.kv_cache == (8192 + 16) * 57_344
    assert fit("8B", 2).needs.kv_cache == (8192 + 16) * 147_456 // 2
    # More GPUs than key/value heads: each keeps one.
    assert kv_bytes_a_token(published("8B").config, "auto", ranks=16) == 147_456 // 8


def test_float32_doubles_and_tensor_parallel_halves() -> None:
    one = fit("4B", 1).needs
    assert fit("4B", 1, dtype="float32").needs.weights == 2 * one.weights
    assert fit("4B", 2).needs.weights == one.weights / 2
    assert fit("4B", 2).needs.workspace < one.workspace


def test_the_head_that_is_thrown_away_counts_while_loading() -> None:
    small = fit("8B", 1, max_model_len=16, max_num_batched_tokens=16).needs
    assert small.loading == 151_680 * 4096 * 2
    assert small.loading > small.kv_cache + small.workspace
    assert small.total == small.weights + small.loading
    assert "while loading" in str(small)


def test_quantised_checkpoints_without_files_count_by_their_bits() -> None:
    config = published("4B").config
    counted = parameters(config)
    assert counted is not None
    bf16 = needs(config, counted, {}).weights

    def with_checkpoint(**settings: Any) -> float:
        return needs(config | {"quantization_config": settings}, counted, {}).weights / bf16

    assert with_checkpoint(quant_method="fp8", weight_block_size=[128, 128]) == pytest.approx(0.56, abs=0.02)
    assert with_checkpoint(quant_method="awq", bits=4, group_size=128) == pytest.approx(0.34, abs=0.02)
    assert with_checkpoint(quant_method="gptq", bits=8, group_size=128) == pytest.approx(0.56, abs=0.02)
    groups = {"group_0": {"weights": {"num_bits": 8, "group_size": None}}}
    assert with_checkpoint(quant_method="compressed-tensors", config_groups=groups) < 0.6
    assert with_checkpoint(quant_method="never heard of") == 1


# Files


def safetensors(folder: Path, tensors: dict[str, tuple[str, list[int], int]], config: dict[str, Any]) -> Model:
    header, at = {}, 0
    for name, (dtype, shape, width) in tensors.items():
        size = int(np.prod(shape)) * width
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    folder.mkdir(exist_ok=True)
    # The tensors themselves are missing: nothing reads them.
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    (folder / "config.json").write_text(json.dumps(config))
    return Model(folder, config, "r")


def test_files_are_counted_by_their_headers_alone(tmp_path: Path) -> None:
    tensors = {
        "model.embed_tokens.weight": ("BF16", [100, 8], 2),
        "model.layers.0.mlp.up_proj.weight": ("BF16", [32, 8], 2),
        "model.norm.weight": ("BF16", [8], 2),
        "lm_head.weight": ("BF16", [100, 8], 2),
        "model.position_ids": ("I64", [1, 512], 8),
    }
    counted = stored_parameters(safetensors(tmp_path / "m", tensors, {"architectures": ["Other"]}))
    assert counted is not None
    assert (counted.linear, counted.other, counted.head, counted.largest) == (256, 808, 800, 256)


def test_quantised_files_count_as_they_are_stored(tmp_path: Path) -> None:
    tensors = {
        "model.embed_tokens.weight": ("BF16", [100, 8], 2),
        "model.layers.0.mlp.up_proj.qweight": ("I32", [32, 1], 4),
        "model.layers.0.mlp.up_proj.scales": ("F16", [32, 1], 2),
    }
    config = {"architectures": ["Other"], "quantization_config": {"quant_method": "gptq", "bits": 4}}
    counted = stored_parameters(safetensors(tmp_path / "m", tensors, config))
    assert counted is not None
    assert counted.stored_bytes == 1600 + 128 + 64
    assert needs(config, counted, {}).weights == counted.stored_bytes


@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", b"\x08" + b"\0" * 7]
)
def test_files_that_are_none_leave_it_to_the_config(tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(content)
    (folder / "config.json").write_text(json.dumps(published("0.6B").config))
    shape = find_shape(args(folder))
    assert shape.parameters == published("0.6B").parameters


def test_a_real_file_and_its_config_agree(tmp_path: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=1000, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "m")
    model = Model(tmp_path / "m", json.loads((tmp_path / "m" / "config.json").read_text()), "r")
    stored, made = stored_parameters(model), parameters(model.config)
    assert stored is not None
    assert made is not None
    assert (stored.linear, stored.largest, stored.head) == (made.linear, made.largest, made.head)
    # vLLM fills 1000 rows up to 1024.
    assert made.other - stored.other == 24 * 64


# Shares


def test_shares_of_a_card_leave_room_for_each_context() -> None:
    # 0.92 of 20 GiB, vLLM's own default, is less than 0.95 of it without half a GiB.
    assert utilisation(0.25, 80 * GIB) == 0.23
    assert utilisation(1, 80 * GIB) == 0.92
    # Of a small card the context is the larger part: (0.95 x 6 - 0.5) / 24.
    assert utilisation(0.25, 24 * GIB) == 0.2166
    assert utilisation(0.01, 24 * GIB) == 0


@given(share=st.integers(1, 100), card=st.floats(8, 192))
def test_all_shares_of_a_card_and_their_contexts_fit_on_it(share: int, card: float) -> None:
    size = int(card * GIB)
    replicas = 100 // share
    budget = budget_bytes(share / 100, size)
    if budget:
        assert replicas * (budget + CONTEXT_BYTES) <= size
    assert budget <= 0.92 * share / 100 * size


@given(need=st.integers(1, 200 * GIB), card=st.floats(8, 192))
def test_the_smallest_share_fits_and_a_hundredth_less_does_not(need: int, card: float) -> None:
    size = int(card * GIB)
    share = smallest_share(need, size)
    if share is None:
        assert budget_bytes(1, size) < need
    else:
        assert budget_bytes(share, size) >= need
        assert budget_bytes(round(share - 0.01, 2), size) < need


dimensions = st.fixed_dictionaries(
    {
        "hidden_size": st.integers(1, 64).map(lambda n: 128 * n),
        "intermediate_size": st.integers(1, 256).map(lambda n: 64 * n),
        "num_hidden_layers": st.integers(1, 80),
        "num_attention_heads": st.sampled_from([8, 16, 32, 64]),
        "num_key_value_heads": st.sampled_from([1, 2, 4, 8]),
        "head_dim": st.sampled_from([32, 64, 128]),
        "vocab_size": st.integers(1000, 200_000),
    }
)


@given(dimensions, st.sampled_from(["hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"]),
       st.integers(1, 32_768), st.integers(1, 16_384), st.sampled_from([None, "fp8_per_tensor"]))  # fmt: skip
def test_needs_rise_with_every_dimension(
    shape: dict[str, int], larger: str, length: int, batch: int, quantization: str | None
) -> None:
    def need(config: dict[str, Any], **engine: Any) -> int:
        config = {"model_type": "qwen3", **config}
        counted = parameters(config)
        assert counted is not None
        settings = {"max_model_len": length, "max_num_batched_tokens": batch, "quantization": quantization}
        return needs(config, counted, settings | engine).total

    least = need(shape)
    assert need({**shape, larger: 2 * shape[larger]}) > least
    assert need(shape, max_model_len=2 * length) >= least
    assert need(shape, max_num_batched_tokens=2 * batch) >= least
    assert need(shape, dtype="float32") >= least
    assert need(shape, tensor_parallel_size=2) <= least
    # While it loads, one layer is there twice.
    if shape["num_hidden_layers"] >= 4:
        assert need(shape, quantization="fp8_per_tensor") <= need(shape, quantization=None)


# What is refused


def test_a_share_that_is_too_small_is_refused_with_the_numbers() -> None:
    problem = fit("4B", 0.1).problem
    assert problem == (
        "num_gpus is 0.1: 8.00 GiB of the GPU's 80.00 GiB, of which the engine may plan with 7.10; "
        "Qwen/Qwen3-Reranker-4B needs 10.58 GiB (weights 7.50, KV cache 1.13, workspace 1.96) "
        "for max_model_len 8192; smallest num_gpus that fits: 0.15"
    )
    assert fit("4B", 0.15).problem is None
    assert fit("4B", 0.14).problem is not None
    assert fit("0.6B", 0.1, 24).problem.endswith("smallest num_gpus that fits: 0.16")


def test_what_one_gpu_cannot_hold_is_told_to_take_two() -> None:
    assert fit("8B", 1, 16).problem.endswith("smallest num_gpus that fits: 2")
    assert fit("8B", 2, 16).problem is None
    assert fit("8B", 2, 2).problem.endswith("no number of GPUs of this size up to 8 is enough")


def test_a_user_s_own_utilisation_wins_up_to_the_share() -> None:
    assert fit("0.6B", 0.25, gpu_memory_utilization=0.1).budget_bytes == int(0.1 * 80 * GIB)
    assert "engine.gpu_memory_utilization is 0.02: " in fit("0.6B", 0.25, gpu_memory_utilization=0.02).problem


@pytest.mark.parametrize(
    ("gpus", "card_gib", "given", "most"),
    [
        (0.25, 80, 0.5, 0.23),
        (0.25, 80, 0.25, 0.23),
        (0.25, 24, 0.22, 0.2166),
    ],
)
def test_a_user_s_own_utilisation_leaves_room_for_each_context(
    gpus: float, card_gib: float, given: float, most: float
) -> None:
    message = f"engine.gpu_memory_utilization is {given}, but num_gpus is {gpus}; allowed: above 0, up to {most}. "
    with pytest.raises(ValueError, match=message):
        fit("0.6B", gpus, card_gib, gpu_memory_utilization=given)
    assert fit("0.6B", gpus, card_gib, gpu_memory_utilization=most) == fit("0.6B", gpus, card_gib)


@pytest.mark.parametrize("gpus", [1, 2])
def test_who_has_a_whole_card_may_fill_it_but_for_the_context(gpus: float) -> None:
    assert fit("0.6B", gpus, gpu_memory_utilization=0.95).budget_bytes == int(0.95 * 80 * GIB)
    with pytest.raises(ValueError, match=r"gpu_memory_utilization is 1\.0, .*; allowed: above 0, up to 0\.993\. "):
        fit("0.6B", gpus, gpu_memory_utilization=1.0)


@pytest.mark.parametrize(
    ("gpus", "engine", "message"),
    [
        (0, {}, "num_gpus is 0, but this vLLM is built for GPUs"),
        (1.5, {}, "num_gpus is 1.5; allowed: up to 1, or a whole number"),
        (2, {"tensor_parallel_size": 4}, "engine.tensor_parallel_size is 4, but num_gpus is 2, which makes it 2"),
        (0.5, {"tensor_parallel_size": 2}, "engine.tensor_parallel_size is 2, but num_gpus is 0.5"),
        (2, {"pipeline_parallel_size": 2}, "engine.pipeline_parallel_size is 2"),
        (3, {}, "num_gpus is 3, over which the model can't be divided: it has 32 attention heads"),
        (1, {"quantization": "fp8"}, "engine.quantization is 'fp8'.*use fp8_per_tensor"),
    ],
)
def test_settings_that_contradict_the_share(gpus: float, engine: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit("8B", gpus, **engine)


def test_a_cache_of_the_user_s_own_size_counts_in_full() -> None:
    assert fit("0.6B", 0.25, kv_cache_memory_bytes=4 * GIB).needs.kv_cache == 4 * GIB
    assert fit("0.6B", 0.25, kv_cache_memory_bytes=40 * GIB).problem is not None
    with pytest.raises(
        ValueError, match=r"engine.kv_cache_memory_bytes is 1000, but one prompt .* needs 941359104"
    ):
        fit("0.6B", 0.25, kv_cache_memory_bytes=1000)


def test_tokens_that_fit_are_what_the_budget_leaves() -> None:
    fitting = fit("0.6B", 0.25)
    left = fitting.budget_bytes - fitting.needs.weights - fitting.needs.workspace
    assert fitting.kv_tokens == (left // (16 * 114_688) - 1) * 16


def test_shares_and_whole_gpus_become_engine_arguments() -> None:
    def settings(gpus: float, card: int | None) -> dict[str, Any]:
        return engine_settings(
            args(), Model(Path("m"), published("0.6B").config, "r"), "gpu", gpus, card_bytes=card
        )

    assert settings(0.25, 80 * GIB)["gpu_memory_utilization"] == 0.23
    assert "distributed_executor_backend" not in settings(0.25, 80 * GIB)
    two = settings(2, 80 * GIB)
    assert (two["tensor_parallel_size"], two["gpu_memory_utilization"]) == (2, 0.92)
    assert two["distributed_executor_backend"] == "mp"
    assert settings(0.5, None)["gpu_memory_utilization"] == 0.46


def test_a_head_row_beyond_the_first_gpu_s_part_is_refused(tmp_path: Path) -> None:
    token_id = {"no": 300, "yes": 400}.get
    model = Model(tmp_path, {"architectures": ["Qwen3ForCausalLM"], "vocab_size": 1000}, "r")
    for ranks in (1, 2):
        check_head_rows(args(tmp_path), model, token_id, ranks)
    message = (
        "num_gpus is 4, but the id of 'no' is 300, and the first of 4 GPUs, where vLLM looks for it, holds the"
    )
    with pytest.raises(ValueError, match=f"{message} head's rows 0 to 255; lower num_gpus"):
        check_head_rows(args(tmp_path), model, token_id, 4)
    converted = Model(tmp_path, {**model.config, "architectures": ["Qwen3ForSequenceClassification"]}, "r")
    check_head_rows(args(tmp_path), converted, token_id, 4)


def test_models_that_no_one_knows_are_named() -> None:
    with pytest.raises(ValueError, match="model is 'someone/unknown', whose config"):
        find_shape(args("someone/unknown"))


@pytest.mark.parametrize("name", ["/models/x", "./x", "~/no-such-model", "a/b/c"])
def test_a_path_on_another_machine_is_in_no_folder_here(name: str) -> None:
    def online(name: str, revision: str | None) -> dict[str, Any]:
        raise AssertionError("asked the hub")

    with pytest.raises(ValueError, match=f"model is '{name}', whose config.json is in no folder here"):
        find_shape(args(name), online)


def test_published_rerankers_are_known_without_the_hub_and_others_are_asked_for() -> None:
    def down(name: str, revision: str | None) -> dict[str, Any]:
        raise OSError("no network")

    assert find_shape(args(), down).source == "built-in table"
    config = published("4B").config
    assert find_shape(args("someone/known"), lambda *_: config) == Shape(config, parameters(config), "hub")
    with pytest.raises(ValueError, match="not to be had from the hub"):
        find_shape(args("someone/known"), down)


def test_a_decoder_that_embeds_reserves_no_step_of_its_whole_context() -> None:
    config = {"model_type": "llama", "architectures": ["LlamaModel"], "hidden_size": 4096, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14_336,
              "vocab_size": 128_256, "max_position_embeddings": 131_072}  # fmt: skip
    shape = Shape(config, parameters(config), "folder")
    fitting = judge(args("m", "bi-encoder", max_model_len=4096), shape, 1, 24 * GIB)
    assert fitting.problem is None
    whole = judge(args("m", "bi-encoder"), shape, 1, 80 * GIB).needs
    assert whole is not None
    assert fitting.needs is not None
    assert fitting.needs.workspace == whole.workspace


def test_encoders_have_no_cache() -> None:
    config = {"model_type": "bert", "architectures": ["BertForSequenceClassification"], "hidden_size": 384,
              "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 1536, "vocab_size": 30_522,
              "max_position_embeddings": 512, "type_vocab_size": 2}  # fmt: skip
    fitting = judge(args("m", "cross-encoder"), Shape(config, parameters(config), "folder"), 0.1, 24 * GIB)
    assert fitting.needs is not None
    assert (fitting.needs.kv_cache, fitting.kv_tokens, fitting.problem) == (0, 0, None)
    assert kv_cache_bytes({}, 512, "auto", 16) == 0
