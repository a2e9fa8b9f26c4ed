"""How long an engine may be silent."""

import asyncio

import pytest

from serve_app.reranker.messages import EngineError
from serve_app.reranker.watchdog import Watchdog


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cold(clock: Clock) -> Watchdog:
    return Watchdog(batch_tokens=4000, clock=clock)


@pytest.fixture
def watchdog(cold: Watchdog) -> Watchdog:
    """After the first read."""
    cold.working()
    cold.read(100)
    cold.idle()
    return cold


def test_nothing_measured_gives_the_first_step_five_minutes(cold: Watchdog, clock: Clock) -> None:
    cold.working()
    clock.now += 200
    assert cold.limit_s() == 300


def test_a_first_step_that_is_all_overhead_says_nothing_of_later_ones(cold: Watchdog, clock: Clock) -> None:
    cold.working()
    clock.now += 4
    cold.read(90)
    # At that rate a batch would take three minutes, and the limit would be an hour.
    assert cold.limit_s() == 300
    clock.now += 1
    cold.read(1000)
    assert cold.limit_s() == 20 * 4


def test_a_slow_engine_gets_many_times_what_a_full_batch_takes(watchdog: Watchdog, clock: Clock) -> None:
    watchdog.working()
    clock.now += 10
    watchdog.read(1000)
    # 100 tokens a second: a batch of 4000 takes 40 s.
    assert watchdog.limit_s() == 20 * 40


def test_a_fast_engine_gets_a_minute(watchdog: Watchdog, clock: Clock) -> None:
    watchdog.working()
    clock.now += 1
    watchdog.read(100_000)
    assert watchdog.limit_s() == 60


def test_idle_time_is_no_slowness(watchdog: Watchdog, clock: Clock) -> None:
    watchdog.working()
    clock.now += 10
    watchdog.read(1000)
    watchdog.idle()
    clock.now += 10_000
    watchdog.working()
    watchdog.working()
    clock.now += 10
    watchdog.read(1000)
    assert watchdog.limit_s() == 20 * 40


def test_an_engine_hangs_when_it_leaves_a_question_open_beyond_the_limit(watchdog: Watchdog, clock: Clock) -> None:
    async def hang() -> None:
        asked = 0
        answer = asyncio.Event()

        async def ask() -> None:
            nonlocal asked
            asked += 1
            await answer.wait()

        for _ in range(3):
            watchdog.check(ask)
            await asyncio.sleep(0)
            clock.now += 100
        assert asked == 1
        clock.now += 1
        with pytest.raises(EngineError, match="engine hangs: a step has taken 301 s, limit 300 s"):
            watchdog.check(ask)
        answer.set()
        await asyncio.sleep(0)
        watchdog.check(ask)
        await asyncio.sleep(0)
        assert asked == 2

    asyncio.run(hang())
