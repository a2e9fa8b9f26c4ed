"""What was measured, as a table for people and as JSON for programs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from serve_app.evaluation.metrics import METRICS

_HEADINGS = {"ndcg@10": "nDCG@10", "recall@10": "recall@10", "recall@100": "recall@100", "mrr@10": "MRR@10"}


@dataclass(frozen=True, slots=True)
class Result:
    """One system over all queries. A failed query counts 0 in every metric and is not in the latencies."""

    name: str
    metrics: dict[str, float]
    ndcg_by_lang: dict[str, float]
    queries_by_lang: dict[str, int]
    latency_ms: dict[str, float | None]
    queries: int
    failures: int
    # Attempts beyond the first, after 429, 503 or a refused connection.
    retries: int
    # Of the answered queries.
    degraded_share: float
    # The most common error messages, with how often each came.
    errors: dict[str, int]


@dataclass(frozen=True, slots=True)
class Stopped:
    """`system` was cut off, and is not among the results; nor are those after it."""

    system: str
    reason: str
    is_interrupt: bool


@dataclass(frozen=True, slots=True)
class Report:
    """`unjudged_queries` have no relevant document and were not sent. `url` is without user and password.
    `stopped` is None when all systems were measured."""

    dataset: str
    url: str
    route: str | None
    top_n: int
    queries: int
    unjudged_queries: int
    results: list[Result]
    notes: list[str]
    ignore_identical_ids: bool
    stopped: Stopped | None

    @property
    def failures(self) -> int:
        return sum(result.failures for result in self.results)

    def json(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> str:
        """Markdown that lines up in a terminal too."""
        heads = ["system", *(_HEADINGS[name] for name in METRICS)]
        heads += ["p50 ms", "p95 ms", "p99 ms", "queries", "failures", "degraded"]
        rows = [
            [
                result.name,
                *(f"{result.metrics[name]:.4f}" for name in METRICS),
                *("-" if ms is None else f"{ms:.1f}" for ms in result.latency_ms.values()),
                str(result.queries),
                str(result.failures),
                f"{result.degraded_share:.1%}",
            ]
            for result in self.results
        ]
        parts = [_aligned(heads, rows)]
        langs = self.results[0].queries_by_lang if self.results else {}
        if langs:
            heads = ["nDCG@10", *(f"{lang} ({n})" for lang, n in langs.items())]
            parts.append(
                _aligned(
                    heads, [[r.name, *(f"{value:.4f}" for value in r.ndcg_by_lang.values())] for r in self.results]
                )
            )
        lines = [f"{r.name}: {n} x {error}" for r in self.results for error, n in r.errors.items()]
        lines += [f"note: {note}" for note in self.notes]
        if self.stopped:
            lines.append(f"cut off at {self.stopped.system}: {self.stopped.reason}")
        return "\n\n".join([*parts, *(["\n".join(lines)] if lines else [])])


def _aligned(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join([first, *others])} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(heads), line(rule), *(line(row) for row in rows)])
