"""What the recall deployment is asked and answers; plain data, shared with its callers."""

from dataclasses import dataclass
from operator import attrgetter
from typing import Any


@dataclass(frozen=True, slots=True)
class RecallRequest:
    """One search: the `k` best documents for `query`. `timeout_s` bounds the work; `traceparent` is of the
    caller's span, and empty where there is none."""

    query: str
    k: int
    request_id: str = ""
    timeout_s: float = 30.0
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A recalled document. `score` is BM25 (higher is better, unbounded);
    `source` is the JSON object that was indexed, as text, parsed only for what is shown."""

    id: str
    score: float
    title: str
    text: str
    source: str


@dataclass(frozen=True, slots=True)
class RecallResult:
    """Candidates best first, at most `k`. `took_ms` is the time inside the deployment; `fingerprint` names all
    that decides which candidates a query has (empty: the replica doesn't say)."""

    candidates: list[Candidate]
    took_ms: float
    fingerprint: str = ""

    def __reduce__(self) -> "tuple[Any, ...]":
        # Pickled as columns: 200 frozen dataclasses one by one cost more than the search that found them.
        columns = tuple(zip(*map(_VALUES, self.candidates), strict=True))
        return _result, (columns, self.took_ms, self.fingerprint)


_VALUES = attrgetter("id", "score", "title", "text", "source")


def _result(columns: tuple[tuple[Any, ...], ...], took_ms: float, fingerprint: str) -> RecallResult:
    return RecallResult(list(map(Candidate, *columns)) if columns else [], took_ms, fingerprint)
