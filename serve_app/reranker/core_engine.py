"""What both ways of driving vLLM's engine core share: prompts become its requests, its outputs become vectors.

The core's own messages are used, past the front that vLLM puts before them, which prepares and answers each prompt
by itself. They are no public interface: `foreign_core` says whether the installed vLLM has them as they are
used here.
"""

import asyncio
import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from serve_app.reranker.engine import Pooled, Task, check_room, line
from serve_app.reranker.messages import EngineError
from serve_app.reranker.prompt import Prompt
from serve_app.reranker.watchdog import Watchdog


@dataclass(slots=True, eq=False)
class _Call:
    prompts: Sequence[Prompt]
    scored: Callable[[int], None]
    done: "asyncio.Future[None]"
    vectors: list[Any]
    left: int
    cached_tokens: int = 0


class CoreEngine(ABC):
    """Keeps the calls under way. Everything but `close` belongs to one event loop."""

    def __init__(self, config: Any, task: Task) -> None:
        from vllm import PoolingParams
        from vllm.v1.engine import EngineCoreRequest

        self.max_model_len: int = config.model_config.max_model_len
        self.max_batch_tokens: int = config.scheduler_config.max_num_batched_tokens
        self.dtype: str = str(config.model_config.dtype).removeprefix("torch.")
        self._model_config = config.model_config
        self._vocabulary: int = config.model_config.get_vocab_size()
        self._priorities = config.scheduler_config.policy == "priority"
        self._task = task
        self._request_type, self._params_type = EngineCoreRequest, PoolingParams
        self._params = self._verified_params({})
        self._numbers = itertools.count()
        self._waiting: dict[str, tuple[_Call, int]] = {}
        self._waiting_tokens = 0
        self._error: str | None = None
        self._watchdog = Watchdog(self.max_batch_tokens)

    async def pool(
        self, prompts: Sequence[Prompt], *, priority: int = 0, scored: Callable[[int], None] = lambda tokens: None
    ) -> Pooled:
        if self._error is not None:
            raise EngineError(f"engine is dead: {self._error}")
        if not prompts:
            return Pooled(np.zeros((0, 1), np.float32), 0)
        tokens = check_room(prompts, len(self._waiting), self._waiting_tokens)
        requests = self._requests(prompts, priority)
        done = asyncio.get_running_loop().create_future()
        call = _Call(prompts, scored, done, [None] * len(prompts), len(prompts))
        for i, request in enumerate(requests):
            self._waiting[request.request_id] = call, i
        self._waiting_tokens += tokens
        self._watchdog.working()
        try:
            await self._submit(requests)
            await done
        finally:
            if call.left:
                await self._give_up([request.request_id for request in requests])
        return Pooled(_matrix(call.vectors), call.cached_tokens)

    async def check_health(self) -> None:
        if self._error is not None:
            raise EngineError(f"engine is dead: {self._error}")
        self._watchdog.check(self._answers)

    def unfinished(self) -> int:
        return len(self._waiting)

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    async def _submit(self, requests: list[Any]) -> None:
        """Hands requests to the core. Raises EngineError."""

    @abstractmethod
    async def _abort(self, request_ids: list[str]) -> None:
        """Has the core forget requests. Raises nothing."""

    @abstractmethod
    async def _answers(self) -> None:
        """Returns once the core has looked at its queue, which it does between two steps."""

    def _deliver(self, outputs: Sequence[Any]) -> None:
        """Takes what a step gave."""
        try:
            self._give_out(outputs)
        except Exception as error:
            # Else calls would wait for what was lost here.
            self._die(error)

    def _give_out(self, outputs: Sequence[Any]) -> None:
        read = 0
        scored: dict[_Call, int] = {}
        for output in outputs:
            call, i = self._take(output.request_id)
            # Unknown are those whose call was given up meanwhile.
            if call is None:
                continue
            vector = output.pooling_output
            if vector is None or not vector.numel():
                # What was aborted, or refused by the core, ends like this; so does all when it shuts down.
                _fail(call, f"engine failed: {self._error or f'no result for a prompt ({output.finish_reason})'}")
                continue
            call.vectors[i] = vector
            call.left -= 1
            tokens = len(call.prompts[i].ids)
            scored[call] = scored.get(call, 0) + tokens
            cached = output.prefill_stats.num_cached_tokens if output.prefill_stats else 0
            call.cached_tokens += cached
            read += tokens - cached
        for call, tokens in scored.items():
            call.scored(tokens)
            if not call.left and not call.done.done():
                call.done.set_result(None)
        self._watchdog.read(read)
        if not self._waiting:
            self._watchdog.idle()

    def _refuse(self, request_id: str, error: BaseException) -> None:
        """Takes it that the core won't have a prompt."""
        call, _ = self._take(request_id)
        if call is not None:
            _fail(call, f"engine refused a prompt: {line(error)}")

    def _die(self, error: BaseException) -> None:
        """Fails all calls, and those to come."""
        self._error = self._error or line(error)
        for call in {call for call, _ in self._waiting.values()}:
            _fail(call, f"engine failed: {self._error}")

    async def _give_up(self, request_ids: list[str]) -> None:
        left = [request_id for request_id in request_ids if self._take(request_id)[0]]
        if not self._waiting:
            self._watchdog.idle()
        await self._abort(left)

    def _take(self, request_id: str) -> tuple[_Call | None, int]:
        """Whose prompt it is and which of them, from now on not waiting any more; (None, 0) if it wasn't."""
        call, i = self._waiting.pop(request_id, (None, 0))
        if call is not None:
            self._waiting_tokens -= len(call.prompts[i].ids)
        return call, i

    def _requests(self, prompts: Sequence[Prompt], priority: int) -> list[Any]:
        """Raises EngineError for a prompt that would bring down the engine instead of failing."""
        call, now = next(self._numbers), time.time()
        params: dict[int | None, Any] = {None: self._params}
        requests = []
        for i, prompt in enumerate(prompts):
            ids = prompt.ids
            if not 0 < len(ids) <= self.max_model_len:
                raise EngineError(f"a prompt has {len(ids)} tokens; allowed: 1 to {self.max_model_len}")
            if max(ids) >= self._vocabulary:
                raise EngineError(f"a prompt holds token {max(ids)}; the model has {self._vocabulary}")
            if prompt.second_from not in params:
                kinds = {"compressed_token_type_ids": prompt.second_from}
                params[prompt.second_from] = self._verified_params({"extra_kwargs": kinds})
            requests.append(
                self._request_type(
                    request_id=f"{call}-{i}",
                    prompt_token_ids=ids,
                    mm_features=None,
                    sampling_params=None,
                    pooling_params=params[prompt.second_from],
                    arrival_time=now,
                    lora_request=None,
                    cache_salt=None,
                    data_parallel_rank=None,
                    priority=priority if self._priorities else 0,
                )
            )
        return requests

    def _verified_params(self, more: dict[str, Any]) -> Any:
        """One for all prompts of a kind: the core only reads it."""
        params = self._params_type(task=self._task, use_activation=False, **more)
        params.verify(self._model_config)
        return params


def foreign_core() -> str | None:
    """Why the installed vLLM's core can't be driven from here: what it lacks of 0.32's; None if nothing."""
    try:
        from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
        from vllm.v1.engine.core_client import AsyncMPClient, InprocClient
    except ImportError as error:
        return line(error)
    wanted: tuple[tuple[type, str], ...] = (
        (InprocClient, "add_request abort_requests get_output shutdown"),
        (AsyncMPClient, "add_request_async abort_requests_async get_output_async"),
        (EngineCoreRequest, "request_id prompt_token_ids pooling_params priority"),
        (EngineCoreOutput, "request_id pooling_output finish_reason prefill_stats"),
    )
    for owner, names in wanted:
        for name in names.split():
            # Their base class has the names too, but does nothing.
            if name not in vars(owner):
                return f"{owner.__name__} has no {name}"
    return None


def _fail(call: _Call, message: str) -> None:
    if not call.done.done():
        call.done.set_exception(EngineError(message))


def _matrix(vectors: list[Any]) -> Any:
    import torch

    return torch.stack(vectors).float().reshape(len(vectors), -1).numpy()
