"""Figures of gateways: merging has laws, quantiles an error, and JSON loses nothing."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.rollout.agreement import Agreement
from serve_app.rollout.counters import Counters
from serve_app.rollout.figures import RELATIVE_ERROR, SCORE_BINS, Clicks, Figures

latencies = st.floats(0.02, 1e6)
calls = st.tuples(latencies, st.booleans(), st.booleans(), st.booleans(), st.lists(st.floats(-1, 2), max_size=12))
agreements = st.none() | st.builds(Agreement, st.booleans(), st.floats(0, 1), st.none() | st.floats(-1, 1))


@st.composite
def figures(draw):
    made = Figures()
    for latency_ms, error, degraded, late, scores in draw(st.lists(calls, max_size=6)):
        made.add(latency_ms, error=error, degraded=degraded, late=late, scores=scores)
    for agreement in draw(st.lists(agreements, max_size=4)):
        made.add_mirrored(agreement)
    return made


@given(figures(), figures(), figures())
def test_merging_is_associative_and_commutative_and_has_a_neutral_element(a, b, c):
    assert a.merge(b) == b.merge(a)
    assert a.merge(b).merge(c) == a.merge(b.merge(c))
    assert a.merge(Figures()) == a


@given(figures(), figures())
def test_merging_leaves_both_as_they_were(a, b):
    before = a.to_json(), b.to_json()
    a.merge(b).add(5.0, scores=[0.5])
    assert (a.to_json(), b.to_json()) == before


@given(figures())
def test_json_loses_nothing(made):
    assert Figures.from_json(json.loads(json.dumps(made.to_json()))) == made


@given(st.lists(latencies, min_size=1, max_size=200), st.sampled_from([0.5, 0.95]))
def test_quantiles_are_within_the_stated_error(values, q):
    made = Figures()
    for value in values:
        made.add(value)
    exact = sorted(values)[max(1, math.ceil(q * len(values))) - 1]
    assert made.quantile_ms(q) == pytest.approx(exact, rel=RELATIVE_ERROR * 1.001)


def test_an_error_counts_as_a_call_without_latency_or_scores():
    made = Figures()
    made.add(1.0, error=True, degraded=True, scores=[0.9])
    assert (made.calls, made.errors, made.degraded, made.answered, made.scored) == (1, 1, 0, 0, 0)
    assert made.quantile_ms(0.5) is None


def test_of_scores_the_first_ten_count_and_the_outermost_bins_take_what_is_outside():
    made = Figures()
    made.add(1.0, scores=[7.0, *[0.5] * 8, -3.0, 0.5, 0.5])
    assert made.scores == {SCORE_BINS - 1: 1, SCORE_BINS // 2: 8, 0: 1}
    made.add(1.0, scores=[math.nan, math.inf])
    assert made.scored == 1


def test_mirrored_calls_give_means_and_variances():
    made = Figures()
    made.add_mirrored(Agreement(True, 1.0, None))
    made.add_mirrored(Agreement(False, 0.5, -0.5))
    made.add_mirrored(None)
    assert (made.mirror.calls, made.mirror.errors, made.mirror.pairs, made.mirror.top1) == (3, 1, 2, 1)
    assert made.mirror.rbo_moments() == (2, pytest.approx(0.75), pytest.approx(0.125))
    assert made.mirror.tau_moments() == (1, pytest.approx(-0.5), 0)
    assert made.calls == 0


def test_calls_are_counted_by_rollout_side_and_bucket():
    counters = Counters()
    for now_s in (3.0, 9.9, 5.0):
        counters.at("r", "canary", now_s).add(1.0)
    counters.at("r", "stable", 9.0).add(1.0)
    rows = {row[:3]: row[3].calls for row in counters.rows()}
    assert rows == {("r", "canary", 0): 1, ("r", "canary", 5): 2, ("r", "stable", 5): 1}


def test_foreign_json_is_refused():
    for foreign in ({"mirror": {"x": 1}}, {"calls": None}, {"latency": 3}):
        with pytest.raises(ValueError, match="these are no figures"):
            Figures.from_json(foreign)


def test_a_bucket_is_small_in_json():
    made = Figures()
    for i in range(10_000):
        made.add(20 * 1.001 ** (i % 1_000), scores=[i % 100 / 100] * 10)
        made.add_mirrored(Agreement(True, 0.9, 0.8))
    assert len(json.dumps(made.to_json())) < 2_000


def test_clicks_count_queries():
    assert Clicks().queries == 0
    assert Clicks([5, 3, *[0] * 8, 1]).queries == 9
