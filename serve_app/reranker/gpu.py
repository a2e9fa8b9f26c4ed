"""The GPUs that Ray gave this process, read without touching CUDA, and whose turn it is on them.

vLLM sizes its cache by what is free on a card before and after a trial run. Another engine that starts or stops
meanwhile would be counted as ours, so that engines on one card take turns.
"""

import contextlib
import json
import logging
import os
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from serve_app.reranker.memory import gib

logger = logging.getLogger("ray.serve")

# Several large models one after another, each read from a slow disk and compiled.
START_LIMIT_S = 1800.0
# Within Serve's graceful_shutdown_timeout_s, after which the replica is killed anyway.
STOP_LIMIT_S = 30.0
# A replica that was killed leaves its memory a moment later, when its engine's processes have seen it.
_FREE_LIMIT_S = 30.0
_SAY_EVERY_S = 30.0


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU, or a part that MIG cut off one. `total_bytes` is without what the driver keeps, as CUDA counts."""

    uuid: str
    total_bytes: int


def visible_cards(count: int) -> list[Card]:
    """The first `count` of CUDA_VISIBLE_DEVICES, which Ray sets; none where NVIDIA's driver isn't there."""
    with _nvml() as nvml:
        if nvml is None:
            return []
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        try:
            names = [str(i) for i in range(nvml.nvmlDeviceGetCount())] if visible is None else visible.split(",")
            handles = [_handle(nvml, name.strip()) for name in names[:count] if name.strip()]
            return [Card(str(nvml.nvmlDeviceGetUUID(handle)), _memory(nvml, handle)[0]) for handle in handles]
        except nvml.NVMLError as error:
            logger.warning(f"NVML says {error} to CUDA_VISIBLE_DEVICES={visible}: shares of GPUs aren't checked.")
            return []


def wait_for_memory(cards: Sequence[Card], needed_bytes: int, limit_s: float = _FREE_LIMIT_S) -> None:
    """Until that much is free on each card. Raises ValueError with the processes that hold the rest."""
    give_up_at = time.monotonic() + limit_s
    for card in cards:
        while True:
            with _nvml() as nvml:
                if nvml is None:
                    return
                handle = nvml.nvmlDeviceGetHandleByUUID(card.uuid)
                _, free = _memory(nvml, handle)
                if free >= needed_bytes:
                    break
                holders = _holders(nvml, handle)
            if time.monotonic() >= give_up_at:
                raise ValueError(
                    f"the share needs {gib(needed_bytes)} GiB of GPU {card.uuid}, but {free / 2**30:.2f} of "
                    f"{gib(card.total_bytes)} GiB are free; held by {holders}. End what doesn't belong there, or "
                    "lower the other replicas' num_gpus"
                )
            time.sleep(min(1.0, limit_s))


@contextlib.contextmanager
def turn(cards: Sequence[Card], who: str, limit_s: float = START_LIMIT_S) -> Iterator[None]:
    """Holds these GPUs' locks, which the system releases when the process dies; nothing to hold without GPUs.
    Raises TimeoutError after `limit_s`, naming who holds one, and PermissionError where others could write to the
    locks' folder."""
    if not cards:
        yield
        return
    folder = _lock_folder()
    give_up_at = time.monotonic() + limit_s
    with contextlib.ExitStack() as stack:
        # In one order everywhere, so that two replicas over the same GPUs can't wait for each other.
        for uuid in sorted({card.uuid for card in cards}):
            stack.enter_context(_locked(folder / f"{uuid}.lock", uuid, who, give_up_at, limit_s))
        yield


def _lock_folder() -> Path:
    folder = Path(tempfile.gettempdir(), f"serve-app-gpu-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    # The temporary folder is everybody's, so that somebody else may have come first.
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        problem = "is no folder, or a link to one"
    elif found.st_uid != os.getuid():
        problem = f"belongs to user {found.st_uid}"
    elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        problem = f"has mode {stat.S_IMODE(found.st_mode):o}"
    else:
        return folder
    raise PermissionError(
        f"{folder} {problem}; turns on a GPU need a folder that only user {os.getuid()} can write to: remove it, "
        "or set TMPDIR"
    )


@contextlib.contextmanager
def _locked(path: Path, uuid: str, who: str, give_up_at: float, limit_s: float) -> Iterator[None]:
    # One thread may take its turn and another give it back.
    lock, note = FileLock(path, thread_local=False), path.with_suffix(".json")
    while True:
        left = give_up_at - time.monotonic()
        try:
            lock.acquire(timeout=max(0, min(_SAY_EVERY_S, left)), poll_interval=0.2)
            break
        except Timeout:
            if left <= _SAY_EVERY_S:
                raise TimeoutError(
                    f"GPU {uuid} wasn't free for {who} within {limit_s:g} s; in its turn: {_holder(note)}"
                ) from None
            logger.info(f"{who} waits for its turn on GPU {uuid}; in its turn: {_holder(note)}")
    try:
        note.write_text(json.dumps({"who": who, "pid": os.getpid()}), "utf-8")
        yield
    finally:
        lock.release()


def _holder(note: Path) -> str:
    try:
        seen = json.loads(note.read_text("utf-8"))
        return f"{seen['who']} (process {seen['pid']})"
    except (OSError, ValueError, KeyError):
        return "unknown"


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    """NVIDIA's management library, or None where there is none. It makes no CUDA context, which would take half a
    GiB; and comes from Ray, because vLLM's copy can't be had without loading torch."""
    from ray._private.thirdparty import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def _handle(nvml: Any, name: str) -> Any:
    if name.startswith("MIG-"):
        return nvml.nvmlDeviceGetHandleByUUID(name)
    card = nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else nvml.nvmlDeviceGetHandleByUUID(name)
    try:
        current, _ = nvml.nvmlDeviceGetMigMode(card)
    except nvml.NVMLError:
        # Not a card that MIG can divide.
        return card
    return _first_part(nvml, card) if current else card


def _first_part(nvml: Any, card: Any) -> Any:
    """What CUDA takes of a card that MIG has divided and that is named as a whole."""
    for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(card)):
        # Parts that were given back leave gaps.
        with contextlib.suppress(nvml.NVMLError_NotFound):
            return nvml.nvmlDeviceGetMigDeviceHandleByIndex(card, index)
    raise nvml.NVMLError_NotFound


def _memory(nvml: Any, handle: Any) -> tuple[int, int]:
    """Bytes in all and free. The older call counts in what the driver keeps."""
    try:
        info = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
        return int(info.total - info.reserved), int(info.free)
    except nvml.NVMLError:
        info = nvml.nvmlDeviceGetMemoryInfo(handle)
        return int(info.total), int(info.free)


def _holders(nvml: Any, handle: Any) -> str:
    try:
        processes = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except nvml.NVMLError:
        processes = []
    # In containers the driver hides the processes of others.
    listed = [f"process {p.pid} ({gib(p.usedGpuMemory or 0)} GiB)" for p in processes]
    return ", ".join(listed) or "processes that can't be seen from here (another container's, or ending)"
