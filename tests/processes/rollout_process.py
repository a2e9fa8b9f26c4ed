"""Rollout controllers in processes of their own, which tests kill and freeze. They answer on a socket what the
rollout application answers through Serve."""

import asyncio
import logging
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from serve_app.rollout import controller
from serve_app.rollout.controller import Controller
from serve_app.rollout.store import Store, StoreError, open_store
from tests.processes.redis_server import die_with_the_tests

# Shorter than in production, so that a test sees many of each.
TICK_S, LOOK_S, LEASE_S = 0.02, 0.1, 0.3

# Forked from a process that has imported everything: a start takes milliseconds.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload([__name__])


@dataclass(frozen=True)
class Accident:
    """The process gets `signal` at the `nth` call (from 1) of the store's `method` (None: of any): just before, or
    when the store has done it and the answer isn't there yet."""

    signal: signal.Signals
    nth: int
    method: str | None = None
    after: bool = False


class Process:
    """A controller's process. `folder` has the logs, and a file `ready-VARIANT` for each variant with
    replicas; its path is short, because sockets are there too."""

    started = 0

    def __init__(self, url: str, folder: Path, accident: Accident | None = None, lease_s: float = LEASE_S) -> None:
        Process.started += 1
        self.socket = folder / f"socket-{Process.started}"
        arguments = (url, folder, self.socket, accident, lease_s)
        self._process = _processes.Process(target=_live, args=arguments, daemon=True)
        self._process.start()

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    @property
    def frozen(self) -> bool:
        return self.alive and psutil.Process(self._process.pid).status() == psutil.STATUS_STOPPED

    def send(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while True:
            try:
                return await asyncio.open_unix_connection(self.socket)
            except (FileNotFoundError, ConnectionRefusedError):
                if not self.alive:
                    raise
            await asyncio.sleep(0.005)

    async def freeze(self) -> None:
        """Where it holds no lock of the store's."""
        await self.ask("freeze")
        await until(lambda: self.frozen, "a frozen process")

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    async def ask(self, method: str, *arguments: Any, timeout_s: float = 10) -> Any:
        """Raises what the controller raises, and OSError or TimeoutError where there is no answer."""
        async with asyncio.timeout(timeout_s):
            reader, writer = await self._connected()
            try:
                writer.write(pickle.dumps((method, arguments)))
                writer.write_eof()
                answer = await reader.read()
            finally:
                writer.close()
        if not answer:
            raise ConnectionResetError(f"the controller was gone before it answered {method}")
        value = pickle.loads(answer)
        if isinstance(value, Exception):
            raise value
        return value


async def until(condition: Callable[[], Any], what: str, limit_s: float = 30, every_s: float = 0.01) -> Any:
    """What `condition` returned once that was true."""
    deadline = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {limit_s:g} s for {what}"
        await asyncio.sleep(every_s)
    return found


class WatchedStore:
    """Has the accident at the call that it is for, and remembers what commits were refused for."""

    def __init__(self, store: Store, accident: Accident | None) -> None:
        self._store = store
        self._accident = accident
        self._calls: Counter[str | None] = Counter()
        self.refusals: list[str] = []

    def freeze(self) -> None:
        self._accident = Accident(signal.SIGSTOP, self._calls["active"] + 1, "active")

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        def call(*arguments: Any) -> Any:
            self._calls[name] += 1
            self._calls[None] += 1
            accident = self._accident
            due = accident is not None and accident.method in (name, None)
            due = due and self._calls[accident.method] == accident.nth
            if due and not accident.after:
                _meet(accident)
            try:
                return method(*arguments)
            except StoreError as error:
                if name == "commit":
                    self.refusals.append(type(error).__name__)
                raise
            finally:
                if due and accident.after:
                    _meet(accident)

        return call


def _meet(accident: Accident) -> None:
    # Of this thread, because others may be told first, and this one go on for a moment.
    signal.pthread_kill(threading.get_ident(), accident.signal)


def _live(url: str, folder: Path, socket: Path, accident: Accident | None, lease_s: float) -> None:
    die_with_the_tests()
    logging.basicConfig(filename=folder / f"{socket.name}.log", level=logging.INFO)
    controller.TICK_S, controller._LOOK_S, controller.LEASE_S = TICK_S, LOOK_S, lease_s
    asyncio.run(_serve(url, folder, socket, accident))


async def _serve(url: str, folder: Path, socket: Path, accident: Accident | None) -> None:
    async def not_ready(variants: Sequence[str]) -> list[str]:
        return [variant for variant in variants if not (folder / f"ready-{variant}").exists()]

    store: Any = WatchedStore(open_store(url), accident)
    alive = Controller(store, not_ready)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        method, arguments = pickle.loads(await reader.read())
        try:
            value: Any
            if method == "leads":
                value = alive._lease is not None
            elif method == "freeze":
                value = store.freeze()
            elif method == "refusals":
                value = store.refusals
            else:
                value = await getattr(alive, method)(*arguments)
        except Exception as error:
            value = error
        writer.write(pickle.dumps(value))
        writer.close()

    async with await asyncio.start_unix_server(answer, socket):
        await alive.run()
