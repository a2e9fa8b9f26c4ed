"""What a reranker deployment is asked and answers; plain data, shared with its callers."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Score each of `documents` against `query`.

    `instruction` replaces the variant's own where its model takes one. `max_tokens_per_doc` cuts each
    document, never the query or the prompt. `priority` orders the engine's queue, lower first.
    `timeout_s` bounds the work in the replica, so that an orphaned call does not run on. `part` numbers the chunks
    of one call, from 0. `traceparent` is of the caller's span, and empty where there is none.
    """

    query: str
    documents: list[str]
    instruction: str | None = None
    max_tokens_per_doc: int | None = None
    priority: int = 0
    request_id: str = ""
    timeout_s: float = 60.0
    part: int = 0
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """`scores[i]` belongs to `documents[i]`: P(yes) or a sigmoid in [0, 1], a cosine in [-1, 1] for
    bi-encoders. `logits` are the same before the sigmoid (yes minus no for causal rerankers; the cosine
    itself for bi-encoders). `tokens` counts prompt tokens, `cached_tokens` those found in the prefix cache,
    `truncated` the documents that lost tokens. `revision` names the weights, `fingerprint` all that decides a
    score in the replica (empty: it doesn't say). `cache_hits` of the pairs weren't computed for this result: the
    gateway had them."""

    scores: list[float]
    logits: list[float]
    tokens: int
    cached_tokens: int
    truncated: int
    revision: str
    took_ms: float
    fingerprint: str = ""
    cache_hits: int = 0


class PromptTooLongError(ValueError):
    """Query and instruction alone leave no room for a document; the message names the limit."""


class EngineError(RuntimeError):
    """The engine failed, died or never started. Holds only text, so that callers without vLLM can read it."""


class EngineFullError(EngineError):
    """As many prompts wait for the engine as may; the same call may go through later."""
