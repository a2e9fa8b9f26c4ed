"""The last layer of a model of which one token is read, computed for that token alone.

Attention gives every token what it needs of the others; what comes after it in a layer treats each token by
itself, and after the last layer only the pooled token of a prompt is read. So the others' part of that work, most
of a layer, is left out: the same scores in a tenth less time with six or eight layers, a fortieth with 28.
"""

from collections.abc import Callable
from typing import Any

from serve_app.reranker.engine import Task

# By vLLM's class of a layer, what comes in it after attention. Each takes and gives tensors of a row a token.
_AFTER_ATTENTION = {
    "Qwen3DecoderLayer": ("self_attn.o_proj", "mlp"),
    "BertLayer": ("attention.output", "intermediate", "output"),
}
# By vLLM's class of a pooling method, the rows of the tokens that it reads, of the starts and ends of prompts.
_READ: dict[str, Callable[[Any], Any]] = {
    "LastPool": lambda query_start_loc: query_start_loc[1:] - 1,
    "CLSPool": lambda query_start_loc: query_start_loc[:-1],
}


def compute_what_is_read(model: Any, task: Task) -> list[Any]:
    """Changes `model`, vLLM's, which must run uncompiled and in this process. Returns the modules that compute
    fewer rows from now on; none for a model that isn't known here or of which more is read, as it is for means."""
    from vllm.forward_context import get_forward_context

    layers = [module for module in model.modules() if type(module).__name__ in _AFTER_ATTENTION]
    rows_of = _READ.get(_pooling_method(model, task))
    if not layers or rows_of is None:
        return []

    def rows() -> Any:
        """None while vLLM warms up."""
        metadata = get_forward_context().attn_metadata
        if not isinstance(metadata, dict) or not metadata:
            return None
        # All layers' prompts start at the same rows.
        starts = getattr(next(iter(metadata.values())), "query_start_loc", None)
        return None if starts is None else rows_of(starts)

    last = layers[-1]
    parts = [last.get_submodule(name) for name in _AFTER_ATTENTION[type(last).__name__]]
    for part in parts:
        part.forward = _of_rows(part.forward, rows)
    return parts


def _pooling_method(model: Any, task: Task) -> str:
    """Its class; poolers may hold another one."""
    pooler: Any = getattr(model.pooler, "poolers_by_task", {}).get(task)
    while hasattr(pooler, "pooling"):
        pooler = pooler.pooling
    return type(pooler).__name__


def _of_rows(forward: Callable[..., Any], rows: Callable[[], Any]) -> Callable[..., Any]:
    """`forward` for some rows of its tensors, with zeros for the others. vLLM's linear layers give a tensor and a
    bias, which is None here."""

    def forward_rows(*tensors: Any) -> Any:
        chosen = rows()
        if chosen is None:
            return forward(*tensors)
        given = forward(*(tensor[chosen] for tensor in tensors))
        computed, *more = given if isinstance(given, tuple) else (given,)
        output = computed.new_zeros((len(tensors[0]), *computed.shape[1:]))
        output[chosen] = computed
        return (output, *more) if isinstance(given, tuple) else output

    return forward_rows
