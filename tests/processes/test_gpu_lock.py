"""Turns on a GPU, between real processes; and what NVIDIA's library says, played by a double."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serve_app.reranker import gpu
from serve_app.reranker.gpu import Card, turn, visible_cards, wait_for_memory

GIB = 2**30
CARD = Card("GPU-a", 80 * GIB)
OTHER = Card("GPU-b", 80 * GIB)

HOLDER = """
import sys, time
from serve_app.reranker.gpu import Card, turn
cards = [Card(uuid, 1) for uuid in sys.argv[2].split(",")]
with turn(cards, sys.argv[1], 30):
    print("in", flush=True)
    time.sleep(float(sys.argv[3]))
    print(time.monotonic(), flush=True)
"""


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


def holder(who: str, uuids: str, hold_s: float) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, who, uuids, str(hold_s)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    return process


def test_a_process_waits_for_another_s_turn_and_gets_it_when_that_ends() -> None:
    process = holder("first", "GPU-a", 1.0)
    with turn([CARD], "second", 30):
        entered = time.monotonic()
        assert process.wait(10) == 0
        assert process.stdout is not None
        assert float(process.stdout.read()) <= entered
    with turn([CARD], "second", 0):
        pass


def test_other_gpus_and_no_gpus_wait_for_nobody(tmp_path: Path) -> None:
    process = holder("first", "GPU-a", 60)
    with turn([OTHER], "second", 0), turn([], "on the CPU", 0):
        assert process.poll() is None
    process.kill()
    process.wait()


def test_the_cpu_leaves_nothing_behind(tmp_path: Path) -> None:
    with turn([], "on the CPU", 0):
        assert list(tmp_path.iterdir()) == []


def test_a_killed_process_s_turn_ends_by_itself() -> None:
    process = holder("killed", "GPU-a", 60)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    start = time.monotonic()
    with turn([CARD], "next", 10):
        assert time.monotonic() - start < 5


def test_who_waits_too_long_hears_whom_for() -> None:
    process = holder("qwen3-8b", "GPU-a", 60)
    with (
        pytest.raises(
            TimeoutError,
            match=rf"GPU GPU-a wasn't free for second within 0.5 s; .*: qwen3-8b \(process {process.pid}\)",
        ),
        turn([CARD], "second", 0.5),
    ):
        pass
    process.kill()
    process.wait()


def test_who_waits_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(gpu, "_SAY_EVERY_S", 0.2)
    monkeypatch.setattr(gpu.logger, "propagate", True)
    process = holder("first", "GPU-a", 1.0)
    with caplog.at_level("INFO", gpu.logger.name), turn([CARD], "second", 30):
        pass
    process.wait()
    assert f"second waits for its turn on GPU GPU-a; in its turn: first (process {process.pid})" in caplog.text


def test_a_turn_ends_with_an_error_too() -> None:
    with pytest.raises(RuntimeError), turn([CARD], "fails", 0):
        raise RuntimeError
    with turn([CARD], "next", 0):
        pass


def test_replicas_over_the_same_gpus_in_any_order_never_lock_each_other_out() -> None:
    script = HOLDER + textwrap.dedent("""
        for _ in range(20):
            with turn(cards, sys.argv[1], 30):
                time.sleep(0.005)
    """)
    processes = [
        subprocess.Popen([sys.executable, "-c", script, order, order, "0"], stdout=subprocess.DEVNULL)
        for order in ("GPU-a,GPU-b", "GPU-b,GPU-a")
    ]
    assert [process.wait(60) for process in processes] == [0, 0]


def test_a_fork_of_the_holder_doesn_t_keep_the_turn() -> None:
    """vLLM's processes are forks of the replica, and live on when its engine is up."""
    with turn([CARD], "parent", 0):
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
    try:
        process = holder("next", "GPU-a", 0)
        assert process.wait(10) == 0
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize(
    ("made", "problem"),
    [
        ("open", "has mode 777"),
        ("link", "is no folder, or a link to one"),
        ("dangling link", "is no folder, or a link to one"),
        ("file", "is no folder, or a link to one"),
    ],
)
def test_a_folder_that_others_can_write_to_holds_no_locks(tmp_path: Path, made: str, problem: str) -> None:
    folder, elsewhere = tmp_path / f"serve-app-gpu-{os.getuid()}", tmp_path / "elsewhere"
    if made == "open":
        folder.mkdir()
        folder.chmod(0o777)
    elif made == "file":
        folder.touch()
    else:
        folder.symlink_to(elsewhere)
        if made == "link":
            elsewhere.mkdir()
    with pytest.raises(PermissionError, match=f"{folder} {problem}; .* remove it"), turn([CARD], "mine", 0):
        pass
    assert not list(tmp_path.glob("*/*"))


def test_a_folder_of_somebody_else_s_holds_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = os.getuid()
    monkeypatch.setattr(gpu.os, "getuid", lambda: mine + 1)
    (tmp_path / f"serve-app-gpu-{mine + 1}").mkdir(mode=0o700)
    with (
        pytest.raises(PermissionError, match=f"belongs to user {mine}; .* only user {mine + 1} can"),
        turn([CARD], "mine", 0),
    ):
        pass


class Nvml:
    """Two cards of 80 GiB, of which the driver keeps one. `parts` are what MIG made of the second, by index."""

    class NVMLError(Exception):
        pass

    class NVMLError_NotFound(NVMLError):
        pass

    nvmlMemory_v2 = 2

    def __init__(self, free_gib: float, old: bool = False, parts: dict[int, str] | None = None) -> None:
        self.free, self.old, self.parts = int(free_gib * GIB), old, parts

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return f"GPU-{'ab'[index]}"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetMigMode(self, handle: str) -> list[int]:
        if handle == "GPU-a":
            raise self.NVMLError("Not Supported")
        # Since, and after, the next reset.
        return [int(self.parts is not None), 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: str) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: str, index: int) -> str:
        if index not in (self.parts or {}):
            raise self.NVMLError_NotFound
        return (self.parts or {})[index]

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return handle

    def nvmlDeviceGetMemoryInfo(self, handle: str, version: int | None = None) -> Any:
        if version and self.old:
            raise self.NVMLError("driver too old")
        size = 10 if handle.startswith("MIG-") else 80
        return SimpleNamespace(total=size * GIB, reserved=GIB, free=self.free)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        return [SimpleNamespace(pid=4242, usedGpuMemory=60 * GIB)]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Any:
    def use(library: Nvml) -> None:
        monkeypatch.setattr(gpu, "_nvml", lambda: contextlib.nullcontext(library))

    return use


@pytest.mark.parametrize(
    ("visible", "count", "uuids"),
    [
        ("0", 1, ["GPU-a"]),
        ("1", 1, ["GPU-b"]),
        ("1,0", 2, ["GPU-b", "GPU-a"]),
        ("GPU-c", 1, ["GPU-c"]),
        ("", 1, []),
        (None, 2, ["GPU-a", "GPU-b"]),
        (None, 1, ["GPU-a"]),
    ],
)
def test_cards_are_those_that_ray_made_visible(
    nvml: Any, monkeypatch: pytest.MonkeyPatch, visible: str | None, count: int, uuids: list[str]
) -> None:
    nvml(Nvml(40))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_cards(count) == [Card(uuid, 79 * GIB) for uuid in uuids]


@pytest.mark.parametrize("visible", ["1", "GPU-b", "MIG-first"])
def test_of_a_card_that_mig_has_divided_the_first_part_counts(
    nvml: Any, monkeypatch: pytest.MonkeyPatch, visible: str
) -> None:
    nvml(Nvml(40, parts={2: "MIG-first", 3: "MIG-second"}))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_cards(1) == [Card("MIG-first", 9 * GIB)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert visible_cards(1) == [Card("GPU-a", 79 * GIB)]


def test_a_divided_card_without_parts_is_used_unchecked(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml(Nvml(40, parts={}))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert visible_cards(1) == []


def test_old_drivers_do_not_say_what_they_keep(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml(Nvml(40, old=True))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert visible_cards(1) == [Card("GPU-a", 80 * GIB)]


def test_a_card_that_nvml_cannot_read_is_used_unchecked(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Nvml(40)

    def unknown(uuid: str) -> str:
        raise library.NVMLError("not found")

    monkeypatch.setattr(library, "nvmlDeviceGetHandleByUUID", unknown)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-part")
    nvml(library)
    assert visible_cards(1) == []


def test_memory_that_is_free_is_not_waited_for(nvml: Any) -> None:
    nvml(Nvml(20))
    wait_for_memory([CARD, OTHER], 20 * GIB, 0)


def test_memory_that_is_not_free_is_refused_with_who_holds_it(nvml: Any) -> None:
    nvml(Nvml(19.5))
    with pytest.raises(
        ValueError, match=r"needs 20.00 GiB of GPU GPU-a, but 19.50 of 80.00 .* process 4242 \(60.00 GiB\)"
    ):
        wait_for_memory([CARD], 20 * GIB, 0)


def test_memory_that_a_dying_neighbour_frees_is_waited_for(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Nvml(1)
    nvml(library)
    monkeypatch.setattr(gpu.time, "sleep", lambda _: setattr(library, "free", 30 * GIB))
    wait_for_memory([CARD], 20 * GIB, 10)


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a GPU here")
def test_a_machine_without_a_driver_has_no_cards() -> None:
    assert visible_cards(1) == []
    wait_for_memory([CARD], 20 * GIB, 0)


def test_a_replica_refuses_what_cannot_fit_before_it_loads_vllm_or_torch(tmp_path: Path) -> None:
    """As a replica does it, up to the point where it would download and load."""
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 2560,
              "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
              "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_669}  # fmt: skip
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 40_960}))
    script = f"""
import sys
from serve_app.config import RerankerArgs
from serve_app.reranker import deployment
from serve_app.reranker.gpu import Card
deployment.visible_cards = lambda count: [Card("GPU-a", 24 * 2**30)]
args = RerankerArgs(model={str(tmp_path / "m")!r}, kind="qwen3-reranker", engine={{"max_model_len": 8192}})
try:
    deployment._cards(args, 0.25)
except ValueError as error:
    print(error)
assert not {{"vllm", "torch"}} & set(sys.modules), "loaded"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("num_gpus is 0.25: 6.00 GiB of the GPU's 24.00 GiB")
    assert done.stdout.endswith("smallest num_gpus that fits: 0.49\n")
