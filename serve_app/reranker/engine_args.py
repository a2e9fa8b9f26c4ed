"""Engine arguments: which exist, and what they are where the user says nothing. Loads no vLLM."""

import ast
import functools
import importlib.util
import math
from pathlib import Path
from typing import Any, Literal

from serve_app.config import RerankerArgs, YesNoPrompt, closest
from serve_app.reranker.model import Model

# Set by the variant's own settings; a second value under `engine` could only contradict them.
_OURS = {
    "model": "model",
    "revision": "model and revision",
    "tokenizer": "model",
    "runner": "kind",
    "convert": "kind",
}
_GIB = 2**30
# Of a card's memory, what one engine takes that has it alone (vLLM's own default).
_UTILISATION = 0.92


def check_engine_args(engine: dict[str, Any]) -> None:
    """Raises ValueError if `engine` names an argument that vLLM hasn't, or one that other settings decide.

    Reads the names from the installed vLLM's source; where vLLM isn't installed, all names pass.
    """
    known = engine_arg_names()
    for name in engine:
        if name in _OURS:
            raise ValueError(f"engine.{name} can't be set: it follows from {_OURS[name]}")
        if known and name not in known:
            hint = closest(name, [n for n in known if n not in _OURS]) or "see vLLM's engine arguments"
            raise ValueError(f"engine.{name} is no vLLM engine argument; {hint}")


@functools.cache
def engine_arg_names() -> tuple[str, ...]:
    """The fields of vLLM's `AsyncEngineArgs`, parsed, because importing vLLM takes ten seconds."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return ()
    source = Path(spec.submodule_search_locations[0], "engine", "arg_utils.py").read_text(encoding="utf-8")
    return tuple(
        field.target.id
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name in ("EngineArgs", "AsyncEngineArgs")
        for field in node.body
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and not field.target.id.startswith("_")
    )


def engine_settings(
    args: RerankerArgs, model: Model, device: Literal["cpu", "gpu"], gpus: float, cpu_has_bf16: bool = False
) -> dict[str, Any]:
    """All arguments of the engine: our defaults under the user's values. `gpus` is the replica's share."""
    settings: dict[str, Any] = {
        "disable_log_stats": True,
        "scheduling_policy": "priority",
        "max_num_batched_tokens": 4096 if device == "cpu" else 16384,
        "max_num_seqs": 256 if device == "cpu" else 512,
    }
    if device == "cpu":
        settings |= {"enforce_eager": True, "dtype": "bfloat16" if cpu_has_bf16 else "float32"}
    elif gpus >= 2:
        settings |= {"tensor_parallel_size": int(gpus), "distributed_executor_backend": "mp"}
    elif 0 < gpus < 1:
        settings["gpu_memory_utilization"] = round(gpus * _UTILISATION, 4)
    if args.kind == "qwen3-reranker":
        settings["enable_prefix_caching"] = True
        if device == "cpu":
            # The CPU build's default block of 128 tokens caches no shared head, which is shorter.
            settings["block_size"] = 32
    else:
        # Encoders read a text in one step, so the longest has to fit into one.
        longest = int(model.config.get("max_position_embeddings") or 0)
        settings["max_num_batched_tokens"] = max(settings["max_num_batched_tokens"], longest)
    settings |= args.engine
    settings |= {"model": str(model.folder), "runner": "pooling"}
    settings["hf_overrides"] = _overrides(args, model) | (settings.get("hf_overrides") or {})
    if device == "cpu":
        _size_cpu_cache(settings, model)
    return settings


def _overrides(args: RerankerArgs, model: Model) -> dict[str, Any]:
    """Has vLLM make a one-row classifier of a language model's head: the row of `yes` minus the row of `no`.

    Checkpoints that were converted beforehand bring theirs.
    """
    if args.kind != "qwen3-reranker" or not model.is_causal:
        return {}
    prompt = args.prompt or YesNoPrompt()
    return {
        "architectures": [model.architecture.removesuffix("ForCausalLM") + "ForSequenceClassification"],
        "classifier_from_token": [prompt.no, prompt.yes],
        "method": "from_2_way_softmax",
    }


def _size_cpu_cache(settings: dict[str, Any], model: Model) -> None:
    """Half a GiB of KV cache, or what the longest prompt needs; vLLM's default is nearly all memory there is."""
    least = kv_cache_bytes(
        model.config, settings.get("max_model_len"), settings["dtype"], settings.get("block_size")
    )
    given = settings.get("kv_cache_memory_bytes")
    if given is None:
        settings["kv_cache_memory_bytes"] = max(_GIB // 2, least)
    elif isinstance(given, int) and given < least:
        raise ValueError(
            f"engine.kv_cache_memory_bytes is {given}, but one prompt of max_model_len tokens needs {least}; "
            "raise it or lower engine.max_model_len"
        )


def kv_cache_bytes(config: dict[str, Any], max_model_len: Any, dtype: Any, block_size: int | None) -> int:
    """Of the least KV cache that holds one prompt of the longest allowed length, and a block to spare.
    An estimate from above for models whose layers don't all attend fully."""
    heads = int(config.get("num_attention_heads") or 0)
    if not heads:
        return 0
    length = max_model_len if isinstance(max_model_len, int) else int(config.get("max_position_embeddings") or 0)
    block = block_size or 128
    head_dim = int(config.get("head_dim") or int(config.get("hidden_size") or 0) // heads)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    layers = int(config.get("num_hidden_layers") or 0)
    width = 4 if dtype in ("float", "float32") else 2
    return (math.ceil(length / block) + 1) * block * layers * 2 * kv_heads * head_dim * width
