"""What a recall replica tells Prometheus of the index it opened; docs/operations.md has the table."""

from typing import Any

from ray import serve
from ray.util.metrics import Gauge


def report_index(stats: dict[str, Any]) -> None:
    """Once will do: an index stays as it was opened, and Ray goes on telling the last number."""
    context = serve.get_replica_context()
    labels = {"catalogue": context.app_name, "replica": context.replica_tag}
    documents = Gauge("serve_app_recall_documents", "Documents of the index.", tag_keys=tuple(labels))
    size = Gauge("serve_app_recall_index_bytes", "The index's files, rows included.", tag_keys=tuple(labels))
    documents.set(stats["documents"], labels)
    size.set(stats["bytes"], labels)
