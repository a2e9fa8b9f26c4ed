"""How long an engine may be silent."""

import pytest

from serve_app.reranker.watchdog import Watchdog


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watchdog(clock: Clock) -> Watchdog:
    return Watchdog(batch_tokens=4000, clock=clock)


def test_nothing_measured_gives_the_first_step_five_minutes(watchdog: Watchdog, clock: Clock) -> None:
    watchdog.working()
    clock.now += 200
    assert watchdog.limit_s() == 300


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
