"""The click test: false alarms and power by simulation, looked at after every block."""

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.rollout.figures import Clicks
from serve_app.rollout.sequential import VALUES, fall, running_evidence

ALPHA = 0.05
ROLLOUTS = 2_000
BLOCKS, QUERIES = 60, 60
STEPS = np.repeat([0.05, 0.25, 0.5], BLOCKS // 3)
NOON = 0.3 + 0.1 * np.sin(np.arange(BLOCKS) / 6)
MRR_VALUES = np.array([0.0, 0.25, 0.5, 1.0])


def clicked(rng, queries, rate):
    """Counts of queries without and with a click on the first result."""
    clicks = rng.binomial(queries, rate)
    return np.stack([queries - clicks, clicks], axis=-1).astype(float)


def sides(rng, rollouts, share, blocks=BLOCKS, queries=QUERIES):
    canary = rng.binomial(queries, share, (rollouts, blocks))
    return canary, queries - canary


def fired(evidence):
    """Whether the test fired at any look, for every rollout."""
    return evidence.max(-1) >= -math.log(ALPHA)


@pytest.mark.parametrize(
    ("share", "rate"), [(0.5, 0.3), (0.05, 0.3), (0.05, 0.02), (STEPS, NOON)], ids=["even", "5%", "rare", "steps"]
)
def test_false_alarms_of_click_through_stay_below_alpha(share, rate):
    """The hardest null: both equal, no margin. Steps of 5, 25, 50 % come with a rate that goes up and down."""
    rng = np.random.default_rng(4)
    n_c, n_s = sides(rng, ROLLOUTS, share)
    evidence = running_evidence(clicked(rng, n_c, rate), clicked(rng, n_s, rate), np.array([0.0, 1.0]), 0.0)
    assert fired(evidence).mean() <= ALPHA


@pytest.mark.parametrize("margin", [0.0, 0.02])
def test_false_alarms_of_reciprocal_ranks_stay_below_alpha(margin):
    rng = np.random.default_rng(5)
    n_c, n_s = sides(rng, ROLLOUTS, 0.05)
    chances = np.array([0.5, 0.1, 0.1, 0.3])
    # The canary is worse by just what the margin allows.
    worse = chances + margin * np.array([1, 0, 0, -1])
    evidence = running_evidence(
        rng.multinomial(n_c, worse).astype(float), rng.multinomial(n_s, chances).astype(float), MRR_VALUES, margin
    )
    assert fired(evidence).mean() <= ALPHA


def test_false_alarms_at_the_margin_and_below_it():
    rng = np.random.default_rng(6)
    n_c, n_s = sides(rng, ROLLOUTS, 0.25)
    at_margin = running_evidence(clicked(rng, n_c, 0.28), clicked(rng, n_s, 0.3), np.array([0.0, 1.0]), 0.02)
    assert fired(at_margin).mean() <= ALPHA
    better = running_evidence(clicked(rng, n_c, 0.35), clicked(rng, n_s, 0.3), np.array([0.0, 1.0]), 0.02)
    assert fired(better).mean() <= ALPHA / 5


@pytest.mark.parametrize(("share", "median_at_most"), [(0.05, 250), (0.5, 600)])
def test_a_third_fewer_clicks_are_found(share, median_at_most):
    """Click-through 0.30 to 0.20, with the default margin; in the canary's queries, at the median. A sequential
    probability ratio test that knew both rates would take about ln(20) / KL(0.2, 0.3) = 117."""
    rng = np.random.default_rng(7)
    n_c, n_s = sides(rng, 400, share, blocks=800 if share < 0.1 else 200, queries=20)
    evidence = running_evidence(clicked(rng, n_c, 0.2), clicked(rng, n_s, 0.3), np.array([0.0, 1.0]), 0.01)
    assert fired(evidence).mean() >= 0.99
    first = (evidence >= -math.log(ALPHA)).argmax(-1)
    needed = n_c.cumsum(-1)[np.arange(400), first]
    assert np.median(needed) <= median_at_most


def binomial(n, rate):
    return [math.comb(n, k) * rate**k * (1 - rate) ** (n - k) for k in range(n + 1)]


sizes, rates = st.integers(1, 30), st.floats(0, 1)


@settings(max_examples=100)
@given(n_c=sizes, n_s=sizes, learnt=rates, margin=st.floats(0, 0.5), rate=rates, better=rates)
def test_a_block_never_gains_on_average_under_the_null(n_c, n_s, learnt, margin, rate, better):
    """Exactly, over all outcomes of a block, whatever the blocks before it taught, for every canary that the null
    allows, from `margin` below stable's `rate` up to 1."""
    worst = max(0.0, rate - margin)
    k_c, k_s = (k.ravel() for k in np.meshgrid(range(n_c + 1), range(n_s + 1), indexing="ij"))
    canary, stable = np.zeros((2, k_c.size, 2, 2))
    stable[:, 0] = 100 * (1 - learnt), 100 * learnt
    canary[:, 1] = np.stack([n_c - k_c, k_c], -1)
    stable[:, 1] = np.stack([n_s - k_s, k_s], -1)
    evidence = running_evidence(canary, stable, np.array([0.0, 1.0]), margin)[:, -1]
    chances = np.outer(binomial(n_c, worst + better * (1 - worst)), binomial(n_s, rate)).ravel()
    assert np.exp(evidence) @ chances <= 1 + 1e-6


def block(canary, stable):
    """Of (queries, clicks on the first result)."""
    return tuple(Clicks([queries - clicks, clicks, *[0] * 9]) for queries, clicks in (canary, stable))


def test_what_fired_stays_found():
    bad = [block((50, 2), (50, 25))] * 5
    assert fall(bad, "ctr_at_1", 0.01, ALPHA).fired
    found = fall(bad + [block((500, 300), (500, 200))] * 20, "ctr_at_1", 0.01, ALPHA)
    assert found.fired
    assert found.canary > found.stable


def test_the_figures_are_means_over_queries():
    clicks = Clicks([1, 1, 2, *[0] * 8])
    found = fall([(clicks, Clicks([0, 4, *[0] * 9]))], "click_mrr", 0.0, ALPHA)
    assert (found.canary, found.stable) == (pytest.approx((1 + 2 * 0.5) / 4), 1)
    assert (found.canary_queries, found.stable_queries) == (4, 4)
    assert fall([(clicks, clicks)], "ctr_at_1", 0.0, ALPHA).canary == pytest.approx(1 / 4)


@pytest.mark.parametrize("metric", list(VALUES))
def test_without_both_sides_there_is_no_evidence(metric):
    nothing = fall([], metric, 0.0, ALPHA)
    assert (nothing.fired, nothing.p_value, nothing.canary, nothing.stable) == (False, 1.0, None, None)
    alone = [(Clicks([100, *[0] * 10]), Clicks()), (Clicks(), Clicks([0, 100, *[0] * 9]))] * 10
    assert fall(alone, metric, 0.0, ALPHA).p_value == 1.0


def test_a_day_of_minutes_is_judged_in_milliseconds():
    blocks = [block((50, 15), (950, 285))] * 1_440
    started = time.process_time()
    assert not fall(blocks, "click_mrr", 0.0, ALPHA).fired
    assert time.process_time() - started < 1
