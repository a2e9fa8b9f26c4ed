"""A replica's own account of its load, on a clock that stands still until told."""

import contextlib
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.autoscaling.load import Load, LoadMeter

FULL = 1_000


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def meter(clock: Clock) -> LoadMeter:
    return LoadMeter(FULL, clock)


def work(
    meter: LoadMeter, clock: Clock, prompts: int, each: int, tokens_per_s: float, polled_s: float = 1e9
) -> None:
    """One call that an engine reads in full batches; Serve asks for the load meanwhile."""
    with meter.call(prompts * each) as scored:
        while prompts:
            batch = min(prompts, max(1, FULL // each))
            end = clock.now + batch * each / tokens_per_s
            while clock.now + polled_s < end:
                clock.now += polled_s
                meter.load()
            clock.now = end
            for _ in range(batch):
                scored(each)
            prompts -= batch


def test_nothing_has_been_measured_before_the_first_call(meter: LoadMeter, clock: Clock) -> None:
    clock.now += 1_000
    assert meter.load() == Load(0, 0, 0, 0, 0)
    assert meter.load().stats() == dict.fromkeys(
        ["pending_tokens", "arrived_tokens", "arrived_calls", "tokens_per_s", "measured_s"], 0
    )


def test_each_prompt_leaves_the_backlog_when_it_is_scored(meter: LoadMeter, clock: Clock) -> None:
    with meter.call(1_000) as scored:
        assert meter.load().pending_tokens == 1_000
        for left in (700, 400, 100):
            clock.now += 1
            scored(300)
            assert meter.load().pending_tokens == left
    assert meter.load().pending_tokens == 0
    assert (meter.load().arrived_tokens, meter.load().arrived_calls) == (1_000, 1)


def test_overlapping_calls_share_the_busy_time(meter: LoadMeter, clock: Clock) -> None:
    with meter.call(1_000) as first:
        clock.now += 1
        with meter.call(2_000) as second:
            clock.now += 1
            first(1_000)
            clock.now += 2
            second(2_000)
    load = meter.load()
    # 3,000 tokens in the four seconds between the first arrival and the last score, not in 2 + 3 of them.
    assert load.tokens_per_s == pytest.approx(750)
    assert (load.arrived_tokens, load.arrived_calls, load.pending_tokens) == (3_000, 2, 0)


@pytest.mark.parametrize("error", [TimeoutError, KeyboardInterrupt])
def test_an_aborted_call_leaves_nothing_behind_but_what_was_scored(
    meter: LoadMeter, clock: Clock, error: type[BaseException]
) -> None:
    with contextlib.suppress(error), meter.call(5_000) as scored:
        clock.now += 2
        scored(1_000)
        raise error
    clock.now += 60
    load = meter.load()
    assert (load.pending_tokens, load.arrived_tokens) == (0, 5_000)
    assert load.tokens_per_s == pytest.approx(500)


def test_idling_fades_neither_the_rate_nor_its_weight(meter: LoadMeter, clock: Clock) -> None:
    work(meter, clock, 10, 100, 2_000)
    before = meter.load()
    for _ in range(100):
        clock.now += 3_600
        assert meter.load() == before
    assert before.tokens_per_s == pytest.approx(2_000)


def test_the_rate_follows_an_engine_that_slows_down(meter: LoadMeter, clock: Clock) -> None:
    for _ in range(60):
        work(meter, clock, 20, 100, 2_000)
    assert meter.load().measured_s == pytest.approx(30, rel=0.2)
    for _ in range(60):
        work(meter, clock, 20, 100, 500)
    assert meter.load().tokens_per_s == pytest.approx(500, rel=0.05)


def test_large_calls_tell_more_of_the_rate_than_many_tiny_ones(meter: LoadMeter, clock: Clock) -> None:
    # One short call at a time: 20 tokens in 20 ms, a fifth of what full batches do.
    for _ in range(2_000):
        work(meter, clock, 1, 20, 1_000)
        clock.now += 0.03
    tiny = meter.load()
    assert tiny.tokens_per_s == pytest.approx(1_000)
    assert tiny.measured_s < 1
    work(meter, clock, 100, 100, 5_000)
    assert meter.load().tokens_per_s == pytest.approx(5_000, rel=0.3)
    for _ in range(200):
        work(meter, clock, 1, 20, 1_000)
    assert meter.load().tokens_per_s == pytest.approx(5_000, rel=0.3)


@pytest.mark.parametrize("polled_s", [1e9, 0.5])
def test_calls_of_all_sizes_by_turns_are_measured_at_the_engines_rate(
    meter: LoadMeter, clock: Clock, polled_s: float
) -> None:
    """A batch's tokens, which come at its end, weigh as much as the time that they took."""
    for prompts, each in [(20, 100), *[(1, 50)] * 10] * 10:
        work(meter, clock, prompts, each, 1_000, polled_s)
        assert meter.load().tokens_per_s == pytest.approx(1_000)
        clock.now += 0.01


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1e9, 0.5, 0.2]))
def test_the_rate_is_never_beyond_what_the_engine_did(seed: int, polled_s: float) -> None:
    clock, choose = Clock(), random.Random(seed)
    meter = LoadMeter(FULL, clock)
    loads = []
    for _ in range(30):
        rate = choose.choice([500, 1_000, 2_000])
        work(meter, clock, choose.choice([1, 2, 20]), choose.choice([10, 100, 400]), rate, polled_s)
        clock.now += choose.choice([0, 0.01, 10])
        loads.append(meter.load())
    assert all(0.8 * 500 <= load.tokens_per_s <= 1.2 * 2_000 for load in loads)
    assert all(load.pending_tokens == 0 and 0 < load.measured_s < 40 for load in loads)
    for before, after in itertools.pairwise(loads):
        assert after.arrived_tokens > before.arrived_tokens
        assert after.arrived_calls == before.arrived_calls + 1
