"""The bodies of answers, from rankings and stage reports. Pure."""

import json
import math
import time
from collections.abc import Sequence
from typing import Any

from serve_app.gateway.pipeline import Ranking, StageReport
from serve_app.gateway.plan import Call
from serve_app.recall.messages import Candidate

_SHOWN_BY_THEMSELVES = {"id", "_id", "title", "text"}
# Nearer to 0 and 1 a score in float64 has no logit.
_LEAST_PROBABILITY = 2.0**-53


def search_answer(
    call: Call, query: str, candidates: list[Candidate], ranking: Ranking, top_n: int, explain: bool
) -> dict[str, Any]:
    """Our own search answer; `explain` adds every stage's score to every result."""
    results: list[dict[str, Any]] = []
    for position in ranking.order[:top_n]:
        candidate = candidates[position]
        fields = json.loads(candidate.source)
        result: dict[str, Any] = {
            "id": candidate.id,
            "score": ranking.scores[position],
            "recall_score": candidate.score,
            "rerank_score": ranking.rerank_scores[position],
            "title": candidate.title,
            "text": candidate.text,
            "document": {k: v for k, v in fields.items() if k not in _SHOWN_BY_THEMSELVES},
        }
        if explain:
            result["stages"] = [
                {"stage": "recall", "score": candidate.score, "rank": position + 1},
                *({"stage": stage, "score": score} for stage, score in ranking.stage_scores[position]),
            ]
        results.append(result)
    return {"id": call.request_id, "query": query, "results": results, "meta": meta(call, ranking.reports)}


def rerank_answer(
    call: Call,
    ranking: Ranking,
    top_n: int | None,
    documents: Sequence[dict[str, Any]] | None,
    raw_scores: bool,
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """The answer of the rerank dialects; `documents` puts each result's document in, `raw_scores` gives logits."""
    results: list[dict[str, Any]] = []
    scores = _logits(ranking.scores) if raw_scores else ranking.scores
    for position in ranking.order[:top_n]:
        result: dict[str, Any] = {"index": position, "relevance_score": scores[position]}
        if documents is not None:
            result["document"] = documents[position]
        results.append(result)
    return {
        "id": call.request_id,
        "model": call.plan.name,
        "results": results,
        "usage": _usage(ranking.reports),
        # Cohere's clients read these and the warnings.
        "meta": {
            "api_version": {"version": "2"},
            "billed_units": {"search_units": 1},
            **meta(call, ranking.reports),
            **({"warnings": list(warnings)} if warnings else {}),
        },
    }


def tei_answer(
    ranking: Ranking, top_n: int | None, texts: Sequence[str] | None, raw_scores: bool
) -> list[dict[str, Any]]:
    """TEI's rerank answer, the best first; `texts` puts each result's text in."""
    results: list[dict[str, Any]] = []
    scores = _logits(ranking.scores) if raw_scores else ranking.scores
    for position in ranking.order[:top_n]:
        result: dict[str, Any] = {"index": position, "score": scores[position]}
        if texts is not None:
            result["text"] = texts[position]
        results.append(result)
    return results


def score_answer(
    call: Call, scores: Sequence[float], reports: Sequence[StageReport], raw_scores: bool
) -> dict[str, Any]:
    """vLLM's score answer; `raw_scores` gives logits."""
    scores = _logits(scores) if raw_scores else scores
    return {
        "id": call.request_id,
        "object": "list",
        "created": int(time.time()),
        "model": call.plan.name,
        "data": [{"index": i, "object": "score", "score": score} for i, score in enumerate(scores)],
        "usage": _usage(reports),
        "meta": meta(call, reports),
    }


def meta(call: Call, reports: Sequence[StageReport]) -> dict[str, Any]:
    """How the answer came about; `degraded` only where something was left out against the configuration."""
    body: dict[str, Any] = {
        "route": call.plan.route,
        "pipeline": call.plan.pipeline,
        "why": call.plan.why,
        "variants": [report.name for report in reports if report.name != "recall"],
        "stages": [_stage(report) for report in reports],
        "took_ms": round((time.monotonic() - call.started) * 1e3, 2),
    }
    if call.plan.place is not None:
        body["rollout"] = {"id": call.plan.place.split.rollout, "role": call.plan.place.role}
    degraded = [
        {"stage": report.name, "reason": report.failure.reason, "detail": report.failure.detail}
        for report in reports
        if report.failure is not None
    ]
    if degraded:
        body["degraded"] = degraded
    return body


def _stage(report: StageReport) -> dict[str, Any]:
    body: dict[str, Any] = {"name": report.name, "took_ms": round(report.took_ms, 2)}
    if report.pairs:
        body |= {
            "pairs": report.pairs,
            "cache_hits": report.cache_hits,
            "tokens": report.tokens,
            "cached_tokens": report.cached_tokens,
            "truncated": report.truncated,
        }
    if report.cached:
        body["cached"] = True
    if report.skipped is not None:
        body["skipped"] = report.skipped
    return body


def _logits(scores: Sequence[float]) -> list[float]:
    bounded = [min(max(score, _LEAST_PROBABILITY), 1 - _LEAST_PROBABILITY) for score in scores]
    return [math.log(p) - math.log1p(-p) for p in bounded]


def _usage(reports: Sequence[StageReport]) -> dict[str, int]:
    tokens = sum(report.tokens for report in reports)
    return {"prompt_tokens": tokens, "total_tokens": tokens}
