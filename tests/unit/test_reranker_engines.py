"""What waits in an engine and how it starts; vLLM is played by doubles."""

import asyncio
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serve_app.config import RerankerArgs
from serve_app.reranker import core_engine, deployment, engine, public_engine
from serve_app.reranker.async_engine import AsyncEngine
from serve_app.reranker.core_engine import CoreEngine
from serve_app.reranker.engine import prepare_environment, start
from serve_app.reranker.gpu import Card
from serve_app.reranker.messages import EngineError, EngineFullError
from serve_app.reranker.model import Model
from serve_app.reranker.prompt import Prompt
from serve_app.reranker.public_engine import PublicEngine
from tests.models import qwen3_without_weights, qwen_tokenizer

CONFIG: Any = SimpleNamespace(
    model_config=SimpleNamespace(max_model_len=512, dtype="torch.float32", get_vocab_size=lambda: 1000),
    scheduler_config=SimpleNamespace(max_num_batched_tokens=1024, policy="priority"),
)


class Params:
    def __init__(self, **settings: Any) -> None:
        pass

    def verify(self, config: Any) -> None:
        pass


class Core(CoreEngine):
    """Answers when it is told to."""

    def __init__(self) -> None:
        super().__init__(CONFIG, "classify")
        self.aborted: list[str] = []

    async def _submit(self, requests: list[Any]) -> None:
        pass

    async def _abort(self, request_ids: list[str]) -> None:
        self.aborted += request_ids

    async def _answers(self) -> None:
        pass

    def close(self) -> None:
        pass

    def answer(self, count: int) -> None:
        import torch

        self._deliver(
            [
                SimpleNamespace(request_id=i, pooling_output=torch.ones(1), finish_reason=None, prefill_stats=None)
                for i in list(self._waiting)[:count]
            ]
        )


class Llm:
    """What `AsyncLLM` is to the public engine; answers once `go_on` is set."""

    vllm_config = CONFIG

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.fails = False

    async def encode(self, *given: Any, **settings: Any) -> Any:
        import torch

        await self.go_on.wait()
        if self.fails:
            raise RuntimeError("out of luck")
        yield SimpleNamespace(error=None, outputs=SimpleNamespace(data=torch.ones(1)), num_cached_tokens=0)


@pytest.fixture
def _vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    double = SimpleNamespace(PoolingParams=Params)
    core = SimpleNamespace(EngineCoreRequest=SimpleNamespace)
    llm = SimpleNamespace(AsyncLLM=SimpleNamespace(from_engine_args=lambda settings: Llm()))
    monkeypatch.setitem(sys.modules, "vllm", double)
    monkeypatch.setitem(sys.modules, "vllm.v1.engine", core)
    monkeypatch.setitem(sys.modules, "vllm.v1.engine.async_llm", llm)
    monkeypatch.setattr(public_engine, "vllm_args", lambda settings: settings)


def prompts(count: int, tokens: int = 100) -> list[Prompt]:
    return [Prompt([7] * tokens) for _ in range(count)]


async def full(running: CoreEngine | PublicEngine, waiting: int, given: Sequence[Prompt], message: str) -> None:
    assert running._waiting_tokens == waiting
    with pytest.raises(EngineFullError, match=message):
        await running.pool(given)
    assert running._waiting_tokens == waiting


async def under_way(running: CoreEngine | PublicEngine, given: Sequence[Prompt]) -> "asyncio.Task[Any]":
    call = asyncio.create_task(running.pool(given))
    await asyncio.sleep(0)
    return call


@pytest.mark.usefixtures("_vllm")
def test_as_many_tokens_wait_in_the_core_as_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "MOST_TOKENS", 1000)

    async def calls() -> None:
        core = Core()
        first = await under_way(core, prompts(9))
        await full(core, 900, prompts(2), "engine is full: 900 tokens wait, 1000 may")
        core.answer(4)
        second = await under_way(core, prompts(5))
        await full(core, 1000, prompts(1, tokens=1), "1000 tokens wait")
        core.answer(5)
        assert (await first).vectors.shape == (9, 1)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        assert len(core.aborted) == 5
        assert core._waiting_tokens == 0
        # Alone, a call of any size is taken.
        third = await under_way(core, prompts(20))
        core.answer(3)
        core._die(RuntimeError("out of luck"))
        with pytest.raises(EngineError, match="out of luck"):
            await third
        assert core._waiting_tokens == 0

    asyncio.run(calls())


@pytest.mark.usefixtures("_vllm")
def test_a_prompt_that_the_core_refuses_or_loses_waits_no_longer() -> None:
    async def calls() -> None:
        core = Core()
        call = await under_way(core, prompts(3))
        core._refuse("0-1", ValueError("not this one"))
        core._deliver([SimpleNamespace(request_id="0-2", pooling_output=None, finish_reason="abort")])
        assert core._waiting_tokens == 100
        with pytest.raises(EngineError, match="not this one"):
            await call
        with pytest.raises(EngineError, match="513 tokens; allowed"):
            await core.pool(prompts(2, tokens=513))
        assert core._waiting_tokens == 0

    asyncio.run(calls())


@pytest.mark.usefixtures("_vllm")
@pytest.mark.parametrize("ends", ["answered", "failed", "cancelled"])
def test_the_public_engine_takes_no_more_than_may_wait(monkeypatch: pytest.MonkeyPatch, ends: str) -> None:
    monkeypatch.setattr(engine, "MOST_TOKENS", 1000)
    monkeypatch.setattr(engine, "MOST_PROMPTS", 20)

    async def calls() -> None:
        running = PublicEngine({}, "classify")
        call = await under_way(running, prompts(9))
        await full(running, 900, prompts(2), "engine is full: 900 tokens wait, 1000 may")
        await full(running, 900, prompts(12, tokens=1), "engine is full: 9 prompts wait, 20 may")
        running._llm.fails = ends == "failed"
        if ends == "cancelled":
            call.cancel()
        running._llm.go_on.set()
        (result,) = await asyncio.gather(call, return_exceptions=True)
        assert isinstance(result, BaseException) == (ends != "answered")
        assert (running._waiting, running._waiting_tokens) == (0, 0)
        running._llm.fails = False
        assert (await running.pool(prompts(12))).vectors.shape == (12, 1)

    asyncio.run(calls())


def test_gpus_are_counted_as_nvml_does_unless_the_operator_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    prepare_environment(2)
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    monkeypatch.setattr(os, "environ", {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"})
    prepare_environment(2)
    assert os.environ["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"


TRACEBACK = """\
EngineCore failed to start.
Traceback (most recent call last):
  File "loader.py", line 1, in load
    raise Missing
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.
Traceback (most recent call last):
Exception: WorkerProc initialization failed due to an exception. See stack trace for root cause.
INFO nothing else
"""


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, Path | None], str]:
    """The error of an engine's start of which vLLM says something, and its process something else on stderr."""

    def fail(message: str, on_stderr: str, log: Path | None) -> str:
        def broken(self: Any, settings: Any, task: Any) -> None:
            if log is not None:
                with log.open("a") as file:
                    file.write(on_stderr)
            raise RuntimeError(message)

        monkeypatch.setattr(AsyncEngine, "__init__", broken)
        monkeypatch.setattr(core_engine, "foreign_core", lambda: None)
        monkeypatch.setattr(engine, "device", lambda: "gpu")
        monkeypatch.setattr(engine, "_stderr_file", lambda: log)
        with pytest.raises(EngineError) as error:
            start({"model": "m"}, "classify")
        return str(error.value)

    return fail


CORE_FAILED = "Engine core initialization failed. See root cause above. Failed core proc(s): {}"


def test_what_an_engine_s_process_died_of_is_said(
    failing: Callable[[str, str, Path | None], str], tmp_path: Path
) -> None:
    log = tmp_path / "worker-1.err"
    log.write_text("ValueError: of an earlier start\n")
    said = failing(CORE_FAILED, TRACEBACK, log)
    assert said == (
        f"the engine can't start on m: RuntimeError: {CORE_FAILED}; the cause, from {log}: "
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. [engine: ]"
    )
    # Killed, it says nothing.
    assert f"; the cause is in {log} [" in failing(CORE_FAILED, "", log)
    assert "; the cause is on the replica's stderr [" in failing(CORE_FAILED, "", None)
    assert "cause" not in failing("no such quantization", TRACEBACK, log)


def test_stderr_is_found_where_it_is_a_file(tmp_path: Path) -> None:
    saved = os.dup(2)
    try:
        with (tmp_path / "err").open("w") as file:
            os.dup2(file.fileno(), 2)
        assert engine._stderr_file() == tmp_path / "err"
        reading, writing = os.pipe()
        os.dup2(writing, 2)
        assert engine._stderr_file() is None
        os.close(reading)
        os.close(writing)
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def test_a_bad_prompt_is_found_before_the_engine_loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(deployment, "import_vllm_without_compiler", lambda: None)
    monkeypatch.setattr(deployment, "_start", lambda *given: loaded.append("engine") or "engine")
    folder = qwen3_without_weights(tmp_path / "m", hidden_size=8)
    model = Model(folder, {"architectures": ["Qwen3ForCausalLM"]}, "r")

    def load(**settings: Any) -> Any:
        args = RerankerArgs.model_validate({"model": str(folder), "kind": "qwen3-reranker", **settings})
        return deployment._load(args, model, 0, [], "variant")

    with pytest.raises(ValueError, match=r"prompt.yes is 'certainly so', which is no single token"):
        load(prompt={"yes": "certainly so"})
    assert loaded == []
    assert load()[1] == "engine"


@pytest.mark.parametrize("cards", [[], [Card("GPU-a", 80 * 2**30)]])
def test_a_share_of_a_real_card_is_refused_by_a_vllm_for_cpus(
    monkeypatch: pytest.MonkeyPatch, cards: list[Card]
) -> None:
    monkeypatch.setattr(deployment, "device", lambda: "cpu")
    monkeypatch.setattr(deployment, "start", lambda *given: "engine")
    model = Model(Path("/m"), {"architectures": ["Qwen3ForCausalLM"]}, "r")
    args = RerankerArgs(model="/m", kind="qwen3-reranker")

    def started() -> Any:
        return deployment._start(args, model, qwen_tokenizer(), 0.25, cards, "variant")

    if cards:
        with pytest.raises(
            ValueError, match=r"num_gpus is 0.25, but this vLLM is built for CPUs: make serve GPU=1"
        ):
            started()
    else:
        # A GPU that is only Ray's.
        assert started() == "engine"
