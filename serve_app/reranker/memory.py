"""What a model needs of a GPU's memory, and what a share of one gives. Arithmetic only: no vLLM, torch or Ray.

Figures are bytes, and estimates are from above. docs/gpu-sharing.md says where the rules come from.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GIB = 2**30
# What a process has on a GPU before vLLM looks at it first (CUDA's context), and vLLM therefore doesn't count.
CONTEXT_BYTES = GIB // 2
# Of a share, the part that may be planned with. The rest is for what an engine takes after it has measured
# itself: CUDA graphs beyond the estimate, libraries' workspaces, fragments.
PLANNED = 0.95
# vLLM's own default for an engine that has the card alone.
MOST = 0.92
# Workspaces of cuBLAS and FlashInfer (394 MiB in vLLM's envs.py), CUDA graphs, rotary tables, input buffers.
FIXED_WORKSPACE_BYTES = 3 * GIB // 4

_ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert")
_DECODERS = ("llama", "mistral", "qwen2", "qwen3")
_FLOAT32 = ("float", "float32", "torch.float32")
# Bytes a weight of vLLM's quantisation while loading. Those that aren't here leave linear layers as they are.
_ONLINE = {
    "fp8_per_tensor": 1.0,
    "fp8_per_channel": 1.0,
    "fp8_per_block": 1 + 4 / 128**2,
    "mxfp8": 1 + 1 / 32,
    "mxfp4": 0.5 + 1 / 32,
}


@dataclass(frozen=True, slots=True)
class Parameters:
    """How many parameters a model has, by what becomes of them in vLLM."""

    # Matrices of linear layers, which quantisation shrinks, and the number in the largest one.
    linear: int
    largest: int
    # Embeddings, norms, biases: always in the model's dtype.
    other: int
    # The language model's own head, which is there only until the row for yes and no is made of it.
    head: int = 0
    # Bytes of the tensors that the checkpoint has quantised, as they are stored; those are not in `linear`.
    stored_bytes: int = 0

    @property
    def count(self) -> int:
        """All parameters that stay."""
        return self.linear + self.other


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes that one GPU of a replica must have for the model to start and to score its longest prompt."""

    weights: int
    kv_cache: int
    workspace: int
    # On top of the weights while they load; gone before the cache is made.
    loading: int

    @property
    def total(self) -> int:
        return self.weights + max(self.kv_cache + self.workspace, self.loading)

    def __str__(self) -> str:
        parts = f"weights {gib(self.weights)}, KV cache {gib(self.kv_cache)}, workspace {gib(self.workspace)}"
        if self.loading > self.kv_cache + self.workspace:
            parts += f"; while loading, weights and {gib(self.loading)} more"
        return f"{gib(self.total)} GiB ({parts})"


def gib(size: int) -> str:
    """Rounded up, so that a need that is shown never looks smaller than it is."""
    return f"{math.ceil(size * 100 / GIB) / 100:.2f}"


def utilisation(share: float, card_bytes: int) -> float:
    """The `gpu_memory_utilization` for a share of a card.

    vLLM multiplies it by the card's memory (request_memory in v1/worker/utils.py) and counts all that the process
    takes after its first look at the card (memory_profiling in utils/mem_utils.py). What it doesn't count lies in
    the share too, so that the shares of a card add up to no more than the card.
    """
    part = min(share, 1.0)
    planned = min(PLANNED * part - CONTEXT_BYTES / card_bytes, MOST * part)
    # Rounded first: 0.23 must not become 0.2299 for the last bit of a float.
    return max(0.0, math.floor(round(planned * 10_000, 4)) / 10_000)


def budget_bytes(share: float, card_bytes: int) -> int:
    """Of a card's memory, what the engine of a replica with this share of it may plan with."""
    return int(utilisation(share, card_bytes) * card_bytes)


def smallest_share(need: int, card_bytes: int) -> float | None:
    """The least hundredths of a card that give `need` bytes; None if a whole card doesn't."""
    return next((i / 100 for i in range(1, 101) if budget_bytes(i / 100, card_bytes) >= need), None)


def is_encoder(config: Mapping[str, Any]) -> bool:
    """Whether the model reads a text in one step, without a KV cache."""
    return config.get("model_type") in _ENCODERS


def is_decoder(config: Mapping[str, Any]) -> bool:
    """Whether the model is known to read a text from left to right, so that vLLM may cut it over several steps."""
    return config.get("model_type") in _DECODERS and config.get("is_causal", True)


def longest_prompt(config: Mapping[str, Any], max_model_len: Any) -> int:
    """Tokens: `engine.max_model_len` where it is a number, else what the model has positions for; 0 where it names
    none."""
    return max_model_len if isinstance(max_model_len, int) else int(config.get("max_position_embeddings") or 0)


def parameters(config: Mapping[str, Any]) -> Parameters | None:
    """Counts parameters by the published architectures; None for one that isn't known here.

    Decoders have grouped-query attention, a gated MLP, two norms a layer and, as Qwen3, norms of queries and keys;
    encoders are BERT's and RoBERTa's. vLLM fills embedding tables up to a multiple of 64 rows.
    """
    kind = config.get("model_type")
    if not (kind in _DECODERS or is_encoder(config)) or "hidden_size" not in config:
        return None
    hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
    inner, vocabulary = int(config["intermediate_size"]), _padded(int(config["vocab_size"]))
    if is_encoder(config):
        tables = (
            vocabulary + _padded(int(config["max_position_embeddings"])) + _padded(int(config["type_vocab_size"]))
        )
        # Query, key, value and output, then up and down; each with a bias, and two norms with scale and shift.
        matrices = layers * (4 * hidden * hidden + 2 * hidden * inner)
        small = layers * (4 * hidden + inner + hidden + 4 * hidden)
        # What reads the first token: a pooler or a dense layer, and the row of a single label.
        small += 2 * hidden + hidden * hidden + 2 * hidden + 1
        return Parameters(matrices, max(3 * hidden * hidden, hidden * inner), tables * hidden + small)
    queries, keys = attention_widths(config)
    matrices = layers * (2 * hidden * queries + 2 * hidden * keys + 3 * hidden * inner)
    small = layers * (2 * hidden + (2 * head_dim(config) if kind == "qwen3" else 0)) + hidden
    if kind == "qwen2" or config.get("attention_bias"):
        small += layers * (queries + 2 * keys + hidden)
    return Parameters(
        linear=matrices,
        largest=max(2 * hidden * inner, hidden * (queries + 2 * keys)),
        other=vocabulary * hidden + small,
        # Made also where it is tied to the embeddings, and thrown away again (models/adapters.py).
        head=vocabulary * hidden,
    )


def needs(config: Mapping[str, Any], counted: Parameters, engine: Mapping[str, Any]) -> Needs:
    """What one of the GPUs needs under these engine arguments, ours and the user's.

    Workspace: in a step of T tokens (max_num_batched_tokens) the hidden state, the residual, a norm's and a
    layer's output live at once, and of the widest layer input and output: T x dtype x (4 hidden + 3 inner, or
    twice the width of queries, keys and values); for encoders, pooling adds two copies in float32.
    Loading: the head, and where vLLM quantises, one layer in 16 bit beside its result
    (model_loader/reload/layerwise.py).
    """
    width = element_bytes(engine.get("dtype"))
    ranks = int(engine.get("tensor_parallel_size") or 1)
    linear = _ONLINE.get(str(engine.get("quantization")))
    online = linear is not None
    if linear is None:
        linear = _checkpoint_bytes(config) or width
    weights = counted.linear * linear + counted.other * width + counted.stored_bytes
    loading = counted.head * width + (counted.largest * (width + linear) if online else 0)
    hidden, inner = int(config.get("hidden_size") or 0), int(config.get("intermediate_size") or 0)
    queries, keys = attention_widths(config)
    widest = max(3 * inner, 2 * (queries + 2 * keys)) / ranks
    a_token = width * (4 * hidden + widest) + (8 * hidden if is_encoder(config) else 0)
    given = engine.get("kv_cache_memory_bytes")
    least = (
        0
        if is_encoder(config)
        else kv_cache_bytes(
            config,
            engine.get("max_model_len"),
            engine.get("dtype"),
            engine.get("block_size") or 16,
            engine.get("kv_cache_dtype"),
            ranks,
        )
    )
    return Needs(
        weights=math.ceil(weights / ranks),
        kv_cache=given if isinstance(given, int) else least,
        workspace=math.ceil(int(engine.get("max_num_batched_tokens") or 0) * a_token) + FIXED_WORKSPACE_BYTES,
        loading=math.ceil(loading / ranks),
    )


def kv_cache_bytes(
    config: Mapping[str, Any],
    max_model_len: Any,
    dtype: Any,
    block_size: int | None,
    kv_cache_dtype: Any = None,
    ranks: int = 1,
) -> int:
    """Of the least KV cache that holds one prompt of the longest allowed length, and a block to spare: vLLM starts
    with no less (check_enough_kv_cache_memory in v1/core/kv_cache_utils.py).
    An estimate from above for models whose layers don't all attend fully."""
    if not config.get("num_attention_heads"):
        return 0
    length = longest_prompt(config, max_model_len)
    block = block_size or 128
    return (math.ceil(length / block) + 1) * block * kv_bytes_a_token(config, dtype, kv_cache_dtype, ranks)


def kv_bytes_a_token(config: Mapping[str, Any], dtype: Any, kv_cache_dtype: Any = None, ranks: int = 1) -> int:
    """On one of `ranks` GPUs: keys and values of all layers. Heads that are too few to share are copied."""
    kind = str(kv_cache_dtype)
    width = element_bytes(dtype)
    if kind.startswith(("fp8", "int8")) and "per_token" not in kind:
        width = 1
    heads = int(config.get("num_key_value_heads") or config.get("num_attention_heads") or 0)
    layers = int(config.get("num_hidden_layers") or 0)
    return layers * 2 * max(1, math.ceil(heads / ranks)) * head_dim(config) * width


def element_bytes(dtype: Any) -> int:
    return 4 if dtype in _FLOAT32 else 2


def head_dim(config: Mapping[str, Any]) -> int:
    """Width of one attention head; where the model doesn't say, the hidden size is shared out."""
    heads = int(config.get("num_attention_heads") or 1)
    return int(config.get("head_dim") or int(config.get("hidden_size") or 0) // heads)


def _checkpoint_bytes(config: Mapping[str, Any]) -> float | None:
    """Bytes a weight of linear layers in a quantised checkpoint, with four for each group's scale and zero; None
    if it isn't quantised, or by a method that isn't known here."""
    settings = str(config.get("quantization_config") or "")
    bits = re.search(r"'(?:w_bit|bits|num_bits|weight_bits)': (\d+)", settings)
    width = int(bits[1]) if bits else 8 if "fp8" in settings else 4 if "fp4" in settings else 0
    group = re.search(r"'(?:group_size|q_group_size)': (\d+)", settings)
    return width / 8 + 4 / int(group[1] if group else 128) if width else None


def attention_widths(config: Mapping[str, Any]) -> tuple[int, int]:
    """Elements that a token has in all heads: of its queries, and of its keys, which are as many as values."""
    heads = int(config.get("num_attention_heads") or 0)
    return heads * head_dim(config), int(config.get("num_key_value_heads") or heads) * head_dim(config)


def _padded(rows: int) -> int:
    return math.ceil(rows / 64) * 64
