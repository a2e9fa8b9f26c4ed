"""Engine arguments: which exist, and what they are where the user says nothing. Loads no vLLM."""

import ast
import functools
import importlib.util
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from serve_app.config import RerankerArgs, YesNoPrompt, closest
from serve_app.reranker.memory import (
    CONTEXT_BYTES,
    GIB,
    MOST,
    attention_widths,
    element_bytes,
    is_decoder,
    is_encoder,
    kv_cache_bytes,
    longest_prompt,
    utilisation,
)
from serve_app.reranker.model import Model

logger = logging.getLogger("ray.serve")

# Larger blocks glibc gives back to the system when they are freed (its greatest mmap threshold), and fresh pages
# for every tensor take a tenth of a step's time.
_KEPT_BLOCK_BYTES = 32 * 2**20
# Set by the variant's own settings; a second value under `engine` could only contradict them.
_OURS = {
    "model": "model",
    "revision": "model and revision",
    "tokenizer": "model",
    "runner": "kind",
    "convert": "kind",
}


def check_engine_args(engine: dict[str, Any]) -> None:
    """Raises ValueError if `engine` names an argument that vLLM hasn't, or one that other settings decide, and for
    a `max_model_len` that is no length.

    Reads the names from the installed vLLM's source; where vLLM isn't installed, all names pass.
    """
    known = engine_arg_names()
    for name in engine:
        if name in _OURS:
            raise ValueError(f"engine.{name} can't be set: it follows from {_OURS[name]}")
        if known and name not in known:
            hint = closest(name, [n for n in known if n not in _OURS]) or "see vLLM's engine arguments"
            raise ValueError(f"engine.{name} is no vLLM engine argument; {hint}")
    longest = engine.get("max_model_len")
    if longest is not None and (not isinstance(longest, int) or isinstance(longest, bool) or longest < 1):
        # vLLM's -1, as much as the memory holds, isn't known before the start, nor the same on all replicas.
        raise ValueError(
            f"engine.max_model_len is {longest!r}; allowed: a whole number from 1 on; leave it out for the "
            "model's own"
        )


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
    args: RerankerArgs,
    model: Model,
    device: Literal["cpu", "gpu"],
    gpus: float,
    cpu_has_bf16: bool = False,
    card_bytes: int | None = None,
) -> dict[str, Any]:
    """All arguments of the engine: our defaults under the user's values. `gpus` is the replica's share, of GPUs of
    `card_bytes` each. Raises ValueError for values of the user's that contradict the share."""
    settings: dict[str, Any] = {"disable_log_stats": True, "scheduling_policy": "priority"}
    if device == "cpu":
        dtype = "bfloat16" if cpu_has_bf16 else "float32"
        tokens = _cpu_step(model.config, args.engine.get("dtype", dtype))
        settings |= {"enforce_eager": True, "dtype": dtype, "max_num_batched_tokens": tokens, "max_num_seqs": 256}
    else:
        settings |= {"max_num_batched_tokens": 16384, "max_num_seqs": 512}
        settings |= _of_share(args.engine, gpus, card_bytes)
    if args.kind == "qwen3-reranker":
        settings["enable_prefix_caching"] = True
        if device == "cpu":
            # The CPU build's default block of 128 tokens caches no shared head, which is shorter.
            settings["block_size"] = 32
    at_once = args.engine.get("max_num_seqs")
    settings["max_num_batched_tokens"] = max(
        settings["max_num_batched_tokens"], at_once if isinstance(at_once, int) else 0, _uncut(args, model)
    )
    settings |= args.engine
    settings |= {"model": str(model.folder), "runner": "pooling"}
    settings["hf_overrides"] = _overrides(args, model) | (settings.get("hf_overrides") or {})
    if device == "cpu":
        _size_cpu_cache(settings, model)
        if settings["dtype"] in ("bfloat16", "float16", "half") and not cpu_has_bf16:
            logger.warning(
                f"engine.dtype is {settings['dtype']}, which this CPU can't multiply: several times slower than "
                "float32. Without engine.dtype, each CPU gets the one it is fast in."
            )
    return settings


def _of_share(engine: dict[str, Any], gpus: float, card_bytes: int | None) -> dict[str, Any]:
    """What `num_gpus` means for the engine: a part of one GPU's memory, or tensor parallel over several."""
    if gpus <= 0:
        raise ValueError("num_gpus is 0, but this vLLM is built for GPUs; state a share, such as num_gpus: 0.25")
    if gpus > 1 and gpus != int(gpus):
        raise ValueError(f"num_gpus is {gpus:g}; allowed: up to 1, or a whole number")
    whole = max(1, int(gpus))
    for name, allowed in (
        ("tensor_parallel_size", whole),
        ("pipeline_parallel_size", 1),
        ("data_parallel_size", 1),
    ):
        if engine.get(name, allowed) != allowed:
            raise ValueError(
                f"engine.{name} is {engine[name]}, but num_gpus is {gpus:g}, which makes it {allowed}; "
                "leave it out"
            )
    share = min(gpus, 1.0)
    # Where the card can't be asked for its size, nothing is left for CUDA's context but the usual rest.
    part = utilisation(share, card_bytes) if card_bytes else round(share * MOST, 4)
    # With more, the replicas that share a card would wait for memory that it hasn't.
    most = part
    if share == 1:
        # Nobody else has the card, and who fills it takes the risk of his own: all but the context.
        most = math.floor((1 - CONTEXT_BYTES / card_bytes) * 1000) / 1000 if card_bytes else 1.0
    given = engine.get("gpu_memory_utilization")
    if given is not None and not (isinstance(given, (int, float)) and 0 < given <= most):
        raise ValueError(
            f"engine.gpu_memory_utilization is {given}, but num_gpus is {gpus:g}; allowed: above 0, up to "
            f"{most:g}. Left out, it follows from num_gpus"
        )
    settings: dict[str, Any] = {"tensor_parallel_size": whole, "gpu_memory_utilization": part}
    return settings | ({"distributed_executor_backend": "mp"} if whole > 1 else {})


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


def _cpu_step(config: Mapping[str, Any], dtype: Any) -> int:
    """Tokens of a step whose widest tensor the process keeps for the next one. 512 at least, with less of which
    matrices multiply slower; 4,096 at most, with more of which nothing is faster."""
    queries, keys = attention_widths(config)
    inner = int(config.get("intermediate_size") or 0)
    # Gate and up are one tensor where a layer has both.
    widest = max(inner if is_encoder(config) else 2 * inner, queries + 2 * keys, 1)
    kept = _KEPT_BLOCK_BYTES // (widest * element_bytes(dtype))
    return min(max(kept // 256 * 256, 512), 4096)


def _uncut(args: RerankerArgs, model: Model) -> int:
    """Tokens of the longest text that must not be cut over steps: an encoder's, one for which cutting was turned
    off, and a decoder's that may pool a mean, which vLLM can't of parts. 4,096 at most for those, of which most
    pool the last."""
    longest = longest_prompt(model.config, args.engine.get("max_model_len"))
    encodes = args.kind != "qwen3-reranker" and not is_decoder(model.config)
    if encodes or args.engine.get("enable_chunked_prefill") is False:
        return longest
    return min(longest, 4096) if args.kind == "bi-encoder" else 0


def _size_cpu_cache(settings: dict[str, Any], model: Model) -> None:
    """Half a GiB of KV cache, or what the longest prompt needs; vLLM's default is nearly all memory there is."""
    least = kv_cache_bytes(
        model.config, settings.get("max_model_len"), settings["dtype"], settings.get("block_size")
    )
    given = settings.get("kv_cache_memory_bytes")
    if given is None:
        settings["kv_cache_memory_bytes"] = max(GIB // 2, least)
    elif isinstance(given, int) and given < least:
        raise ValueError(
            f"engine.kv_cache_memory_bytes is {given}, but one prompt of max_model_len tokens needs {least}; "
            "raise it or lower engine.max_model_len"
        )
