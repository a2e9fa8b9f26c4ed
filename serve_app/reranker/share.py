"""Whether a model fits its share of a GPU, before its weights are read, and also where it isn't at hand."""

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_app.config import RerankerArgs, YesNoPrompt
from serve_app.reranker import memory
from serve_app.reranker.engine_args import engine_settings
from serve_app.reranker.memory import Needs, Parameters, gib
from serve_app.reranker.model import Model, read_json, resolve

# Dimensions as published on the hub: hidden, inner, layers, heads.
_PUBLISHED = {
    "Qwen/Qwen3-Reranker-0.6B": (1024, 3072, 28, 16),
    "Qwen/Qwen3-Reranker-4B": (2560, 9728, 36, 32),
    "Qwen/Qwen3-Reranker-8B": (4096, 12288, 36, 32),
}
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's `config.json`, its number of parameters (None: not known), and where both come from."""

    config: dict[str, Any]
    parameters: Parameters | None
    source: str


@dataclass(frozen=True, slots=True)
class Fit:
    """What a share gives and what the model needs of it. `problem` is None if it fits, or if that isn't known
    because `needs` is None."""

    budget_bytes: int
    needs: Needs | None
    # The least num_gpus: hundredths of a GPU, or 2, 4, 8. None if that isn't known, or no number is enough.
    smallest: float | None
    max_model_len: int
    # Of the longest prompts' tokens, how many the KV cache holds; 0 for models without one.
    kv_tokens: int
    problem: str | None


def find_shape(args: RerankerArgs, online: Callable[[str, str | None], dict[str, Any]] | None = None) -> Shape:
    """From a folder or package, the table of the published Qwen3-Reranker, the hub's cache, or the hub (`online`
    gives `config.json`, or raises OSError). Raises ValueError if none has it."""
    if args.model.startswith("package:") or Path(args.model).expanduser().exists():
        # The hash is checked when the model is loaded; here it would mean reading the weights.
        model = resolve(args.model_copy(update={"sha256": None}))
        return Shape(model.config, stored_parameters(model) or memory.parameters(model.config), "folder")
    from huggingface_hub.errors import HFValidationError

    if args.model in _PUBLISHED:
        config: dict[str, Any] | None = _published(args.model)
        source = "built-in table"
    else:
        try:
            config, source = _cached(args), "hub cache"
            if config is None and online is not None:
                config, source = online(args.model, args.revision), "hub"
        except (OSError, HFValidationError):
            # The latter of what is no hub id, as a path on another machine.
            config = None
    if config is None:
        raise ValueError(
            f"model is {args.model!r}, whose config.json is in no folder here, not in the hub's cache, and not to "
            "be had from the hub; set model to a path, or fill HF_HOME beforehand"
        )
    return Shape(config, memory.parameters(config), source)


def hub_config(name: str, revision: str | None) -> dict[str, Any]:
    """`config.json` of a model on the hub, asked once: huggingface_hub's own download tries for half a minute.
    Raises ConnectionError if the hub can't be reached, OSError if it doesn't give the file."""
    import httpx
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    if constants.HF_HUB_OFFLINE:
        raise ConnectionError("HF_HUB_OFFLINE is set")
    url = hf_hub_url(name, "config.json", revision=revision)
    try:
        answer = httpx.get(url, headers=build_hf_headers(), timeout=3, follow_redirects=True)
        answer.raise_for_status()
        config: dict[str, Any] = answer.json()
    except httpx.TransportError as error:
        raise ConnectionError(f"{url}: {error}") from error
    except (httpx.HTTPError, ValueError) as error:
        raise OSError(f"{url}: {error}") from error
    return config


def judge(args: RerankerArgs, shape: Shape, gpus: float, card_bytes: int) -> Fit:
    """Compares a model with `gpus` GPUs of `card_bytes` each. Raises ValueError for settings that contradict each
    other; that the model is too large is `problem`."""
    settings = engine_settings(args, Model(Path(args.model), shape.config, ""), "gpu", gpus, card_bytes=card_bytes)
    config = shape.config
    ranks = settings["tensor_parallel_size"]
    budget = int(settings["gpu_memory_utilization"] * card_bytes)
    longest = memory.longest_prompt(config, settings.get("max_model_len"))
    if settings.get("quantization") == "fp8" and not config.get("quantization_config"):
        raise ValueError(
            "engine.quantization is 'fp8', which vLLM takes for checkpoints in FP8 only, and this one isn't; "
            "to have weights quantised while they load, use fp8_per_tensor"
        )
    if shape.parameters is None:
        return Fit(budget, None, None, longest, 0, None)
    _check_division(config, ranks)
    needs = memory.needs(config, shape.parameters, settings)
    least = memory.needs(config, shape.parameters, settings | {"kv_cache_memory_bytes": None}).kv_cache
    if needs.kv_cache < least:
        raise ValueError(
            f"engine.kv_cache_memory_bytes is {needs.kv_cache}, but one prompt of max_model_len tokens needs "
            f"{least}; leave it out, raise it, or lower engine.max_model_len"
        )
    smallest = _smallest(config, shape.parameters, settings, card_bytes)
    kv_tokens = 0
    if needs.kv_cache:
        block = settings.get("block_size") or 16
        a_token = memory.kv_bytes_a_token(config, settings.get("dtype"), settings.get("kv_cache_dtype"), ranks)
        given = settings.get("kv_cache_memory_bytes")
        left = given if isinstance(given, int) else budget - needs.weights - needs.workspace
        kv_tokens = max(0, left // (a_token * block) - 1) * block
    problem = None
    if needs.total > budget:
        problem = _too_small(args, needs, gpus, budget, card_bytes, smallest, longest)
    return Fit(budget, needs, smallest, longest, kv_tokens, problem)


def shown(gpus: float) -> str:
    """0.25, 2: two decimals below a whole GPU."""
    return f"{gpus:.2f}" if gpus < 1 else f"{gpus:g}"


def check_head_rows(args: RerankerArgs, model: Model, token_id: Callable[[str], int | None], ranks: int) -> None:
    """Raises ValueError if the rows for yes and no don't lie in the first GPU's part of the vocabulary: vLLM reads
    them there by their ids in the whole (load_weights_using_from_2_way_softmax in models/adapters.py), and
    takes the scores from that GPU."""
    if ranks < 2 or args.kind != "qwen3-reranker" or not model.is_causal:
        return
    prompt = args.prompt or YesNoPrompt()
    rows = -(-int(model.config["vocab_size"]) // 64) * 64 // ranks
    for word in (prompt.no, prompt.yes):
        found = token_id(word)
        if found is not None and found >= rows:
            raise ValueError(
                f"num_gpus is {ranks}, but the id of {word!r} is {found}, and the first of {ranks} GPUs, where "
                f"vLLM looks for it, holds the head's rows 0 to {rows - 1}; lower num_gpus, or convert the model "
                "to …ForSequenceClassification"
            )


def stored_parameters(model: Model) -> Parameters | None:
    """Counted in the headers of the folder's safetensors files; None without such files. A quantised checkpoint is
    taken as it is stored, scales included."""
    quantised = bool(model.config.get("quantization_config"))
    linear = largest = other = head = stored = 0
    try:
        for name, entry in _tensors(model.folder):
            count = 1
            for size in entry["shape"]:
                count *= size
            if name.endswith("lm_head.weight"):
                head = count
            elif quantised:
                start, end = entry["data_offsets"]
                stored += end - start
            elif entry["dtype"] not in _FLOATS:
                continue  # Position ids and the like, which vLLM makes itself.
            elif len(entry["shape"]) == 2 and "embed" not in name:
                linear += count
                largest = max(largest, count)
            else:
                other += count
    except (OSError, ValueError, KeyError, struct.error):
        return None
    if not linear + other + stored:
        return None
    made = memory.parameters(model.config)
    if model.is_causal and made is not None:
        # vLLM makes the head also where the file hasn't one, and puts matrices that read the same input into one.
        head, largest = made.head, made.largest
    return Parameters(linear, largest, other, head, stored)


def _tensors(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and entries of the headers. The format is 8 bytes of length, then JSON."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > 100_000_000:  # The format's own limit; otherwise this is something else.
                raise ValueError(f"{path} is no safetensors file")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        yield from header.items()


def _check_division(config: dict[str, Any], ranks: int) -> None:
    if not _divides(config, ranks):
        heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads")
        raise ValueError(
            f"num_gpus is {ranks}, over which the model can't be divided: it has {heads} attention heads, "
            f"{kv_heads or heads} key/value heads and {config.get('intermediate_size')} inner dimensions"
        )


def _divides(config: dict[str, Any], ranks: int) -> bool:
    heads = int(config.get("num_attention_heads") or ranks)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    inner = int(config.get("intermediate_size") or ranks)
    # Key/value heads that are too few are copied.
    return heads % ranks == 0 and inner % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)


def _smallest(config: dict[str, Any], parameters: Parameters, settings: dict[str, Any], card: int) -> float | None:
    for ranks in (1, 2, 4, 8):
        need = memory.needs(config, parameters, settings | {"tensor_parallel_size": ranks}).total
        share = memory.smallest_share(need, card)
        if share is not None and _divides(config, ranks):
            return share if ranks == 1 else float(ranks)
    return None


def _too_small(
    args: RerankerArgs, needs: Needs, gpus: float, budget: int, card: int, smallest: float | None, longest: int
) -> str:
    own = args.engine.get("gpu_memory_utilization")
    stated = f"num_gpus is {gpus:g}" if own is None else f"engine.gpu_memory_utilization is {own}"
    a_gpu = " on each" if gpus > 1 else ""
    if smallest is None:
        way = "no number of GPUs of this size up to 8 is enough"
    elif own is not None and smallest <= gpus:
        way = "leave engine.gpu_memory_utilization out"
    else:
        way = f"smallest num_gpus that fits: {shown(smallest)}"
    return (
        f"{stated}: {gib(int(min(gpus, 1) * card))} GiB{a_gpu} of the GPU's {gib(card)} GiB, of which the engine "
        f"may plan with {budget / memory.GIB:.2f}; {args.model} needs {needs} for max_model_len {longest}; {way}"
    )


def _cached(args: RerankerArgs) -> dict[str, Any] | None:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(args.model, "config.json", revision=args.revision)
    return read_json(args.model, Path(path)) if isinstance(path, str) else None


def _published(name: str) -> dict[str, Any]:
    hidden, inner, layers, heads = _PUBLISHED[name]
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_669,
        "max_position_embeddings": 40_960,
        "torch_dtype": "bfloat16",
    }
