"""The score cache's Redis tier, with a real server: shared between gateways, and never felt when it fails."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from serve_app.config import Cache
from serve_app.gateway.cache import Patience
from serve_app.gateway.redis_tier import RedisTier
from serve_app.gateway.scoring import Scoring
from tests.processes.redis_server import RedisServer, needs_redis
from tests.unit.test_gateway_cache import MIB, Replicas, ask, expected

PASSWORD = "the-secret"
PROMISED_S = 0.005


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    needs_redis()
    server = RedisServer(tmp_path_factory.mktemp("redis"), "--requirepass", PASSWORD)
    yield server
    server.kill()


@pytest.fixture
def server(shared_server: RedisServer) -> RedisServer:
    """An empty one."""
    admin(shared_server).flushall()
    return shared_server


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[RedisServer]:
    """One to be killed."""
    needs_redis()
    server = RedisServer(tmp_path)
    yield server
    server.kill()


def admin(server: RedisServer) -> redis.Redis:
    return redis.Redis(port=server.port, password=PASSWORD)


def url_of(server: RedisServer, password: str = PASSWORD) -> str:
    return f"redis://{f':{password}@' if password else ''}127.0.0.1:{server.port}/0"


def gateway(fleet: Replicas, url: str, **settings: Any) -> Scoring:
    scoring = Scoring(fleet)
    scoring.configure(Cache(max_bytes=MIB, redis=url, **settings))
    return scoring


async def until(condition: Callable[[], Any], limit_s: float = 20) -> None:
    give_up_at = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < give_up_at, "it never came true"
        await asyncio.sleep(0.02)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(test())


def written(server: RedisServer, n: int) -> Callable[[], bool]:
    return lambda: admin(server).dbsize() >= n


def test_a_gateway_finds_what_another_computed(server):
    async def check():
        documents = [f"d{i}" for i in range(1200)]
        one, two = gateway(Replicas(), url_of(server)), gateway(fleet := Replicas(), url_of(server))
        await ask(one, documents, size=64)
        await until(written(server, 1200))
        # A client's first script is sent twice, and its first connection made.
        await two._redis.get(np.zeros((1, 2), np.uint64), Patience(1))
        result = await ask(two, documents[::-1], patience=Patience(1))
        assert (result.scores, result.cache_hits) == (expected(documents[::-1]), 1200)
        assert two.stats()["redis_hits"] == 1200
        assert (await ask(two, documents)).cache_hits == 1200
        assert two.stats()["memory_hits"] == 1200, "and has it in memory then"
        assert not fleet.calls
        for scoring in (one, two):
            await scoring._redis.close()

    run(check)


def test_the_password_may_be_in_the_environment(server, monkeypatch):
    monkeypatch.setenv("SERVE_APP_CACHE_REDIS_PASSWORD", PASSWORD)
    # The rollouts' store's own, which a server without a password would refuse.
    monkeypatch.setenv("SERVE_APP_REDIS_PASSWORD", "another")

    async def check():
        scoring = gateway(Replicas(), url_of(server, password=""))
        await ask(scoring, ["from the environment"])
        await until(written(server, 1))
        await scoring._redis.close()

    run(check)


def test_scores_of_another_revision_are_not_found(server):
    async def check():
        one, two = gateway(Replicas(), url_of(server)), gateway(Replicas("f2"), url_of(server))
        await ask(one, ["a"])
        await until(written(server, 1))
        assert (await ask(two, ["a"])).scores == expected(["a"], "f2")
        for scoring in (one, two):
            await scoring._redis.close()

    run(check)


def test_scores_expire_in_redis_and_where_they_came_from_it(server):
    async def check():
        one, two = (gateway(Replicas(), url_of(server), ttl_s=ttl) for ttl in (2, 3600))
        await ask(one, ["a"])
        await until(written(server, 1))
        (name,) = admin(server).keys()
        assert 0 < admin(server).pttl(name) <= 2000
        assert (await ask(two, ["a"], patience=Patience(1))).cache_hits == 1
        asked = []

        async def again():
            asked.append(await ask(two, ["a"], patience=Patience(1)))
            return asked[-1].cache_hits == 0

        give_up_at = time.monotonic() + 10
        while not await again():
            assert time.monotonic() < give_up_at, "it lived by the second gateway's time"
            await asyncio.sleep(0.1)
        for scoring in (one, two):
            await scoring._redis.close()

    run(check)


def test_what_is_no_score_is_no_hit(server):
    async def check():
        one = gateway(Replicas(), url_of(server))
        documents = ["a", "b", "c", "d"]
        await ask(one, documents)
        await until(written(server, 4))
        names = sorted(admin(server).keys())
        nan = np.array([(float("nan"), 2**31)], "<f8,<u4").tobytes()
        for name, value in zip(names, [b"", bytes(12), b"x" * 4000, nan], strict=True):
            admin(server).set(name, value)
        admin(server).delete(names[0])
        admin(server).lpush(names[0], "a list")
        two = gateway(fleet := Replicas(), url_of(server))
        result = await ask(two, documents, patience=Patience(1))
        assert (result.scores, result.cache_hits) == (expected(documents), 0)
        assert fleet.computed == dict.fromkeys(documents, 1)
        for scoring in (one, two):
            await scoring._redis.close()

    run(check)


def stop(server: RedisServer) -> None:
    os.kill(server.process.pid, signal.SIGSTOP)


def go_on(server: RedisServer) -> None:
    os.kill(server.process.pid, signal.SIGCONT)


@pytest.mark.parametrize("how", ["stopped", "killed", "refusing"])
def test_at_most_three_calls_wait_for_a_redis_that_does_not_answer(own_server, how):
    """What that costs them is measured by bench.cache."""

    async def check():
        scoring = gateway(Replicas(), url_of(own_server, PASSWORD if how == "refusing" else ""))
        if how == "stopped":
            stop(own_server)
        elif how == "killed":
            own_server.kill()
        waited = []
        for i in range(6):
            patience = Patience()
            documents = [f"{i} {j}" for j in range(100)]
            assert (await ask(scoring, documents, size=64, patience=patience)).scores == expected(documents)
            waited.append(patience.left_s < Patience().left_s)
        # Writes in the background fail as well.
        assert waited in ([True] * n + [False] * (6 - n) for n in (1, 2, 3))
        assert scoring.stats()["redis_out"]
        await scoring._redis.close()

    run(check)


def test_a_call_gives_up_waiting_before_what_is_promised():
    assert Patience().left_s <= PROMISED_S / 2


@pytest.mark.parametrize("how", ["stopped", "killed", "refusing"])
def test_a_redis_that_fails_is_named_once_and_comes_back_by_itself(own_server, caplog, how):
    async def check():
        caplog.set_level(logging.INFO, "ray.serve")
        scoring = gateway(Replicas(), url_of(own_server, PASSWORD if how == "refusing" else ""))
        if how == "stopped":
            stop(own_server)
        elif how == "killed":
            own_server.kill()
        for i in range(10):
            documents = [f"{i} {j}" for j in range(10)]
            assert (await ask(scoring, documents)).scores == expected(documents)
        assert scoring.stats()["redis_out"]
        if how == "stopped":
            go_on(own_server)
        elif how == "killed":
            own_server.start()
        else:
            redis.Redis(port=own_server.port).config_set("requirepass", PASSWORD)
        await until(lambda: not scoring.stats()["redis_out"])
        await ask(scoring, ["b"])
        lines = [record.getMessage() for record in caplog.records if "Redis" in record.getMessage()]
        assert len(lines) == 2, lines
        assert "left out" in lines[0]
        assert "is back" in lines[1]
        assert PASSWORD not in caplog.text
        await scoring._redis.close()

    run(check)


def looked_up_slowly(server: RedisServer) -> str:
    """The url of a server without a password, whose name takes longer to look up than a call waits."""
    loop = asyncio.get_running_loop()
    look_up = loop.getaddrinfo

    async def slowly(host: str, port: int, **more: Any) -> Any:
        await asyncio.sleep(0.005)
        return await look_up("127.0.0.1", port, **more)

    loop.getaddrinfo = slowly
    return f"redis://localhost:{server.port}/0"


@pytest.mark.parametrize("how", ["fresh", "cut off"])
def test_a_redis_whose_connections_take_longer_than_a_call_waits_is_used(own_server, how):
    async def check():
        tier = RedisTier(looked_up_slowly(own_server), 60)
        keys = np.zeros((1, 2), np.uint64)
        if how == "cut off":
            await tier.get(keys, Patience(1))
            redis.Redis(port=own_server.port).client_kill_filter(_type="normal", skipme=True)
        await asyncio.gather(*(tier.get(keys, Patience()) for _ in range(4)))
        assert tier.errors, "nothing was slow"
        await until(lambda: not tier.out)
        tier.put(keys, np.ones(1), np.full(1, 2**31))
        found = 0
        give_up_at = time.monotonic() + 20
        while not found:
            assert time.monotonic() < give_up_at, "it never answered in time"
            scores, _ = await tier.get(keys, Patience())
            found = scores[0]
            await asyncio.sleep(0.02)
        await tier.close()

    run(check)


def test_a_late_answer_is_no_success_and_its_connection_stays(own_server):
    async def check():
        tier = RedisTier(url_of(own_server, ""), 60)
        keys = np.zeros((1, 2), np.uint64)
        await tier.get(keys, Patience(1))
        clients = redis.Redis(port=own_server.port)
        before = {client["id"] for client in clients.client_list()}
        stop(own_server)
        await tier.get(keys, Patience())
        go_on(own_server)
        await until(lambda: not tier._reads)
        assert {client["id"] for client in clients.client_list()} == before
        assert tier._breaker.failures == 1
        await tier.close()

    run(check)


def test_a_tier_that_is_closed_leaves_no_connection(own_server):
    async def check():
        tier = RedisTier(looked_up_slowly(own_server), 60)
        keys = np.zeros((1, 2), np.uint64)
        await tier.get(keys, Patience(1))
        await asyncio.gather(*(tier.get(keys, Patience()) for _ in range(4)))
        await tier.close()
        await until(lambda: not tier._reads)
        clients = redis.Redis(port=own_server.port)
        await until(lambda: len(clients.client_list()) == 1)

    run(check)


def test_a_call_that_reads_while_its_tier_is_closed_goes_on_without(own_server):
    async def check():
        tier = RedisTier(url_of(own_server, ""), 60)
        keys = np.zeros((1, 2), np.uint64)
        await tier.get(keys, Patience(1))
        stop(own_server)
        reading = asyncio.create_task(tier.get(keys, Patience(5)))
        await until(lambda: tier._reads)
        await tier.close()
        _, expires = await reading
        assert not expires.any()

    run(check)


def test_a_call_waits_for_redis_once_however_many_stages_it_has(own_server):
    async def check():
        scoring = gateway(Replicas(), url_of(own_server, ""))
        await ask(scoring, ["a"])
        await until(lambda: redis.Redis(port=own_server.port).dbsize() == 1)
        stop(own_server)
        patience = Patience()
        before = patience.left_s
        for stage in range(8):
            await scoring._redis.get(np.full((1, 2), stage, np.uint64), patience)
        assert patience.left_s < before / 4
        await scoring._redis.close()

    run(check)


def test_what_waits_to_be_written_is_bounded(own_server):
    async def check():
        scoring = gateway(Replicas(), url_of(own_server, ""))
        await ask(scoring, ["a"])
        await until(lambda: redis.Redis(port=own_server.port).dbsize() == 1)
        tier: RedisTier = scoring._redis
        stop(own_server)
        keys = np.arange(2000, dtype=np.uint64).reshape(1000, 2)
        for _ in range(60):
            tier.put(keys, np.zeros(1000), np.zeros(1000, np.uint32))
        assert scoring.stats()["redis_dropped"] == 10_000
        await until(lambda: tier.out)
        await until(lambda: not tier._unwritten)
        go_on(own_server)
        await until(lambda: not tier.out)
        await ask(scoring, ["b"])
        await until(lambda: redis.Redis(port=own_server.port).dbsize() >= 2)
        await scoring._redis.close()

    run(check)


def test_a_redis_without_room_is_named_once(own_server, caplog):
    async def check():
        full = redis.Redis(port=own_server.port)
        scoring = gateway(Replicas(), url_of(own_server, ""))
        await ask(scoring, ["a"])
        await until(lambda: full.dbsize() == 1)
        full.config_set("maxmemory", "1")
        for i in range(10):
            errors = scoring.stats()["redis_errors"]
            await ask(scoring, [f"b{i}"])
            await until(lambda n=errors: scoring.stats()["redis_errors"] > n or scoring.stats()["redis_out"])
        lines = [record.getMessage() for record in caplog.records if "refuses writes" in record.getMessage()]
        assert len(lines) == 1
        assert "memory" in lines[0]
        await scoring._redis.close()

    run(check)


def test_another_redis_can_be_named_while_serving(server, own_server):
    async def check():
        scoring = gateway(fleet := Replicas(), url_of(server))
        await ask(scoring, ["a"])
        scoring.configure(Cache(max_bytes=MIB, redis=url_of(own_server, "")))
        assert (await ask(scoring, ["a"])).cache_hits == 1, "memory stays"
        await ask(scoring, ["b"])
        await until(lambda: redis.Redis(port=own_server.port).dbsize() == 1)
        scoring.configure(Cache(max_bytes=MIB))
        assert (await ask(scoring, ["c"])).cache_hits == 0
        assert fleet.computed == {"a": 1, "b": 1, "c": 1}

    run(check)
