"""vLLM behind a narrow interface: prompts in, vectors out. The driver follows from the device, the
settings and vLLM's version."""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from serve_app.reranker.messages import EngineError, EngineFullError
from serve_app.reranker.prompt import Prompt

Task = Literal["classify", "embed"]

# What Serve hands over at once would fill gigabytes: calls of the largest pairs_per_call, or of the longest pairs,
# of which a token takes 36 bytes here and more in vLLM.
MOST_PROMPTS = 65_536
MOST_TOKENS = 16_000_000

# The last line of a traceback.
_EXCEPTION = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt)(?::.*)?$", re.MULTILINE)
_STDERR_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Pooled:
    """`vectors[i]` is what the model gives for prompt `i`: one raw logit, or an embedding as it is."""

    vectors: npt.NDArray[np.float32]
    cached_tokens: int


class Engine(Protocol):
    """A model that is loaded. It serves one event loop; only `close` may be called from anywhere."""

    max_model_len: int
    max_batch_tokens: int
    dtype: str

    async def pool(
        self, prompts: Sequence[Prompt], *, priority: int = 0, scored: Callable[[int], None] = lambda tokens: None
    ) -> Pooled:
        """All prompts' vectors, in order. Raises EngineError; EngineFullError if too much waits already. The first
        failure, or cancelling, aborts the rest in the engine. Lower priorities go first. `scored` is called with
        the tokens of prompts that are done."""
        ...

    async def check_health(self) -> None:
        """Raises EngineError if the engine is dead, or hangs."""
        ...

    def unfinished(self) -> int:
        """Prompts in the engine: waiting or running."""
        ...

    def close(self) -> None:
        """Ends the engine's thread or processes, within ten seconds or so. Calls under way fail."""
        ...


def start(settings: dict[str, Any], task: Task) -> Engine:
    """Loads the model, on whose device it depends how it is driven. Blocks for as long as that takes: call it on
    a thread. Raises EngineError."""
    from serve_app.reranker.async_engine import AsyncEngine
    from serve_app.reranker.core_engine import foreign_core
    from serve_app.reranker.inprocess_engine import InProcessEngine
    from serve_app.reranker.public_engine import PublicEngine

    kind: type[AsyncEngine | InProcessEngine | PublicEngine]
    if foreign_core():
        kind = PublicEngine
    else:
        kind = InProcessEngine if device() == "cpu" and fits_in_process(settings) else AsyncEngine
    log = _stderr_file()
    said_before = log.stat().st_size if log else 0
    try:
        return kind(settings, task)
    except Exception as error:
        raise EngineError(_start_failure(error, settings, _root_cause(error, log, said_before))) from error


def check_room(prompts: Sequence[Prompt], waiting: int, waiting_tokens: int) -> int:
    """The tokens of `prompts`. Raises EngineFullError if they are too many beside what waits; a call whose tokens
    alone are too many is taken where nothing waits, because else it never would be."""
    tokens = sum(len(prompt.ids) for prompt in prompts)
    if waiting + len(prompts) > MOST_PROMPTS:
        raise EngineFullError(f"engine is full: {waiting} prompts wait, {MOST_PROMPTS} may")
    if waiting_tokens and waiting_tokens + tokens > MOST_TOKENS:
        raise EngineFullError(f"engine is full: {waiting_tokens} tokens wait, {MOST_TOKENS} may")
    return tokens


def fits_in_process(settings: dict[str, Any]) -> bool:
    """Whether the engine is one worker, and nobody asked for that in a process of its own."""
    ranks = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
    return (
        all((settings.get(name) or 1) == 1 for name in ranks)
        and settings.get("distributed_executor_backend") in (None, "uni")
        and os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0"
    )


def vllm_args(settings: dict[str, Any]) -> Any:
    """vLLM's `AsyncEngineArgs` of `settings`, in which objects may be mappings."""
    from vllm.config import PoolerConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    settings = dict(settings)
    if isinstance(settings.get("pooler_config"), dict):
        settings["pooler_config"] = PoolerConfig(**settings["pooler_config"])
    return AsyncEngineArgs(**settings)


async def between_steps(llm: Any) -> None:
    """Returns once the core of an `AsyncLLM` has looked at its queue, or is dead."""
    with contextlib.suppress(Exception):
        await llm.is_sleeping()


def prepare_environment(cpus: float) -> None:
    """Settings that vLLM's processes read from the environment. Call it before vLLM is imported; what the
    operator has set stays."""
    defaults = {
        # As NVML counts; CUDA's own order has the fastest card first, where a node has several kinds.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # Setting up its own logging, vLLM closes the handlers of all others, and Serve's log of the replica ends.
        # Without, its warnings and errors go to stderr.
        "VLLM_CONFIGURE_LOGGING": "0",
        # The worker in the engine's own process: on a CPU in this one, else in one that starts in half the time.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # Engines bind to fixed cores otherwise, and two on one machine to the same ones.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(max(1, int(cpus))),
        "TOKENIZERS_PARALLELISM": "true",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def leave_out_unused(on_gpu: bool) -> None:
    """Keeps vLLM and transformers from importing, in this process, packages that they take along where they are
    installed and that no reranker needs: for sound, for training, and on a CPU for GPUs' kernels. A seventh of a
    start. Call it before they are imported."""
    for name in ("scipy", "sklearn") if on_gpu else ("scipy", "sklearn", "triton"):
        # As if it weren't installed, to those who ask whether it is too.
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def import_vllm_without_compiler() -> None:
    """Imports vLLM for an engine that compiles nothing, without most of torch's compiler: a seventh of what it
    imports. vLLM adapts the compiler where it can be imported, while it is imported itself."""
    # Functions of vLLM's and torch's that are compiled at their first call stay as they are.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    name = "torch._inductor.lowering"
    # What imports it after that gets it.
    held = sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    try:
        # Of another version that can't do without it: the next import fails or not as it would have.
        with contextlib.suppress(ImportError):
            import vllm  # noqa: F401
    finally:
        if held is None:
            sys.modules.pop(name, None)


def device() -> Literal["cpu", "gpu"]:
    """What the installed vLLM was built for."""
    from vllm.platforms import current_platform

    return "cpu" if current_platform.is_cpu() else "gpu"


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 natively; elsewhere float32 is faster and as exact."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = file.read(20_000)
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))


def line(error: BaseException) -> str:
    """An error in one line; pydantic's says what it is in its second."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])}"[:500]


def _start_failure(error: BaseException, settings: dict[str, Any], root_cause: str) -> str:
    shown = ", ".join(f"{name}={value!r}" for name, value in sorted(settings.items()) if name != "model")
    return f"the engine can't start on {settings['model']}: {line(error)}{root_cause} [engine: {shown}]"


def _stderr_file() -> Path | None:
    """Where this process and its children write errors, of a replica in Ray's session; None if that is no file."""
    with contextlib.suppress(OSError):
        path = Path("/proc/self/fd/2").readlink()
        if path.is_file():
            return path
    return None


def _root_cause(error: BaseException, log: Path | None, said_before: int) -> str:
    """What an engine in a process of its own died of, which vLLM says on stderr only."""
    if "root cause" not in str(error):
        return ""
    if log is None:
        return "; the cause is on the replica's stderr"
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(said_before, log.stat().st_size - _STDERR_BYTES))
        ends = _EXCEPTION.findall(file.read().decode("utf-8", "replace"))
        # Those that wait for the process that failed point at its error too.
        causes = [end for end in ends if "root cause" not in end]
        if causes:
            return f"; the cause, from {log}: {causes[-1][:500]}"
    return f"; the cause is in {log}"
