"""vLLM's engine in this process, stepped by a thread of its own: for one worker on a CPU.

It starts without child processes and hands prompts over without sockets. A native crash takes the replica
with it, which Serve then replaces.
"""

import asyncio
import contextlib
import gc
import logging
import random
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any

import numpy as np

from serve_app.reranker.core_engine import CoreEngine
from serve_app.reranker.engine import Task, line, vllm_args
from serve_app.reranker.last_layer import compute_what_is_read

logger = logging.getLogger("ray.serve")

_CLOSE_LIMIT_S = 10.0


class InProcessEngine(CoreEngine):
    """The thread loads the model, steps the engine while there is work, and between two steps does what was
    ordered meanwhile. It tells the loop of results once a step."""

    def __init__(self, settings: dict[str, Any], task: Task) -> None:
        # None ends the thread.
        self._orders: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        started: Future[Any] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(settings, task, started), name="engine", daemon=True
        )
        self._thread.start()
        self._client = started.result()
        super().__init__(self._client.engine_core.vllm_config, task)

    def unfinished(self) -> int:
        # Aborted prompts stay in the scheduler until the step under way has ended.
        scheduled: int = self._client.engine_core.scheduler.get_num_unfinished_requests()
        return max(len(self._waiting), scheduled)

    def close(self) -> None:
        self._error = self._error or "it was closed"
        self._orders.put(None)
        self._thread.join(_CLOSE_LIMIT_S)

    async def _submit(self, requests: list[Any]) -> None:
        self._loop = asyncio.get_running_loop()
        self._orders.put(partial(self._add, requests))

    async def _abort(self, request_ids: list[str]) -> None:
        self._orders.put(partial(self._client.abort_requests, request_ids))

    async def _answers(self) -> None:
        self._loop = asyncio.get_running_loop()
        answered = asyncio.Event()
        self._orders.put(partial(self._tell, answered.set))
        await answered.wait()

    # What follows runs on the engine's thread.

    def _run(self, settings: dict[str, Any], task: Task, started: "Future[Any]") -> None:
        try:
            client = _load(settings, task)
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(client)
        try:
            self._work(client)
            self._tell(self._die, RuntimeError("it was closed"))
        except BaseException as error:
            self._error = line(error)
            self._tell(self._die, error)
        finally:
            client.shutdown()

    def _work(self, client: Any) -> None:
        scheduler = client.engine_core.scheduler
        while True:
            while not self._orders.empty() or not scheduler.has_requests():
                order = self._orders.get()
                if order is None:
                    return
                order()
            outputs = client.get_output().outputs
            if outputs:
                self._tell(self._deliver, outputs)

    def _add(self, requests: list[Any]) -> None:
        for request in requests:
            try:
                self._client.add_request(request)
            except Exception as error:
                self._tell(self._refuse, request.request_id, error)

    def _tell(self, what: Callable[..., None], *about: Any) -> None:
        # A loop that has closed waits for nothing.
        with contextlib.suppress(RuntimeError):
            if self._loop is not None:
                self._loop.call_soon_threadsafe(what, *about)


def _load(settings: dict[str, Any], task: Task) -> Any:
    from vllm.v1.engine.core_client import InprocClient
    from vllm.v1.executor import Executor

    config = vllm_args(settings).create_engine_config()
    # vLLM collects garbage five times while it starts: two seconds over what was imported.
    gc.freeze()
    client = InprocClient(config, Executor.get_class(config), log_stats=False)
    try:
        if config.model_config.enforce_eager:
            compute_what_is_read(client.engine_core.model_executor.driver_worker.worker.model_runner.model, task)
        _leave_process_groups()
    except Exception as error:
        # Parts that another vLLM may not have, and does without.
        logger.warning(f"This vLLM computes as it does by itself, a tenth slower: {line(error)}")
    # vLLM seeds these with 0, and all replicas of the process alike.
    random.seed()
    np.random.seed()
    return client


def _leave_process_groups() -> None:
    """A single worker has nobody to exchange tensors with, and each of its dozen groups three threads, which wake
    a hundred times a second: 0.034 of a core, taken from the engine's when it computes."""
    from torch.distributed import destroy_process_group
    from vllm.distributed import parallel_state

    for reference in parallel_state._groups.values():
        coordinator = reference()
        # Without them, it leaves none when it ends itself.
        for name in ("device_group", "cpu_group"):
            if hasattr(coordinator, name):
                destroy_process_group(getattr(coordinator, name))
                delattr(coordinator, name)
