"""What the recall deployment is asked and answers; plain data, shared with its callers."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RecallRequest:
    """One search: the `k` best documents for `query`. `timeout_s` bounds the work."""

    query: str
    k: int
    request_id: str = ""
    timeout_s: float = 30.0


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
    """Candidates best first, at most `k`. `took_ms` is the time inside the deployment."""

    candidates: list[Candidate]
    took_ms: float
