"""vLLM's asynchronous engine, in processes of its own: for GPUs and for several workers."""

import asyncio
import contextlib
from typing import Any

from serve_app.reranker.core_engine import CoreEngine
from serve_app.reranker.engine import Task, between_steps, line, vllm_args
from serve_app.reranker.messages import EngineError


class AsyncEngine(CoreEngine):
    """An `AsyncLLM` of which only the client of its engine core is used: one task reads the outputs of all calls,
    and a call waits once, where `AsyncLLM.encode` has a queue and a task for each prompt."""

    def __init__(self, settings: dict[str, Any], task: Task) -> None:
        from vllm.v1.engine.async_llm import AsyncLLM

        self._llm = AsyncLLM.from_engine_args(vllm_args(settings))
        if self._llm.output_handler is not None:
            raise RuntimeError("an engine has to start on a thread: in a loop, AsyncLLM reads the outputs itself")
        super().__init__(self._llm.vllm_config, task)
        self._reader: asyncio.Task[None] | None = None

    async def check_health(self) -> None:
        try:
            await self._llm.check_health()
        except Exception as error:
            self._die(error)
        await super().check_health()

    def close(self) -> None:
        self._error = self._error or "it was closed"
        self._llm.shutdown(timeout=5)

    async def _submit(self, requests: list[Any]) -> None:
        if self._reader is None:
            self._reader = asyncio.create_task(self._read())
        try:
            for request in requests:
                await self._llm.engine_core.add_request_async(request)
        except Exception as error:
            raise EngineError(f"engine failed: {line(error)}") from error

    async def _abort(self, request_ids: list[str]) -> None:
        # Where that fails, the engine is dead.
        with contextlib.suppress(Exception):
            await self._llm.engine_core.abort_requests_async(request_ids)

    async def _answers(self) -> None:
        await between_steps(self._llm)

    async def _read(self) -> None:
        try:
            while True:
                outputs = await self._llm.engine_core.get_output_async()
                self._deliver(outputs.outputs)
        except Exception as error:
            self._die(error)
