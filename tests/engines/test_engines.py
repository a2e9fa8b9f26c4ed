"""Both ways to drive vLLM, and the one that stands in for them, keep the same promises. Real engines."""

import asyncio
import contextlib
import logging.handlers
import random
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import pytest

from serve_app.config import RerankerArgs
from serve_app.reranker import engine as engines_module
from serve_app.reranker import inprocess_engine as inprocess_module
from serve_app.reranker.async_engine import AsyncEngine
from serve_app.reranker.core_engine import CoreEngine, foreign_core
from serve_app.reranker.engine import Engine, Task, fits_in_process, prepare_environment, start
from serve_app.reranker.engine_args import engine_settings
from serve_app.reranker.inprocess_engine import InProcessEngine
from serve_app.reranker.messages import EngineError, EngineFullError
from serve_app.reranker.model import resolve
from serve_app.reranker.prompt import Prompt
from serve_app.reranker.public_engine import PublicEngine
from serve_app.reranker.scores import sigmoids
from tests.system.conftest import MINILM

KINDS = {"inprocess": InProcessEngine, "async": AsyncEngine, "public": PublicEngine}
# What a deployment chooses between.
CHOSEN = ["inprocess", "async"]
BLOCK = 32
T = TypeVar("T")


class Running:
    """An engine and the loop that it serves."""

    def __init__(self, kind: str, settings: dict[str, Any], task: Task = "classify") -> None:
        before = set(psutil.Process().children(recursive=True))
        self.engine: Engine = KINDS[kind](settings, task)
        self.processes = set(psutil.Process().children(recursive=True)) - before
        self._runner = asyncio.Runner()

    def run(self, work: Awaitable[T], limit_s: float = 180) -> T:
        async def within() -> T:
            async with asyncio.timeout(limit_s):
                return await work

        return self._runner.run(within())

    def core(self) -> psutil.Process:
        (process,) = (p for p in self.processes if "EngineCore" in " ".join(p.cmdline()))
        return process

    def close(self) -> None:
        self.engine.close()
        self._runner.close()


@pytest.fixture(scope="module")
def settings(model_dir: Callable[[str], Path]) -> dict[str, Any]:
    prepare_environment(1)
    engine = {"max_model_len": 512, "dtype": "float32", "max_num_batched_tokens": 1024}
    args = RerankerArgs(model=str(model_dir("qwen")), kind="qwen3-reranker", engine=engine)
    return engine_settings(args, resolve(args), "cpu", 0)


@pytest.fixture(scope="module")
def log_handler() -> Iterator[logging.handlers.MemoryHandler]:
    """As Serve logs. Closed, it would have no target any more."""
    handler = logging.handlers.MemoryHandler(10, target=logging.NullHandler())
    yield handler
    handler.close()


@pytest.fixture(scope="module")
def engines(settings: dict[str, Any], log_handler: logging.handlers.MemoryHandler) -> Iterator[dict[str, Running]]:
    """One of each kind; what breaks an engine starts another."""
    with contextlib.ExitStack() as stack:
        started = {}
        for kind in KINDS:
            started[kind] = running = Running(kind, settings)
            stack.callback(running.close)
        yield started


@pytest.fixture(params=KINDS)
def any_kind(request: pytest.FixtureRequest, engines: dict[str, Running]) -> Running:
    return engines[request.param]


@pytest.fixture(params=CHOSEN)
def running(request: pytest.FixtureRequest, engines: dict[str, Running]) -> Running:
    return engines[request.param]


@pytest.fixture(params=CHOSEN)
def fresh(request: pytest.FixtureRequest, settings: dict[str, Any]) -> Iterator[Running]:
    """One to break. A process holds one engine at a time, so the shared ones are closed before."""
    running = Running(request.param, settings)
    yield running
    running.close()


def prompts(count: int, tokens: int = 100, seed: int | None = None) -> list[Prompt]:
    """As a call brings them: 70 tokens that all share, then their own."""
    rng = random.Random(seed)
    head = [rng.randrange(100, 1000) for _ in range(70)]
    return [Prompt(head + [rng.randrange(100, 1000) for _ in range(tokens - 70)]) for _ in range(count)]


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    while not await condition():  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def settled(running: Running) -> None:
    """Until the engine holds no prompt."""

    async def empty() -> bool:
        return not running.engine.unfinished()

    await until(empty)


async def under_way(running: Running, given: list[Prompt], **more: Any) -> "tuple[asyncio.Task[Any], list[int]]":
    """A call of which some prompts are scored already; the tokens scored so far."""
    scored: list[int] = []
    first = asyncio.Event()

    def count(tokens: int) -> None:
        scored.append(tokens)
        first.set()

    task = asyncio.create_task(running.engine.pool(given, scored=count, **more))
    await first.wait()
    return task, scored


def test_all_ways_give_the_same_scores(engines: dict[str, Running]) -> None:
    given = [prompt for i in range(9) for prompt in prompts(7, 80 + 45 * i, seed=i)]
    found = {kind: running.run(running.engine.pool(given)).vectors for kind, running in engines.items()}
    scores = {kind: np.array(sigmoids(vectors)[1]) for kind, vectors in found.items()}
    assert scores["async"].shape == (63,)
    assert np.ptp(scores["async"]) > 0.5
    for kind in KINDS:
        assert np.abs(scores[kind] - scores["public"]).max() <= 1e-6, kind


def test_scored_tokens_are_counted_as_they_are_done(any_kind: Running) -> None:
    given = prompts(60)
    scored: list[int] = []
    any_kind.run(any_kind.engine.pool(given, scored=scored.append))
    assert sum(scored) == 6000
    # 1024 tokens a step, of which the shared head is read once.
    assert len(scored) > 1


def test_a_batch_reads_its_shared_head_once(any_kind: Running) -> None:
    pooled = any_kind.run(any_kind.engine.pool(prompts(40)))
    assert pooled.cached_tokens == 39 * (70 // BLOCK) * BLOCK


def test_no_prompts_are_no_work(running: Running) -> None:
    assert running.run(running.engine.pool([])).vectors.shape[0] == 0


def test_a_cancelled_call_leaves_the_engine(any_kind: Running) -> None:
    async def cancel() -> tuple[int, float]:
        task, scored = await under_way(any_kind, prompts(3000))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        began = time.monotonic()
        await settled(any_kind)
        await any_kind.engine.pool(prompts(5))
        return sum(scored), time.monotonic() - began

    whole = time.monotonic()
    any_kind.run(any_kind.engine.pool(prompts(3000)))
    whole = time.monotonic() - whole
    scored, after_s = any_kind.run(cancel())
    assert scored < 300_000
    # The next call doesn't wait for the work that nobody waits for.
    assert after_s < whole / 2


def test_a_late_call_leaves_the_engine(running: Running) -> None:
    async def late() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await running.engine.pool(prompts(3000))
        await settled(running)

    running.run(late())


def test_a_burst_of_cancelled_calls_leaves_nothing(running: Running) -> None:
    async def burst() -> None:
        tasks = [asyncio.create_task(running.engine.pool(prompts(64))) for _ in range(60)]
        await asyncio.sleep(0)
        for i, task in enumerate(tasks):
            if i % 3:
                await asyncio.sleep(0.002)
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await settled(running)
        assert (await running.engine.pool(prompts(5))).vectors.shape == (5, 1)
        await running.engine.check_health()

    running.run(burst())
    if isinstance(running.engine, InProcessEngine):
        assert not running.engine._client.engine_core.scheduler.requests


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Prompt([7] * 513), "513 tokens; allowed: 1 to 512"),
        (Prompt([]), "0 tokens; allowed: 1 to 512"),
        (Prompt([10**6]), "token 1000000"),
    ],
)
def test_a_bad_prompt_fails_its_call_only(running: Running, bad: Prompt, message: str) -> None:
    async def both() -> None:
        other = asyncio.create_task(running.engine.pool(prompts(50)))
        with pytest.raises(EngineError, match=message):
            await running.engine.pool([*prompts(3), bad])
        assert (await other).vectors.shape == (50, 1)
        assert running.engine.unfinished() == 0

    running.run(both())


def test_a_prompt_that_the_core_refuses_fails_its_call_only(
    engines: dict[str, Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = engines["inprocess"]
    assert isinstance(running.engine, InProcessEngine)
    client = running.engine._client
    add = client.add_request

    def refuse(request: Any) -> None:
        if request.prompt_token_ids[-1] == 4:
            raise ValueError("not this one")
        add(request)

    monkeypatch.setattr(client, "add_request", refuse)

    async def both() -> None:
        other = asyncio.create_task(running.engine.pool(prompts(50)))
        with pytest.raises(EngineError, match="not this one"):
            await running.engine.pool([*prompts(3), Prompt([5, 4])])
        assert (await other).vectors.shape == (50, 1)
        await settled(running)
        await running.engine.check_health()

    running.run(both())


def test_live_calls_go_before_mirrored_ones(running: Running) -> None:
    async def both() -> tuple[bool, int]:
        mirrored, scored = await under_way(running, prompts(3000), priority=10)
        await running.engine.pool(prompts(50), priority=0)
        still, done = not mirrored.done(), sum(scored)
        mirrored.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await mirrored
        await settled(running)
        return still, done

    still, done = running.run(both())
    assert still
    assert done < 150_000


def test_an_engine_with_too_much_to_do_says_so(any_kind: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines_module, "MOST_PROMPTS", 100)

    async def too_many() -> None:
        first = asyncio.create_task(any_kind.engine.pool(prompts(90)))
        await asyncio.sleep(0)
        with pytest.raises(EngineFullError, match="90 prompts wait, 100 may"):
            await any_kind.engine.pool(prompts(11))
        await first

    any_kind.run(too_many())


@contextlib.contextmanager
def hanging(running: Running, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The engine takes a step that doesn't end."""
    if isinstance(running.engine, InProcessEngine):
        go_on = threading.Event()
        core = running.engine._client.engine_core
        step = core.step_fn

        def stuck() -> Any:
            go_on.wait(180)
            return step()

        with monkeypatch.context() as patch:
            patch.setattr(core, "step_fn", stuck)
            yield
            go_on.set()
    else:
        running.core().send_signal(signal.SIGSTOP)
        yield
        running.core().send_signal(signal.SIGCONT)


def test_a_hanging_step_is_no_health_until_it_ends(any_kind: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = any_kind.engine
    assert isinstance(engine, CoreEngine | PublicEngine)
    assert engine._watchdog.limit_s() >= 60
    monkeypatch.setattr(engine._watchdog, "limit_s", lambda: 0.5)

    async def sick() -> bool:
        try:
            await engine.check_health()
        except EngineError as error:
            return "engine hangs" in str(error)
        return False

    async def well() -> bool:
        return not await sick()

    async def hang() -> None:
        await until(well)
        with hanging(any_kind, monkeypatch):
            call = asyncio.create_task(engine.pool(prompts(5)))
            # Also when the calls that met it have been given up.
            late = asyncio.create_task(engine.pool(prompts(5)))
            await asyncio.sleep(0.1)
            late.cancel()
            await until(sick)
        assert (await call).vectors.shape == (5, 1)
        await until(well)

    any_kind.run(hang())


def test_engines_leave_the_logs_of_others_open(
    engines: dict[str, Running], log_handler: logging.handlers.MemoryHandler
) -> None:
    assert log_handler.target is not None


def test_random_numbers_differ_after_a_start(settings: dict[str, Any], engines: dict[str, Running]) -> None:
    # vLLM seeds them with 0 in its worker's process, which is this one.
    assert random.getstate() != random.Random(0).getstate()


def test_the_way_follows_from_device_and_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    assert fits_in_process({})
    assert fits_in_process({"tensor_parallel_size": 1, "distributed_executor_backend": "uni"})
    assert not fits_in_process({"tensor_parallel_size": 2})
    assert not fits_in_process({"distributed_executor_backend": "mp"})
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    assert not fits_in_process({})


@pytest.mark.parametrize(
    ("device", "ranks", "expected"), [("cpu", 1, "inprocess"), ("cpu", 2, "async"), ("gpu", 1, "async")]
)
def test_start_takes_the_way_that_fits(
    monkeypatch: pytest.MonkeyPatch, device: str, ranks: int, expected: str
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setattr(engines_module, "device", lambda: device)
    for kind in KINDS.values():
        monkeypatch.setattr(kind, "__init__", lambda self, settings, task: None)
    settings = {"model": "m", "tensor_parallel_size": ranks}
    assert type(start(settings, "classify")) is KINDS[expected]


def test_a_vllm_of_other_internals_is_driven_by_its_public_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine.core_client import InprocClient

    assert foreign_core() is None
    monkeypatch.delattr(InprocClient, "get_output")
    assert foreign_core() == "InprocClient has no get_output"
    monkeypatch.setattr(PublicEngine, "__init__", lambda self, settings, task: None)
    assert type(start({"model": "m"}, "classify")) is PublicEngine


# What follows takes the shared engines down.


def test_closing_ends_calls_threads_and_processes(running: Running) -> None:
    async def close() -> float:
        call, _ = await under_way(running, prompts(3000))
        began = time.monotonic()
        # From another thread, as Serve does.
        await asyncio.to_thread(running.engine.close)
        with pytest.raises(EngineError, match="engine failed"):
            await call
        took = time.monotonic() - began
        with pytest.raises(EngineError, match="it was closed"):
            await running.engine.pool(prompts(1))
        return took

    assert running.run(close()) < 45
    _, alive = psutil.wait_procs(running.processes, timeout=15)
    # Python's own, which lasts as long as this process.
    assert not [process for process in alive if "resource_tracker" not in " ".join(process.cmdline())]
    if isinstance(running.engine, InProcessEngine):
        assert not running.engine._thread.is_alive()


@pytest.mark.parametrize(
    ("name", "kind", "reduced"),
    [
        ("qwen", "qwen3-reranker", 2),
        ("cross-encoder", "cross-encoder", 3),
        ("xlmr-cross-encoder", "cross-encoder", 3),
        # It reads the mean of all tokens.
        (MINILM["model"], "bi-encoder", 0),
    ],
)
def test_the_last_layer_is_computed_for_what_is_read(
    name: str, kind: Any, reduced: int, model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_environment(1)
    parts: list[Any] = []
    rows: list[int] = []
    compute = inprocess_module.compute_what_is_read

    def watched(model: Any, task: Any) -> list[Any]:
        parts.extend(compute(model, task))
        # Activations have no weights, and layers may share them.
        for inner in (child for part in parts for child in part.children() if hasattr(child, "weight")):
            inner.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
        return parts

    monkeypatch.setattr(inprocess_module, "compute_what_is_read", watched)
    model = name if name.startswith("package:") else str(model_dir(name))
    engine = {"dtype": "float32", "max_model_len": 256, "max_num_batched_tokens": 1024}
    args = RerankerArgs(model=model, kind=kind, engine=engine)
    task: Task = "embed" if kind == "bi-encoder" else "classify"
    running = Running("inprocess", engine_settings(args, resolve(args), "cpu", 0), task)
    try:
        assert len(parts) == reduced
        # Some are cut over two steps where the model allows that.
        texts = [[2 + (i + j) % 200 for j in range(20 + 37 * i % 230)] for i in range(40)]
        given = [Prompt(text, 5 if name == "cross-encoder" else None) for text in texts]
        rows.clear()
        found = running.run(running.engine.pool(given)).vectors
        assert max(rows, default=0) <= len(given)
        for part in parts:
            del part.forward
        assert np.abs(running.run(running.engine.pool(given)).vectors - found).max() < 1e-5
        assert np.ptp(found, axis=0).max() > 0.01
    finally:
        running.close()


def test_a_vllm_without_the_parts_that_are_spared_scores_all_the_same(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(*_: Any) -> list[Any]:
        raise AttributeError("'ModelRunner' object has no attribute 'model'")

    said: list[str] = []
    monkeypatch.setattr(inprocess_module, "compute_what_is_read", other)
    monkeypatch.setattr(logging.getLogger("ray.serve"), "warning", said.append)
    running = Running("inprocess", settings)
    try:
        assert running.run(running.engine.pool(prompts(3))).vectors.shape == (3, 1)
    finally:
        running.close()
    assert any("has no attribute 'model'" in line for line in said)


def test_a_crash_fails_all_calls_and_health(fresh: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    async def crash() -> None:
        first, _ = await under_way(fresh, prompts(3000))
        second = asyncio.create_task(fresh.engine.pool(prompts(3000)))
        await fresh.engine.check_health()
        if isinstance(fresh.engine, InProcessEngine):

            def broken() -> Any:
                raise RuntimeError("out of luck")

            monkeypatch.setattr(fresh.engine._client.engine_core, "step_fn", broken)
        else:
            fresh.core().kill()
        for call in (first, second):
            with pytest.raises(EngineError, match="engine failed"):
                await call
        with pytest.raises(EngineError, match="engine is dead"):
            await fresh.engine.check_health()
        with pytest.raises(EngineError, match="engine is dead"):
            await fresh.engine.pool(prompts(1))
        assert not isinstance(fresh.engine, CoreEngine) or not fresh.engine._waiting

    fresh.run(crash())
