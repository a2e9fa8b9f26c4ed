"""What a pair costs in floating-point operations, and the pairs that are scored. Loads no torch."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve_app.reranker.memory import head_dim, parameters

# Tokens around a document as Qwen3-Reranker reads it: system prompt and instruction, the same in all calls; the
# query, the same in a call; the end. The first two are the head, which the engine computes once a call.
COMMON_TOKENS, QUERY_TOKENS, SUFFIX_TOKENS = 55, 15, 9
HEAD_TOKENS = COMMON_TOKENS + QUERY_TOKENS
# Of one handle call, by default (variants.<name>.pairs_per_call), and calls that a replica takes at once.
PAIRS_A_CALL, CALLS_AT_ONCE = 64, 16
# A round is long enough for steps of the engine to be many. Where calls are slow it is longer, as a replica that
# has a single call idles between its steps; and rounds are fewer.
ROUND_S, _LONGEST_ROUND_S = 1.0, 10.0
LEAST_CALLS = 4
ROUNDS, LEAST_ROUNDS, _ROUNDS_S = 5, 3, 15.0


@dataclass(frozen=True, slots=True)
class Case:
    """One model served one way on the card; `quantization` None is bf16."""

    model: str
    quantization: str | None = None
    replicas: int = 1

    @property
    def name(self) -> str:
        return f"{self.model} {'fp8' if self.quantization else 'bf16'} x{self.replicas}"

    @property
    def is_plain(self) -> bool:
        """One replica in bf16, which the other cases of the shape are compared with."""
        return self.quantization is None and self.replicas == 1

    @property
    def least_s(self) -> float:
        """Less time than this isn't enough to start and to measure anything. Engines start in turns."""
        return 60 + 25 * (self.replicas - 1)

    @property
    def limit_s(self) -> float:
        """What is still running then hangs."""
        return 150 + 25 * (self.replicas - 1)


def allowed_s(case: Case, left_s: float) -> float | None:
    """How long the case may take of the time that is left; None if it isn't worth beginning."""
    return min(case.limit_s, left_s) if left_s >= case.least_s else None


def calls_and_rounds(pairs_per_s: float, replicas: int) -> tuple[int, int]:
    """Calls a round of each replica, and rounds, at that rate of all together."""
    calls_per_s = pairs_per_s / replicas / PAIRS_A_CALL
    count = max(1, round(calls_per_s * ROUND_S), min(LEAST_CALLS, int(calls_per_s * _LONGEST_ROUND_S)))
    return count, max(LEAST_ROUNDS, min(ROUNDS, int(_ROUNDS_S * calls_per_s / count)))


def gemms(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(outputs, inputs) of a layer's matrix multiplications, joined as vLLM joins them: queries with keys and
    values, the attention's output, gate with up, down."""
    hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    queries = int(config["num_attention_heads"]) * head_dim(config)
    keys = int(config["num_key_value_heads"]) * head_dim(config)
    return [(queries + 2 * keys, hidden), (hidden, queries), (2 * inner, hidden), (hidden, inner)]


def gemm_flops(shape: tuple[int, int], tokens: int) -> int:
    return 2 * tokens * shape[0] * shape[1]


def pairs_flops(config: Mapping[str, Any], tokens: int, cached: float, pairs: int = 1) -> float:
    """Of `pairs` prompts of `tokens` tokens, of which `cached` a pair (a mean) were in the prefix cache and
    therefore not computed.

    A multiplication and an addition for each weight of the linear layers and each computed token; embeddings are
    looked up. Attention: each computed token's query against the keys of all tokens up to its own, cached ones
    too, and the same for the values.
    """
    counted = parameters(config)
    if counted is None:
        raise ValueError(f"model_type is {config.get('model_type')!r}, whose parameters aren't known here")
    width = int(config["num_attention_heads"]) * head_dim(config)
    seen = (tokens * (tokens + 1) - cached * (cached + 1)) / 2
    attention = 4 * width * int(config["num_hidden_layers"]) * seen
    return pairs * (2 * counted.linear * (tokens - cached) + attention)


def prompt_tokens(document_tokens: int) -> int:
    return HEAD_TOKENS + document_tokens + SUFFIX_TOKENS


def calls(vocabulary: int, document_tokens: int, count: int, seed: str) -> list[list[list[int]]]:
    """Prompts by call. All calls begin alike, a call's prompts share its query, and no document comes twice under
    different seeds: a repeated one would be read from the cache."""
    fixed = random.Random("head")
    common, suffix = _ids(fixed, vocabulary, COMMON_TOKENS), _ids(fixed, vocabulary, SUFFIX_TOKENS)
    own = random.Random(seed)
    made = []
    for _ in range(count):
        head = common + _ids(own, vocabulary, QUERY_TOKENS)
        made.append([head + _ids(own, vocabulary, document_tokens) + suffix for _ in range(PAIRS_A_CALL)])
    return made


def _ids(source: random.Random, vocabulary: int, count: int) -> list[int]:
    # The last ids are control tokens.
    return source.choices(range(vocabulary * 9 // 10), k=count)
