"""vLLM behind a narrow interface: prompts in, vectors out."""

import asyncio
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from serve_app.reranker.messages import EngineError
from serve_app.reranker.prompt import Prompt


@dataclass(frozen=True, slots=True)
class Pooled:
    """`vectors[i]` is what the model gives for prompt `i`: one raw logit, or an embedding as it is."""

    vectors: list[npt.NDArray[np.float32]]
    cached_tokens: int


class Engine:
    """An `AsyncLLM` and its processes.

    Pairs are handed over as rendered inputs, which saves a hop over a thread for each.
    """

    def __init__(self, settings: dict[str, Any], task: Literal["classify", "embed"]) -> None:
        """Blocks for as long as the model loads: call it on a thread. Raises EngineError."""
        from vllm import PoolingParams
        from vllm.config import PoolerConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        settings = dict(settings)
        if isinstance(settings.get("pooler_config"), dict):
            settings["pooler_config"] = PoolerConfig(**settings["pooler_config"])
        try:
            self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**settings))
        except Exception as error:
            raise EngineError(_start_failure(error, settings)) from error
        config = self._llm.vllm_config
        self.max_model_len: int = config.model_config.max_model_len
        self.max_batch_tokens: int = config.scheduler_config.max_num_batched_tokens
        self.dtype: str = str(config.model_config.dtype).removeprefix("torch.")
        self._params = PoolingParams(task=task, use_activation=False)
        self._typed_params = PoolingParams
        self._task = task
        self._priorities = config.scheduler_config.policy == "priority"

    async def pool(
        self, prompts: Sequence[Prompt], *, priority: int = 0, scored: Callable[[int], None] = lambda tokens: None
    ) -> Pooled:
        """All prompts' vectors, in order. The first failure, or cancelling, aborts the rest in the engine.
        `scored` is called with the tokens of each prompt as it is done."""
        call = uuid.uuid4().hex

        async def one(prompt: Prompt, request_id: str) -> tuple[npt.NDArray[np.float32], int]:
            result = await self._one(prompt, request_id, priority)
            scored(len(prompt.ids))
            return result

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(prompt, f"{call}-{i}")) for i, prompt in enumerate(prompts)]
        except ExceptionGroup as errors:
            raise EngineError(f"engine failed: {_line(errors.exceptions[0])}") from errors.exceptions[0]
        results = [task.result() for task in tasks]
        return Pooled([vector for vector, _ in results], sum(cached for _, cached in results))

    async def check_health(self) -> None:
        """Raises EngineError if the engine is dead."""
        try:
            await self._llm.check_health()
        except Exception as error:
            raise EngineError(f"engine is dead: {_line(error)}") from error

    def unfinished(self) -> int:
        """Prompts in the engine: waiting or running."""
        return int(self._llm.get_num_unfinished_requests())

    def close(self) -> None:
        """Ends the engine's processes."""
        self._llm.shutdown(timeout=5)

    async def _one(self, prompt: Prompt, request_id: str, priority: int) -> tuple[npt.NDArray[np.float32], int]:
        params = self._params
        if prompt.second_from is not None:
            kinds = {"compressed_token_type_ids": prompt.second_from}
            params = self._typed_params(task=self._task, use_activation=False, extra_kwargs=kinds)
        rendered = {"type": "token", "prompt_token_ids": prompt.ids}
        outputs = self._llm.encode(rendered, params, request_id, priority=priority if self._priorities else 0)
        # Runs to its end, though there is one output: closing the generator early wouldn't abort the request.
        result = [output async for output in outputs][-1]
        if result.error is not None or result.outputs.data.numel() == 0:
            # An aborted request finishes with an empty tensor: no score.
            raise EngineError(f"no result for a prompt ({result.error or 'aborted'})")
        vector: npt.NDArray[np.float32] = result.outputs.data.float().reshape(-1).numpy()
        return vector, result.num_cached_tokens or 0


def prepare_environment(cpus: float) -> None:
    """Settings that vLLM's processes read from the environment. Call it before vLLM is imported; what the
    operator has set stays."""
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # One process of the engine, not two: it starts in half the time. The front stays apart.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # Engines bind to fixed cores otherwise, and two on one machine to the same ones.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(max(1, int(cpus))),
        "TOKENIZERS_PARALLELISM": "true",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


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


def _start_failure(error: BaseException, settings: dict[str, Any]) -> str:
    shown = ", ".join(f"{name}={value!r}" for name, value in sorted(settings.items()) if name != "model")
    return f"the engine can't start on {settings['model']}: {_line(error)} [engine: {shown}]"


def _line(error: BaseException) -> str:
    """An error in one line; pydantic's says what it is in its second."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])}"[:500]
