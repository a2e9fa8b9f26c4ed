"""Raw events on disk: no more of them than was said, and none lost before that."""

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from serve_app.rollout import deployment


@pytest.fixture
def _many_threads() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def test_raw_events_take_five_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment, "_LOG_BYTES", 1000)
    log = deployment._events_log(str(tmp_path / "events" / "raw.jsonl"))
    deployment._write(log, [f'{{"event_id": {i}}}' for i in range(1000)])
    log.close()
    files = sorted((tmp_path / "events").iterdir())
    assert len(files) == 5
    assert sum(file.stat().st_size for file in files) <= 5 * 1000
    assert (tmp_path / "events" / "raw.jsonl").read_text().endswith('{"event_id": 999}\n')


@pytest.mark.usefixtures("_many_threads")
def test_events_that_come_at_once_are_all_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment, "_LOG_BYTES", 1000)
    monkeypatch.setattr(deployment, "_LOG_FILES", 1000)
    log = deployment._events_log(str(tmp_path / "raw.jsonl"))
    posts = [[json.dumps({"event_id": f"{post}-{i}"}) for i in range(100)] for post in range(16)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda lines: deployment._write(log, lines), posts))
    log.close()
    written = [line for file in tmp_path.iterdir() for line in file.read_text().splitlines()]
    assert sorted(written) == sorted(line for lines in posts for line in lines)
