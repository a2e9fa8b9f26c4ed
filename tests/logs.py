"""What Ray and Serve wrote to disk."""

import json
from pathlib import Path
from typing import Any


def logs() -> Path:
    import ray

    return Path(ray._private.worker._global_node.get_logs_dir_path())


def lines_of(request_id: str) -> dict[str, list[dict[str, Any]]]:
    """By `application_Deployment`, the lines of its replicas that carry the id. Fails for one that is no JSON."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in (logs() / "serve").glob("replica_*.log*"):
        for line in path.read_text().splitlines():
            if (record := json.loads(line)).get("request_id") == request_id:
                name = path.name.removeprefix("replica_").rpartition("_")[0]
                found.setdefault(name, []).append(record)
    return found


def files_with(text: str) -> list[str]:
    """The files of Ray's and Serve's logs that have the text."""
    paths = [path for path in logs().rglob("*") if path.is_file() and not path.is_symlink()]
    return [str(path) for path in paths if text.encode() in path.read_bytes()]
