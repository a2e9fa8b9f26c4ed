"""What a replica's log thread writes: every line once, in order, and no further than the file's limit."""

import logging
import logging.handlers
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.logs import write_waiting

Handlers = tuple[logging.handlers.MemoryHandler, logging.handlers.RotatingFileHandler]


@pytest.fixture
def handlers(tmp_path: Path) -> Iterator[Handlers]:
    """As Serve makes them: lines wait in memory for a file that rotates."""
    file = logging.handlers.RotatingFileHandler(tmp_path / "replica.log", maxBytes=400, backupCount=2)
    file.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    memory = logging.handlers.MemoryHandler(1000, target=file)
    yield memory, file
    memory.close()
    file.close()


def say(memory: logging.handlers.MemoryHandler, *messages: str, args: tuple[object, ...] = ()) -> None:
    for message in messages:
        memory.emit(logging.LogRecord("ray.serve", logging.INFO, __file__, 1, message, args, None))


def test_lines_are_written_once_and_in_order(handlers: Handlers, tmp_path: Path) -> None:
    memory, _ = handlers
    say(memory, "one", "two")
    write_waiting(memory)
    say(memory, "three")
    write_waiting(memory)
    write_waiting(memory)
    assert (tmp_path / "replica.log").read_text() == "INFO one\nINFO two\nINFO three\n"


def test_the_file_rotates(handlers: Handlers, tmp_path: Path) -> None:
    memory, _ = handlers
    for i in range(20):
        say(memory, *(f"line {i}.{j} {'x' * 40}" for j in range(5)))
        write_waiting(memory)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["replica.log", "replica.log.1", "replica.log.2"]
    # A batch is never torn apart, so that a file has at most one batch above its limit.
    assert all(path.stat().st_size < 400 + 5 * 60 for path in tmp_path.iterdir())
    assert "line 19.4" in (tmp_path / "replica.log").read_text()


def test_a_line_that_cannot_be_made_loses_no_other(
    handlers: Handlers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory, _ = handlers
    say(memory, "before")
    say(memory, "%d pairs", args=("no number",))
    say(memory, "after")
    write_waiting(memory)
    assert (tmp_path / "replica.log").read_text() == "INFO before\nINFO after\n"
    assert "no number" in capsys.readouterr().err
    # The first of those that are written together.
    say(memory, "%d pairs", args=("no number",))
    say(memory, "at last")
    write_waiting(memory)
    assert (tmp_path / "replica.log").read_text() == "INFO before\nINFO after\nINFO at last\n"


def test_a_full_disk_is_told_and_ends_nothing(
    handlers: Handlers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory, file = handlers
    file.close()
    file.stream = open("/dev/full", "w")  # noqa: SIM115
    say(memory, "lost")
    write_waiting(memory)
    assert "No space left on device" in capsys.readouterr().err
    file.stream = None
    say(memory, "kept")
    write_waiting(memory)
    assert "INFO kept" in (tmp_path / "replica.log").read_text()


def test_another_kind_of_target_gets_every_line() -> None:
    got: list[str] = []

    class Target(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            got.append(record.getMessage())

    memory = logging.handlers.MemoryHandler(1000, target=Target())
    say(memory, "one", "two")
    write_waiting(memory)
    assert got == ["one", "two"]
