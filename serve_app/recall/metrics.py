"""What a recall replica tells Prometheus of the index it opened; docs/operations.md has the table."""

from typing import Any

from ray import serve
from ray.util.metrics import Gauge


class Metrics:
    """To be told every few seconds: Ray forgets a number that isn't."""

    def __init__(self, stats: dict[str, Any]) -> None:
        context = serve.get_replica_context()
        self._labels = {"catalogue": context.app_name, "replica": context.replica_tag}
        self._stats = stats
        self._documents, self._bytes = (
            Gauge(f"serve_app_recall_{name}", description, tag_keys=tuple(self._labels))
            for name, description in (
                ("documents", "Documents of the index."),
                ("index_bytes", "The index's files, rows included."),
            )
        )

    def tell(self) -> None:
        self._documents.set(self._stats["documents"], self._labels)
        self._bytes.set(self._stats["bytes"], self._labels)
