"""Serve's log of a replica: in time, and with a call's id on every line."""

import logging
import logging.handlers
import threading
import time
from dataclasses import replace

from ray.serve import context

_EVERY_S = 0.25

_writing = threading.Lock()


def write_soon() -> None:
    """From now on warnings are written at once, and other lines within a quarter of a second.

    In fast mode Serve holds lines back until it has a thousand of them, or an error: a quiet replica would never
    tell that it degrades. Once a process; the lines are written on a thread, where no call waits for the disk."""
    if _writing.acquire(blocking=False):
        threading.Thread(target=_write, name="logs", daemon=True).start()


def name_call(request_id: str) -> None:
    """Has the lines of the call that runs here, and of replicas that it asks, carry `request_id`. Serve took the
    caller's X-Request-Id for it, which isn't always one that we answer with."""
    of_serve = context._get_serve_request_context()
    context._serve_request_context.set(replace(of_serve, request_id=request_id))


def _write() -> None:
    while True:
        time.sleep(_EVERY_S)
        # Serve replaces the handler when the config's logging changes.
        for handler in logging.getLogger("ray.serve").handlers:
            if isinstance(handler, logging.handlers.MemoryHandler):
                handler.flushLevel = logging.WARNING
                write_waiting(handler)


def write_waiting(handler: logging.handlers.MemoryHandler) -> None:
    """Like its `flush`, which holds the lock that callers of the logger wait for."""
    handler.acquire()
    try:
        waiting, handler.buffer = handler.buffer, []
    finally:
        handler.release()
    target = handler.target
    if isinstance(target, logging.handlers.RotatingFileHandler):
        _append(target, waiting)
    elif target is not None:
        for record in waiting:
            target.handle(record)


def _append(file: logging.handlers.RotatingFileHandler, records: list[logging.LogRecord]) -> None:
    """Like its `emit` for every record, with one look at the file and one write for all of them."""
    lines: list[str] = []
    first = None
    for record in records:
        try:
            lines.append(file.format(record) + file.terminator)
        except Exception:
            file.handleError(record)
        else:
            first = first or record
    if first is None:
        return
    file.acquire()
    try:
        if file.shouldRollover(first):
            file.doRollover()
        if file.stream is None:
            file.stream = file._open()
        file.stream.write("".join(lines))
        file.flush()
    except Exception:
        # As `emit` does where the disk is full.
        file.handleError(first)
    finally:
        file.release()
