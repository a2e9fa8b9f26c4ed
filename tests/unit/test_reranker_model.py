"""Where models come from, which engine arguments there are, and what scores are made of."""

import fnmatch
import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve_app.config import DEFAULT_INSTRUCTION, RerankerArgs
from serve_app.reranker.engine_args import check_engine_args, engine_arg_names, engine_settings
from serve_app.reranker.memory import kv_cache_bytes
from serve_app.reranker.model import Model, fingerprint, resolve, scoring_fingerprint
from serve_app.reranker.scores import cosines, sigmoids
from tests.models import MINILM, MINILM_SHA256

QWEN = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "max_position_embeddings": 40960}
BERT = {"architectures": ["BertForSequenceClassification"], "model_type": "bert", "id2label": {"0": "x"}}


def make(folder: Path, config: dict[str, Any], weights: bytes = b"w" * 1000) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def args(model: object, kind: str = "qwen3-reranker", **settings: Any) -> RerankerArgs:
    return RerankerArgs.model_validate({"model": str(model), "kind": kind, **settings})


def test_a_package_s_model_is_found_and_its_hash_checked() -> None:
    model = resolve(args(MINILM, "bi-encoder", sha256=MINILM_SHA256))
    assert model.architecture == "BertModel"
    assert model.revision == MINILM_SHA256[:16]


def test_a_wrong_hash_names_file_expected_and_seen(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", QWEN)
    with pytest.raises(
        ValueError, match=rf"sha256 of {folder}/model.safetensors is [0-9a-f]{{64}}, expected {'0' * 64}"
    ):
        resolve(args(folder, sha256="0" * 64))


def test_a_hash_needs_the_one_file(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", QWEN)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"sha256 is set, but .* has no model.safetensors"):
        resolve(args(folder, sha256="0" * 64))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/nowhere/model", "the folder /nowhere/model is missing"),
        ("./nowhere", "the folder nowhere is missing"),
        ("package:no_such_package/model", "no Python package 'no_such_package'"),
        ("package:serve_app/../../etc", "leaves the package's folder"),
        ("package:serve_app/nowhere", "is missing"),
        ("package:serve_app", "has no config.json"),
        ("a/b/c", "neither a folder here nor a hub id"),
    ],
)
def test_models_that_are_not_there(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        resolve(args(name))
    assert str(error.value).startswith(f"model is {name!r}")


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        resolve(args(tmp_path / "model.gguf"))


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:da0e\nsize 466247\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"architectures": ["Qwen3For', r"is no JSON \(Unterminated string .* column 20 .*\)$"),
        (LFS, r"is no JSON \(Expecting value: .*\); it is a git-lfs pointer: git lfs pull$"),
    ],
)
@pytest.mark.parametrize("file", ["config.json", "modules.json"])
def test_a_damaged_file_is_named_with_its_model(tmp_path: Path, file: str, content: str, message: str) -> None:
    folder = make(tmp_path / "m", QWEN)
    (folder / file).write_text(content)
    with pytest.raises(ValueError, match=f"^model is '{folder}', but {folder}/{file} {message}"):
        resolve(args(folder))


def test_an_embedding_model_is_no_reranker(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", QWEN)
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    assert resolve(args(folder)).is_causal
    modules.append({"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"})
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(
        ValueError, match=rf"kind is qwen3-reranker, but modules.json of '{folder}' pools embeddings"
    ):
        resolve(args(folder))
    assert resolve(args(folder, "bi-encoder")).is_causal


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("Cannot find the files\nand the connection failed")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(OSError, match=r"model is 'Qwen/Qwen3-Reranker-0.6B'.*the hub can't be reached") as error:
        resolve(args("Qwen/Qwen3-Reranker-0.6B"))
    assert "\n" not in str(error.value)


def test_a_hub_model_s_revision_is_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    commit = "0123456789abcdef0123456789abcdef01234567"
    asked: dict[str, Any] = {}

    def download(name: str, **settings: Any) -> str:
        asked.update(settings, name=name)
        return str(make(tmp_path / commit, QWEN))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = resolve(args("Qwen/Qwen3-Reranker-0.6B", revision="main"))
    assert (model.revision, asked["name"], asked["revision"]) == (commit, "Qwen/Qwen3-Reranker-0.6B", "main")


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("trusted", [False, True])
def test_a_hub_model_s_own_code_comes_only_where_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str, trusted: bool
) -> None:
    import huggingface_hub

    hub = {"config.json": json.dumps(QWEN), "modeling_own.py": "", weights: "w"}

    def download(name: str, allow_patterns: list[str], **settings: Any) -> str:
        (tmp_path / "c0").mkdir(exist_ok=True)
        for file, content in hub.items():
            if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                (tmp_path / "c0" / file).write_text(content)
        return str(tmp_path / "c0")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    folder = resolve(args("someone/own", engine={"trust_remote_code": trusted})).folder
    assert {path.name for path in folder.iterdir()} == set(hub) - (set() if trusted else {"modeling_own.py"})


DENSE = [{"path": "", "type": "sentence_transformers.models.Transformer"},
         {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]  # fmt: skip


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.safetensors"])
def test_a_bi_encoder_s_projection_comes_in_either_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    import huggingface_hub

    commit = "0123456789abcdef0123456789abcdef01234567"
    hub = {"config.json": json.dumps({"architectures": ["BertModel"]}), "model.safetensors": "w",
           "modules.json": json.dumps(DENSE), "2_Dense/config.json": "{}", f"2_Dense/{weights}": "d",
           "pytorch_model.bin": "w"}  # fmt: skip
    revisions = []

    def download(name: str, revision: str | None, allow_patterns: list[str], **settings: Any) -> str:
        revisions.append(revision)
        for file, content in hub.items():
            if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                (tmp_path / commit / file).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / commit / file).write_text(content)
        return str(tmp_path / commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    folder = resolve(args("someone/projects", "bi-encoder", revision="main")).folder
    assert {path.relative_to(folder).as_posix() for path in folder.glob("**/*") if path.is_file()} == set(hub) - {
        "pytorch_model.bin"
    }
    assert revisions == (["main", commit] if weights == "pytorch_model.bin" else ["main"])


@pytest.mark.parametrize("missing", ["config.json", "pytorch_model.bin"])
def test_a_bi_encoder_without_its_projection_is_refused(tmp_path: Path, missing: str) -> None:
    folder = make(tmp_path / "m", {"architectures": ["BertModel"]})
    (folder / "modules.json").write_text(json.dumps(DENSE))
    (folder / "2_Dense").mkdir()
    for name in ("config.json", "pytorch_model.bin"):
        (folder / "2_Dense" / name).write_text("{}")
    resolve(args(folder, "bi-encoder"))
    (folder / "2_Dense" / missing).unlink()
    with pytest.raises(
        ValueError, match=r"has the Dense module '2_Dense', but .*2_Dense lacks config.json, or both"
    ):
        resolve(args(folder, "bi-encoder"))


@pytest.mark.parametrize(
    ("name", "message"),
    [("{folder}", "which is a path"), (MINILM, "which is in a package")],
)
def test_a_revision_is_for_the_hub(tmp_path: Path, name: str, message: str) -> None:
    folder = make(tmp_path / "m", QWEN)
    with pytest.raises(ValueError, match=rf"revision is 'v2', but model is .*, {message}"):
        resolve(args(name.format(folder=folder), revision="v2"))


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen2ForSequenceClassification"])
def test_rerankers_of_other_families_have_other_prompts(tmp_path: Path, architecture: str) -> None:
    config = {"architectures": [architecture], "model_type": "qwen2", "id2label": {"0": "x"}}
    folder = make(tmp_path / "m", config)
    with pytest.raises(ValueError, match=r"model_type is 'qwen2'; .*<Instruct>: .*set `prompt`"):
        resolve(args(folder))
    assert resolve(args(folder, prompt={})).architecture == architecture
    assert resolve(args(folder, prompt={"yes": "1", "no": "0"})).architecture == architecture


def test_what_cannot_be_a_qwen3_reranker_is_not_taken_for_one(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"})
    with pytest.raises(ValueError, match=r"allowed: a …ForSequenceClassification\.$"):
        resolve(args(folder, "cross-encoder"))


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        (
            "qwen3-reranker",
            BERT,
            "kind is qwen3-reranker, but .* BertForSequenceClassification; allowed: a …ForCausalLM",
        ),
        ("cross-encoder", QWEN, "allowed: a …ForSequenceClassification. Is it a qwen3-reranker"),
        ("cross-encoder", {"architectures": ["BertModel"]}, "Is it a bi-encoder"),
        ("bi-encoder", BERT, "Is it a cross-encoder"),
        ("cross-encoder", {**BERT, "id2label": {"0": "a", "1": "b"}}, "gives 2 labels"),
        ("cross-encoder", {"architectures": ["BertForSequenceClassification"]}, "gives 2 labels"),
    ],
)
def test_architectures_must_fit_the_kind(tmp_path: Path, kind: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(args(make(tmp_path / "m", config), kind))


def test_roberta_s_positions_start_behind_its_padding() -> None:
    config = {"model_type": "xlm-roberta", "max_position_embeddings": 514, "pad_token_id": 1}
    assert Model(Path("m"), config, "r").longest(514) == 512
    assert Model(Path("m"), config, "r").longest(128) == 128
    assert Model(Path("m"), {"model_type": "bert", "max_position_embeddings": 512}, "r").longest(512) == 512


def test_fingerprints_follow_weights_and_vocabulary_only(tmp_path: Path) -> None:
    first = fingerprint(make(tmp_path / "a", QWEN))
    assert fingerprint(make(tmp_path / "b", QWEN)) == first
    assert fingerprint(make(tmp_path / "c", QWEN, b"w" * 999 + b"x")) != first
    (tmp_path / "b" / "README.md").write_text("words")
    assert fingerprint(tmp_path / "b") == first
    (tmp_path / "b" / "tokenizer.json").write_text("{}")
    assert fingerprint(tmp_path / "b") != first


def safetensors(head: bytes) -> bytes:
    """A body of 40 MB and a small head behind it."""
    body = 40_000_000
    offsets = {"body": [0, body], "score.weight": [body, body + len(head)]}
    header = json.dumps({name: {"data_offsets": at} for name, at in offsets.items()}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(body) + head


def test_a_fingerprint_sees_a_head_that_was_trained_alone(tmp_path: Path) -> None:
    first = fingerprint(make(tmp_path / "a", BERT, safetensors(b"w" * 512 + b"e" * 1000)))
    assert fingerprint(make(tmp_path / "b", BERT, safetensors(b"v" * 512 + b"e" * 1000))) != first
    assert fingerprint(make(tmp_path / "c", BERT, safetensors(b"w" * 512 + b"e" * 1000))) == first


@pytest.mark.parametrize("name", ["vocab.txt", "spiece.model", "1_Pooling/config.json", "modeling.py"])
def test_a_fingerprint_sees_all_files_that_make_a_score(tmp_path: Path, name: str) -> None:
    first = fingerprint(make(tmp_path / "m", BERT))
    (tmp_path / "m" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "m" / name).write_text("{}")
    assert fingerprint(tmp_path / "m") != first


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_fingerprint_sees_the_weights_of_modules(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "m", BERT)
    (folder / "2_Dense").mkdir()
    seen = set()
    for weights in (None, b"a", b"b"):
        if weights is not None:
            (folder / "2_Dense" / name).write_bytes(weights)
        seen.add(fingerprint(folder))
    assert len(seen) == 3


def test_fingerprints_stay_what_they_were(tmp_path: Path) -> None:
    """Another one computes all scores again."""
    folder = make(tmp_path / "m", BERT)
    (folder / "pytorch_model.bin").write_bytes(b"w" * 100)
    assert fingerprint(folder) == "457e364c278b5f7bec8393dd9182024af7d12c03874375218bb31d86959ef9dc"


SCORING = Model(Path("m"), QWEN, "r1", "c1")


def scoring(given: RerankerArgs, model: Model = SCORING, dtype: str = "bfloat16", longest: int = 512) -> str:
    return scoring_fingerprint(given, model, dtype, longest, "serve-app 1, vllm 1")


@pytest.mark.parametrize(
    "changed",
    [
        scoring(args("m", instruction="find code")),
        scoring(args("m", prompt={"suffix": "x"})),
        scoring(args("m", prompt={"yes": "y", "no": "n"})),
        scoring(args("m", engine={"quantization": "fp8"})),
        scoring(args("m", engine={"hf_overrides": {"rope_theta": 1}})),
        scoring(args("m", engine={"an_argument_of_the_future": 1})),
        scoring(args("m"), dtype="float32"),
        scoring(args("m"), longest=1024),
        scoring(args("m"), Model(Path("m"), QWEN, "r2", "c1")),
        scoring(args("m"), Model(Path("m"), QWEN, "r1", "c2")),
        scoring(args("m", "cross-encoder")),
        scoring(args("m", "bi-encoder")),
        scoring(args("m", "bi-encoder", query_prefix="query: ")),
        scoring(args("m", "bi-encoder", document_prefix="query: ")),
        scoring_fingerprint(args("m"), SCORING, "bfloat16", 512, "serve-app 1, vllm 2"),
    ],
)
def test_what_decides_scores_changes_their_fingerprint(changed: str) -> None:
    others = {scoring(args("m")), scoring(args("m", "bi-encoder", query_prefix="passage: "))}
    assert changed not in others


@pytest.mark.parametrize(
    "same",
    [
        args("elsewhere/m"),
        args("m", revision="main"),
        args("m", instruction=DEFAULT_INSTRUCTION),
        args("m", prompt={}),
        args("m", engine={"block_size": 16, "max_num_seqs": 8, "max_num_batched_tokens": 8192}),
        args("m", engine={"gpu_memory_utilization": 0.2, "kv_cache_memory_bytes": 2**30}),
        args("m", engine={"dtype": "auto", "max_model_len": 512}),
    ],
)
def test_what_leaves_scores_alone_leaves_their_fingerprint_alone(same: RerankerArgs) -> None:
    assert scoring(same) == scoring(args("m"))


@pytest.mark.parametrize("value", [-1, 0, "auto", "8192", 512.5, True])
def test_a_length_that_is_none_is_refused(value: object) -> None:
    check_engine_args({"max_model_len": 1})
    message = (
        f"engine.max_model_len is {value!r}; allowed: a whole number from 1 on; leave it out for the model's own"
    )
    with pytest.raises(ValueError, match=message):
        check_engine_args({"max_model_len": value})


@pytest.mark.parametrize(
    "name", ["max_model_len", "dtype", "quantization", "cpu_offload_gb", "tensor_parallel_size"]
)
def test_engine_arguments_of_vllm_pass(name: str) -> None:
    check_engine_args({name: None})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("max_model_length", "engine.max_model_length is no vLLM engine argument; did you mean 'max_model_len'"),
        ("gpu_memory_utilisation", "did you mean 'gpu_memory_utilization'"),
        ("xyzzy", "engine.xyzzy is no vLLM engine argument"),
        ("model", "engine.model can't be set: it follows from model"),
        ("runner", "engine.runner can't be set: it follows from kind"),
    ],
)
def test_other_engine_arguments_are_refused(name: str, message: str) -> None:
    assert len(engine_arg_names()) > 100
    with pytest.raises(ValueError, match=message):
        check_engine_args({name: 1})


def settings(
    kind: str = "qwen3-reranker", config: dict[str, Any] = QWEN, device: Any = "cpu", **more: Any
) -> dict[str, Any]:
    gpus = more.pop("gpus", 0)
    given = args("m", kind, engine=more)
    return engine_settings(given, Model(Path("/m"), config, "r"), device, gpus)


def test_defaults_lie_under_the_user_s_values() -> None:
    ours = settings()
    assert ours["enable_prefix_caching"]
    assert (ours["block_size"], ours["dtype"], ours["scheduling_policy"]) == (32, "float32", "priority")
    assert ours["hf_overrides"]["architectures"] == ["Qwen3ForSequenceClassification"]
    assert ours["hf_overrides"]["classifier_from_token"] == ["no", "yes"]
    theirs = settings(dtype="float16", block_size=64, enforce_eager=False, hf_overrides={"rope_theta": 1})
    assert (theirs["dtype"], theirs["block_size"], theirs["enforce_eager"]) == ("float16", 64, False)
    assert theirs["hf_overrides"] == ours["hf_overrides"] | {"rope_theta": 1}


@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_cpu_that_cannot_multiply_bfloat16_is_said(has_bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(logging.getLogger("ray.serve"), "warning", said.append)
    given = args("m", "qwen3-reranker", engine={"dtype": "bfloat16"})
    engine_settings(given, Model(Path("/m"), QWEN, "r"), "cpu", 0, has_bf16)
    assert [line.partition(",")[0] for line in said] == ([] if has_bf16 else ["engine.dtype is bfloat16"])


def test_converted_checkpoints_keep_their_own_head() -> None:
    converted = {**QWEN, "architectures": ["Qwen3ForSequenceClassification"], "id2label": {"0": "x"}}
    assert settings(config=converted)["hf_overrides"] == {}


def test_encoders_read_their_longest_text_in_one_step() -> None:
    long = {"architectures": ["BertModel"], "max_position_embeddings": 8192}
    assert settings("bi-encoder", long)["max_num_batched_tokens"] == 8192
    assert settings("bi-encoder", long, max_model_len=6000)["max_num_batched_tokens"] == 6000
    both_ways = {"architectures": ["Qwen2Model"], "model_type": "qwen2", "is_causal": False}
    assert settings("bi-encoder", both_ways | {"max_position_embeddings": 9000})["max_num_batched_tokens"] == 9000


@pytest.mark.parametrize("engine", [{}, {"max_model_len": 8192}])
def test_decoders_that_embed_read_a_long_text_in_several_steps(engine: dict[str, Any]) -> None:
    llama = {"architectures": ["LlamaModel"], "model_type": "llama", "max_position_embeddings": 131_072}
    assert settings("bi-encoder", llama, **engine)["max_num_batched_tokens"] == 4096


@pytest.mark.parametrize(
    ("config", "dtype", "tokens"),
    [
        # Gate and up of 0.6B, 6,144 wide: 1,365 rows of float32 are 32 MiB.
        (
            {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "head_dim": 128},
            "float32",
            1280,
        ),
        (
            {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "head_dim": 128},
            "bfloat16",
            2560,
        ),
        (
            {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "head_dim": 128},
            "float32",
            512,
        ),
        ({"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}, "float32", 4096),
        ({}, "float32", 4096),
    ],
)
def test_a_step_on_a_cpu_makes_no_tensor_that_the_process_gives_back(
    config: dict[str, Any], dtype: str, tokens: int
) -> None:
    found = settings(config={**QWEN, **config}, dtype=dtype)
    assert found["max_num_batched_tokens"] == tokens
    assert (
        tokens == 512
        or tokens * 2 * config.get("intermediate_size", 0) * (4 if dtype == "float32" else 2) <= 2**25
    )
    assert settings(config={**QWEN, **config}, max_num_batched_tokens=300)["max_num_batched_tokens"] == 300


def test_a_step_on_a_cpu_is_never_less_than_vllm_takes() -> None:
    shape = {"hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32, "head_dim": 128}
    wide = {**QWEN, **shape}
    assert settings(config=wide, max_num_seqs=1024)["max_num_batched_tokens"] == 1024
    # vLLM says what is wrong with it.
    assert settings(config=wide, max_num_seqs="many")["max_num_batched_tokens"] == 512
    whole = settings(config=wide, enable_chunked_prefill=False, max_model_len=2048)
    assert whole["max_num_batched_tokens"] == 2048
    # It may pool a mean, of a whole text.
    llama = {**shape, "architectures": ["LlamaModel"], "model_type": "llama", "max_position_embeddings": 2048}
    assert settings("bi-encoder", llama)["max_num_batched_tokens"] == 2048


def test_cpu_cache_holds_the_longest_prompt_or_is_refused() -> None:
    shape = {**QWEN, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 28}
    least = kv_cache_bytes(shape, 32_768, "bfloat16", 32)
    assert least == (1024 + 1) * 32 * 28 * 2 * 8 * 128 * 2
    assert settings(config=shape, dtype="bfloat16", max_model_len=32_768)["kv_cache_memory_bytes"] == least
    assert settings(config=shape, max_model_len=512)["kv_cache_memory_bytes"] == 2**29
    with pytest.raises(ValueError, match=r"engine.kv_cache_memory_bytes is 1000, but .* needs \d+"):
        settings(config=shape, kv_cache_memory_bytes=1000)


def test_scores_are_sigmoids_in_double_precision() -> None:
    logits, scores = sigmoids(np.array([[-100], [-4], [0], [4], [100]], np.float32))
    assert logits == [-100, -4, 0, 4, 100]
    assert scores[2] == 0.5
    assert scores[0] == pytest.approx(math.exp(-100), rel=1e-9)
    assert scores == sorted(scores)


@pytest.mark.parametrize("vector", [[], [1.0, 2.0], [math.nan], [math.inf]])
def test_anything_but_one_finite_logit_is_no_score(vector: list[float]) -> None:
    with pytest.raises(ValueError, match="one finite logit"):
        sigmoids(np.array([vector], np.float32))


def test_cosines_ignore_length_and_survive_zeros() -> None:
    query = np.array([3, 4], np.float32)
    documents = np.array([[6, 8], [-3, -4], [4, -3], [0, 0]], np.float32)
    assert cosines(query, documents) == pytest.approx([1, -1, 0, 0])
    assert cosines(query, documents[:0]) == []


def test_callers_load_neither_ray_nor_an_engine() -> None:
    check = (
        "import sys, serve_app.reranker, serve_app.reranker.messages, serve_app.reranker.engine_args as e;"
        "e.check_engine_args({'dtype': 'auto'});"
        "assert not {'ray', 'vllm', 'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
