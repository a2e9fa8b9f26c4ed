"""vLLM's asynchronous engine through its public interface alone: slower, for versions whose core is another."""

import asyncio
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from serve_app.reranker.engine import Pooled, Task, between_steps, check_room, line, vllm_args
from serve_app.reranker.messages import EngineError
from serve_app.reranker.prompt import Prompt
from serve_app.reranker.watchdog import Watchdog


class PublicEngine:
    """An `AsyncLLM` that is given each prompt by itself, as a rendered input, which saves a hop over a thread."""

    def __init__(self, settings: dict[str, Any], task: Task) -> None:
        from vllm import PoolingParams
        from vllm.v1.engine.async_llm import AsyncLLM

        self._llm = AsyncLLM.from_engine_args(vllm_args(settings))
        config = self._llm.vllm_config
        self.max_model_len: int = config.model_config.max_model_len
        self.max_batch_tokens: int = config.scheduler_config.max_num_batched_tokens
        self.dtype: str = str(config.model_config.dtype).removeprefix("torch.")
        self._params_type, self._task = PoolingParams, task
        self._priorities = config.scheduler_config.policy == "priority"
        self._watchdog = Watchdog(self.max_batch_tokens)
        self._waiting = self._waiting_tokens = 0

    async def pool(
        self, prompts: Sequence[Prompt], *, priority: int = 0, scored: Callable[[int], None] = lambda tokens: None
    ) -> Pooled:
        if not prompts:
            return Pooled(np.zeros((0, 1), np.float32), 0)
        tokens = check_room(prompts, self._waiting, self._waiting_tokens)
        call = uuid.uuid4().hex

        async def one(prompt: Prompt, request_id: str) -> tuple[npt.NDArray[np.float32], int]:
            vector, cached = await self._one(prompt, request_id, priority)
            self._watchdog.read(len(prompt.ids) - cached)
            scored(len(prompt.ids))
            return vector, cached

        self._waiting += len(prompts)
        self._waiting_tokens += tokens
        self._watchdog.working()
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(prompt, f"{call}-{i}")) for i, prompt in enumerate(prompts)]
        except ExceptionGroup as errors:
            raise EngineError(f"engine failed: {line(errors.exceptions[0])}") from errors.exceptions[0]
        finally:
            self._waiting -= len(prompts)
            self._waiting_tokens -= tokens
            if not self._waiting:
                self._watchdog.idle()
        results = [task.result() for task in tasks]
        return Pooled(np.stack([vector for vector, _ in results]), sum(cached for _, cached in results))

    async def check_health(self) -> None:
        try:
            await self._llm.check_health()
        except Exception as error:
            raise EngineError(f"engine is dead: {line(error)}") from error
        self._watchdog.check(lambda: between_steps(self._llm))

    def unfinished(self) -> int:
        return int(self._llm.get_num_unfinished_requests())

    def close(self) -> None:
        self._llm.shutdown(timeout=5)

    async def _one(self, prompt: Prompt, request_id: str, priority: int) -> tuple[npt.NDArray[np.float32], int]:
        kinds = None if prompt.second_from is None else {"compressed_token_type_ids": prompt.second_from}
        params = self._params_type(task=self._task, use_activation=False, extra_kwargs=kinds)
        rendered = {"type": "token", "prompt_token_ids": prompt.ids}
        outputs = self._llm.encode(rendered, params, request_id, priority=priority if self._priorities else 0)
        # Runs to its end, though there is one output: closing the generator early wouldn't abort the request.
        result = [output async for output in outputs][-1]
        if result.error is not None or result.outputs.data.numel() == 0:
            # An aborted request finishes with an empty tensor: no score.
            raise EngineError(f"no result for a prompt ({result.error or 'aborted'})")
        vector: npt.NDArray[np.float32] = result.outputs.data.float().reshape(-1).numpy()
        return vector, result.num_cached_tokens or 0
