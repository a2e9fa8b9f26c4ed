"""Scores that gateways share and that outlive them: one Redis server (5 or newer, tested with 7; not Redis
Cluster) behind each gateway's own cache.

It may be slow, down or wrong without anybody noticing but in hit rates: reads are waited for as long as the
call's patience lasts, writes are made in the background, and after three failures in a row it is left out until
it answers a read, which is tried in the background, too.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import numpy as np
import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ResponseError

from serve_app.access import CACHE_REDIS_PASSWORD, redis_password
from serve_app.gateway.breaker import Breaker
from serve_app.gateway.cache import Keys, Patience, Scores, Times

logger = logging.getLogger("ray.serve")

_VALUE = np.dtype([("score", "<f8"), ("expires", "<u4")])
# Scripts, to which keys and values go as one string each: a client takes longer over hundreds of small ones than
# the server does. "1" is the layout of keys and values.
_NAMES = """
local names = {}
for i = 1, #ARGV[1], 16 do names[#names + 1] = 'serve-app:score:1:' .. string.sub(ARGV[1], i, i + 15) end
"""
_READ = f"""{_NAMES}
local values = redis.call('MGET', unpack(names))
for i = 1, #values do
  if not values[i] or #values[i] ~= {_VALUE.itemsize} then values[i] = string.rep('\\0', {_VALUE.itemsize}) end
end
return table.concat(values)"""
_WRITE = f"""{_NAMES}
for i = 1, #names do
  local value = string.sub(ARGV[2], (i - 1) * {_VALUE.itemsize} + 1, i * {_VALUE.itemsize})
  redis.call('SET', names[i], value, 'EX', ARGV[3])
end"""
# Pairs of one script; nobody else is served while it runs.
_CHUNK = 500
# Pairs that wait to be written; more are dropped.
_UNWRITTEN = 50_000
# Calls that read at once, each over a connection of its own.
_READS_AT_ONCE = 16
_TIMEOUT_S = 1.0
# A server that is out is tried after the first of these times, and ever more seldom up to the second if it goes
# out again within half a minute.
_PAUSE_S, _LONGEST_PAUSE_S, _STEADY_S = 1.0, 60.0, 30.0


class RedisTier:
    """One per gateway replica, on its event loop; reaches for the server at first use."""

    def __init__(self, url: str, ttl_s: int) -> None:
        self.ttl_s = ttl_s
        self.errors = 0
        self.dropped = 0
        # RESP 2, because servers before 6 speak nothing else. A retry would come too late for anybody.
        self._redis: Any = redis.Redis.from_url(
            url,
            # Where the url brings none.
            password=redis_password(CACHE_REDIS_PASSWORD),
            protocol=2,
            socket_timeout=_TIMEOUT_S,
            socket_connect_timeout=_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
        )
        self._read, self._write = self._redis.register_script(_READ), self._redis.register_script(_WRITE)
        self._breaker = Breaker(probe_every_s=_PAUSE_S)
        self._out = False
        self._pause_s, self._back_at = _PAUSE_S, float("-inf")
        self._last_error = ""
        self._refuses_writes = False
        self._reading = asyncio.Semaphore(_READS_AT_ONCE)
        self._reads: set[asyncio.Task[Any]] = set()
        # Keys and values as the script takes them.
        self._unwritten: deque[tuple[bytes, bytes]] = deque()
        self._waiting = 0
        self._to_write = asyncio.Event()
        self._running: asyncio.Task[None] | None = None

    @property
    def out(self) -> bool:
        """Whether it is left out for now."""
        return self._out

    async def get(self, keys: Keys, patience: Patience) -> tuple[Scores, Times]:
        """A score for each key and when it expires: at 0 where there is none. Never raises, and never takes more
        than `patience`, which it uses up."""
        self._start()
        found = np.zeros(len(keys), _VALUE)
        # While it is out, only `_run` tries it.
        call = self._breaker.enter() if patience.left_s > 0 and not self._out else None
        if call is not None:
            started = time.monotonic()
            # What is left by other stages of the call may be too little for any server.
            telling = patience.left_s > Patience().left_s / 2
            failed: bool | None = None
            # A task, which isn't cancelled when the call gives up: a connection that takes longer to open would
            # never be there.
            reading = asyncio.get_running_loop().create_task(self._read_all(keys, started + patience.left_s))
            self._reads.add(reading)
            reading.add_done_callback(self._seen)
            try:
                done, _ = await asyncio.wait((reading,), timeout=patience.left_s)
                # Closed for other settings, it is cancelled.
                if not done or reading.cancelled():
                    raise TimeoutError(f"no answer within {patience.left_s * 1e3:.1f} ms")
                found = reading.result()
            except Exception as error:
                failed = telling or None
                self._failed(error)
            finally:
                patience.left_s -= time.monotonic() - started
                self._breaker.settle(call, failed)
                self._say()
        # What another wrote there that is no score isn't one here either, and lives no longer than one from here.
        latest = min(2**32 - 1, int(time.time()) + self.ttl_s)
        return found["score"], np.where(np.isfinite(found["score"]), np.minimum(found["expires"], latest), 0)

    def put(self, keys: Keys, scores: Scores, expires: Times) -> None:
        """Has the scores written in the background, or drops them where too many wait or the server is out."""
        self._start()
        if self._out or self._waiting + len(keys) > _UNWRITTEN:
            self.dropped += len(keys)
            return
        values = np.empty(len(keys), _VALUE)
        values["score"], values["expires"] = scores, expires
        for i in range(0, len(keys), _CHUNK):
            self._unwritten.append((keys[i : i + _CHUNK].tobytes(), values[i : i + _CHUNK].tobytes()))
        self._waiting += len(keys)
        self._to_write.set()

    async def close(self) -> None:
        for task in (self._running, *self._reads):
            if task is not None:
                task.cancel()
        with contextlib.suppress(Exception):
            await self._redis.aclose()

    async def _read_all(self, keys: Keys, until: float) -> Any:
        """After `until`, a time of the monotonic clock, the call has given up: then nothing is begun, and what
        comes is no success."""
        async with self._reading:
            chunks = []
            for i in range(0, len(keys), _CHUNK):
                if time.monotonic() >= until:
                    raise TimeoutError("no time was left for a read")
                chunks.append(await self._get(keys[i : i + _CHUNK]))
                if time.monotonic() < until:
                    self._breaker.succeeded()
            return np.concatenate(chunks)

    def _seen(self, read: asyncio.Task[Any]) -> None:
        """Whatever it raised, after nobody waited for it any more."""
        self._reads.discard(read)
        if not read.cancelled():
            read.exception()

    async def _get(self, keys: Keys) -> Any:
        return np.frombuffer(await self._read([], [keys.tobytes()]), _VALUE, len(keys))

    def _start(self) -> None:
        if self._running is None:
            self._running = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        """Writes what waits; tries a server that is out."""
        probe = np.zeros((1, 2), np.uint64)
        while True:
            await self._to_write.wait()
            self._to_write.clear()
            while self._unwritten and not self._out:
                keys, values = self._unwritten.popleft()
                self._waiting -= len(values) // _VALUE.itemsize
                error = await self._try(partial(self._write, [], [keys, values, self.ttl_s]), _TIMEOUT_S)
                # Reads may go on well, so that it is never left out.
                if isinstance(error, ResponseError) and not self._refuses_writes:
                    logger.warning("the score cache's Redis refuses writes: %s", self._last_error)
                self._refuses_writes = isinstance(error, ResponseError)
            while self._out:
                self.dropped += self._waiting
                self._unwritten.clear()
                self._waiting = 0
                await asyncio.sleep(self._pause_s)
                # The first read may have to open a connection, which takes longer (names, TLS) and then stays.
                try:
                    async with asyncio.timeout(_TIMEOUT_S):
                        await self._get(probe)
                except Exception as error:
                    self._failed(error)
                    continue
                # The second is to be as fast as a call would need it.
                await self._try(partial(self._get, probe), Patience().left_s)

    async def _try(self, command: Callable[[], Awaitable[Any]], timeout_s: float) -> Exception | None:
        """What went wrong."""
        call = self._breaker.enter()
        if call is None:
            return None
        failure: Exception | None = None
        try:
            async with asyncio.timeout(timeout_s):
                await command()
            self._breaker.succeeded()
        except Exception as error:
            failure = error
            self._failed(error)
        finally:
            self._breaker.settle(call, failure is not None)
            self._say()
        return failure

    def _failed(self, error: Exception) -> None:
        self.errors += 1
        self._last_error = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__

    def _say(self) -> None:
        """One line when it goes out, and one when it is back."""
        out = self._breaker.failures >= self._breaker.failures_to_open
        if out and not self._out:
            steady = time.monotonic() - self._back_at > _STEADY_S
            self._pause_s = _PAUSE_S if steady else min(_LONGEST_PAUSE_S, 2 * self._pause_s)
            self._to_write.set()
            logger.warning("the score cache's Redis is left out until it answers: %s", self._last_error)
        elif self._out and not out:
            self._back_at = time.monotonic()
            logger.info("the score cache's Redis is back")
        self._out = out
