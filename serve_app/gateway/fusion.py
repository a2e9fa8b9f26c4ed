"""One order out of a stage's rerank scores and the recall scores."""

from collections.abc import Sequence

from serve_app.config import Fusion

# Cormack, Clarke and Buettcher, "Reciprocal Rank Fusion outperforms Condorcet …", SIGIR 2009.
_RRF_K = 60


def fuse(fusion: Fusion | None, recall: Sequence[float] | None, rerank: Sequence[float]) -> list[float]:
    """Final scores, higher is better, in the order of the input; the rerank scores themselves when there
    is no fusion or nothing was recalled (plain rerank calls)."""
    if fusion is None or recall is None:
        return list(rerank)
    w = fusion.recall_weight
    if fusion.method == "minmax":
        pairs = zip(_minmax(recall), _minmax(rerank), strict=True)
    else:
        pairs = zip(_reciprocal_ranks(recall), _reciprocal_ranks(rerank), strict=True)
    return [w * a + (1 - w) * b for a, b in pairs]


def best_first(scores: Sequence[float]) -> list[int]:
    """Positions by falling score; equal scores keep their order."""
    return sorted(range(len(scores)), key=lambda i: -scores[i])


def _minmax(scores: Sequence[float]) -> list[float]:
    low, high = min(scores), max(scores)
    if high == low:
        return [1.0] * len(scores)
    return [(score - low) / (high - low) for score in scores]


def _reciprocal_ranks(scores: Sequence[float]) -> list[float]:
    ranks = [0.0] * len(scores)
    for rank, position in enumerate(best_first(scores), start=1):
        ranks[position] = 1 / (_RRF_K + rank)
    return ranks
