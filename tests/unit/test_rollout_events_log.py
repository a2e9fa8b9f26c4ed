"""Raw events on disk: no more of them than was said."""

import logging
from pathlib import Path

import pytest

from serve_app.rollout import deployment


def test_raw_events_take_five_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment, "_LOG_BYTES", 1000)
    log = deployment._events_log(str(tmp_path / "events" / "raw.jsonl"))
    for i in range(1000):
        log.emit(logging.LogRecord("events", logging.INFO, "", 0, f'{{"event_id": {i}}}', None, None))
    log.close()
    files = sorted((tmp_path / "events").iterdir())
    assert len(files) == 5
    assert sum(file.stat().st_size for file in files) <= 5 * 1000
    assert (tmp_path / "events" / "raw.jsonl").read_text().endswith('{"event_id": 999}\n')
