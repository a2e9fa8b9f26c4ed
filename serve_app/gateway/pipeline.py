"""A pipeline's run over candidates: stages in order, fusion, and what happens when a stage cannot answer.

Pure orchestration: the caller brings a function that scores, so that this is tested without a fleet.
"""

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from serve_app.config import Fusion, Stage
from serve_app.gateway.deadline import Deadline
from serve_app.gateway.fusion import best_first, fuse
from serve_app.reranker.messages import ScoreResult

Reason = Literal["unavailable", "timeout", "overloaded", "prompt_too_long", "error"]


class StageFailure(Exception):
    """A stage gave no scores. `reason` is what clients are told, `detail` says it in words."""

    def __init__(self, reason: Reason, detail: str, retry_after_s: int | None = None) -> None:
        super().__init__(detail)
        self.reason: Reason = reason
        self.detail = detail
        self.retry_after_s = retry_after_s


class Scorer(Protocol):
    """Scores `documents` against `query` with a stage's variant within `timeout_s`, or raises StageFailure."""

    def __call__(
        self, stage: Stage, query: str, documents: list[str], timeout_s: float
    ) -> Awaitable[ScoreResult]: ...


@dataclass(slots=True)
class StageReport:
    """What a stage did. `skipped` is a choice of the configuration, not a failure."""

    name: str
    took_ms: float = 0.0
    pairs: int = 0
    # Of the pairs: not computed for this call.
    cache_hits: int = 0
    # Of recall: its candidates were known.
    cached: bool = False
    tokens: int = 0
    cached_tokens: int = 0
    truncated: int = 0
    skipped: str | None = None
    failure: StageFailure | None = None

    def count(self, result: ScoreResult) -> None:
        """Adds what a call to the stage's variant did."""
        self.pairs += len(result.scores)
        self.cache_hits += result.cache_hits
        self.tokens += result.tokens
        self.cached_tokens += result.cached_tokens
        self.truncated += result.truncated


@dataclass(slots=True)
class Ranking:
    """`order` holds positions in the input, best first; the other lists are by input position.

    `rerank_scores` is the last score a stage gave (None: no stage scored it), `stage_scores` all of them,
    and `scores` what the order follows: never rising along `order`.
    """

    order: list[int]
    scores: list[float]
    rerank_scores: list[float | None]
    stage_scores: list[list[tuple[str, float]]]
    reports: list[StageReport] = field(default_factory=list)


async def run(
    stages: Sequence[Stage],
    fusion: Fusion | None,
    query: str,
    documents: list[str],
    recall_scores: list[float] | None,
    *,
    score: Scorer,
    fallback_scores: Callable[[], Awaitable[list[float]]],
    skip: Callable[[Stage], str | None],
    deadline: Deadline,
) -> Ranking:
    """Runs `stages` over `documents`, given in recall order with `recall_scores`, or in the caller's order
    without any (plain rerank), in which case `fallback_scores` orders what no stage could score.

    A stage that fails leaves the order as it was (a query too long for it, where there is no order yet, raises its
    StageFailure: that is the caller's to mend); its `keep` still cuts, so that the next, dearer stage never
    gets more than it was configured for. What a cut removes stays in the answer, below what it kept.
    """
    n = len(documents)
    ranking = Ranking(list(range(n)), list(recall_scores or [0.0] * n), [None] * n, [[] for _ in range(n)])
    ordered = recall_scores is not None
    below: list[int] = []
    skipped = [skip(stage) for stage in stages]
    for i, stage in enumerate(stages if documents else ()):
        head = ranking.order
        report = StageReport(stage.variant, skipped=skipped[i])
        ranking.reports.append(report)
        if report.skipped is None:
            started = time.monotonic()
            try:
                result = await score(
                    stage, query, [documents[p] for p in head], deadline.share_s(skipped[i:].count(None))
                )
            except StageFailure as failure:
                if failure.reason == "prompt_too_long" and not ordered:
                    raise
                report.failure = failure
            else:
                recalled = [recall_scores[p] for p in head] if recall_scores else None
                fused = fuse(fusion, recalled, result.scores)
                for p, rerank_score, final in zip(head, result.scores, fused, strict=True):
                    ranking.rerank_scores[p] = rerank_score
                    ranking.stage_scores[p].append((stage.variant, rerank_score))
                    ranking.scores[p] = final
                ranking.order = [head[position] for position in best_first(fused)]
                ordered = True
                report.count(result)
            report.took_ms = (time.monotonic() - started) * 1e3
        if not ordered:
            await _order_by(ranking, fallback_scores)
            ordered = True
        if stage.keep is not None and stage.keep < len(ranking.order):
            below = ranking.order[stage.keep :] + below
            ranking.order = ranking.order[: stage.keep]
    if not ordered:
        await _order_by(ranking, fallback_scores)
    ranking.order += below
    _never_rising(ranking)
    return ranking


async def _order_by(ranking: Ranking, scores: Callable[[], Awaitable[list[float]]]) -> None:
    ranking.scores = await scores()
    ranking.order = best_first(ranking.scores)


def _never_rising(ranking: Ranking) -> None:
    """Stages score on different scales, and clients sort by the score: nothing that a stage put lower may
    show a higher score than what stands above it."""
    ceiling = float("inf")
    for position in ranking.order:
        ceiling = ranking.scores[position] = min(ranking.scores[position], ceiling)
