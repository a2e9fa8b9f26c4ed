"""The seam between the recall deployment and the engine that holds the catalogue."""

from typing import Any, Protocol

from serve_app.recall.messages import Candidate


class Backend(Protocol):
    """One catalogue, searchable. Methods are called from several threads at once."""

    @property
    def fingerprint(self) -> str:
        """Names all that decides which candidates a query has, but among equals at the cut: it changes with the
        catalogue."""

    def search(self, query: str, k: int) -> list[Candidate]:
        """At most `k` candidates, best first, equal scores in the catalogue's order. `query` is plain text. Which
        of those are found that tie for the last places may differ from build to build."""

    def stats(self) -> dict[str, Any]:
        """`documents`, `bytes` (on disk) and what else the engine knows of its index; JSON values."""
