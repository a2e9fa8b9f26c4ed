"""Which pipeline answers: the same for a user everywhere, in proportion, and only ever moving to the canary."""

import collections
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.config import GatewaySettings
from serve_app.gateway.errors import ApiError
from serve_app.gateway.plan import resolve
from serve_app.rollout.split import Place, Split, choose, place
from tests.unit.gateway_double import SETTINGS

users = st.text(max_size=20)
percent = st.one_of(st.floats(0, 100), st.sampled_from([0.0, 5.0, 25.0, 50.0, 100.0]))


def split(
    weight: float, rollout: str = "r1", stable: str = "one", canary: str = "two", live: bool = True
) -> Split:
    return Split(rollout, "default", stable, canary, weight, live=live)


def placed(weight: float, user: str | None, rollout: str = "r1") -> str:
    return place([split(weight, rollout)], "one", user)[0]


@given(users, percent, percent)
def test_raising_the_weight_only_moves_users_from_stable_to_canary(user, a, b):
    low, high = sorted((a, b))
    if placed(low, user) == "two":
        assert placed(high, user) == "two"
    assert placed(0, user) == "one"
    assert placed(100, user) == "two"


@given(users, percent)
def test_a_user_stays_where_they_are(user, weight):
    assert len({placed(weight, user) for _ in range(5)}) == 1


# Written down: a change of the hash would move every user of a rollout that is under way.
FIXED = "sssccssccsssssscsscccssscssccsssssssccsc"


def test_who_gets_the_canary_is_fixed():
    assert "".join("c" if placed(40, f"user-{i}") == "two" else "s" for i in range(40)) == FIXED


def test_every_process_places_a_user_alike():
    code = """if True:
        from serve_app.rollout.split import Split, place
        splits = [Split("r1", "default", "one", "two", 40)]
        print("".join("c" if place(splits, "one", f"user-{i}")[1].role == "canary" else "s" for i in range(40)))
    """
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert run.stdout.strip() == FIXED


@pytest.mark.parametrize("weight", [1.0, 5.0, 25.0, 50.0, 99.0])
@pytest.mark.parametrize("known", [True, False])
def test_the_canary_gets_its_part_with_and_without_users(weight, known):
    n = 20_000
    hits = sum(placed(weight, f"u{i}" if known else None) == "two" for i in range(n))
    p = weight / 100
    # Six standard deviations: chance alone fails this once in 500 million runs.
    assert abs(hits - n * p) < 6 * (n * p * (1 - p)) ** 0.5


def test_another_rollout_and_the_routes_own_weights_draw_other_users():
    """Or the same users would meet every canary."""
    n = 20_000
    together: collections.Counter[tuple[str, str, str]] = collections.Counter()
    for i in range(n):
        user = f"u{i}"
        own = choose({"one": 50, "two": 50}, user, salt="default")
        together[placed(50, user, "r1"), placed(50, user, "r2"), own] += 1
    assert len(together) == 8
    assert all(abs(count - n / 8) < 6 * (n / 8) ** 0.5 for count in together.values())


def test_calls_without_a_user_are_placed_one_by_one():
    assert {placed(50, None) for _ in range(100)} == {"one", "two"}
    assert {placed(0, None) for _ in range(100)} == {"one"}
    assert {placed(100, None) for _ in range(100)} == {"two"}


def test_only_calls_of_stable_are_split():
    assert place([split(100)], "three", "ann") == ("three", None)
    assert place([], "one", "ann") == ("one", None)


@given(users, percent)
def test_promoted_rollouts_lead_on_to_the_one_under_way(user, weight):
    chain = [
        split(100, "r1", "one", "two", live=False),
        split(100, "r2", "two", "three", live=False),
        split(weight, "r3", "three", "four"),
    ]
    name, where = place(chain, "one", user)
    assert where == Place(chain[2], "canary" if name == "four" else "stable")
    assert name in ("three", "four")
    # Calls that come in the middle of the chain go on from there.
    assert place(chain, "two", user)[0] == name
    assert place(chain[:2], "one", user) == ("three", Place(chain[1], "canary"))


def test_a_rollout_back_to_an_earlier_pipeline_is_a_circle_that_ends():
    chain = [split(100, "r1", "one", "two", live=False), split(100, "r2", "two", "one", live=False)]
    assert place(chain, "one", "ann")[0] == "one"
    assert place([*chain, split(100, "r3", "one", "two")], "one", "ann")[0] == "two"


# ---- in a gateway

settings = GatewaySettings.model_validate(SETTINGS)


def splits_of(*splits: Split):
    return lambda route: tuple(s for s in splits if s.route == route)


def test_a_split_whose_canary_this_gateway_does_not_know_is_left_out():
    unknown = split(100, canary="later")
    plan = resolve(settings, None, None, "ann", splits_of(unknown))
    assert (plan.pipeline, plan.place, plan.why) == ("one", None, "split")
    plan = resolve(settings, None, None, "ann", splits_of(unknown, split(100, "r2", canary="bm25")))
    assert plan.pipeline == "bm25"


def test_a_rollout_moves_calls_of_its_route_and_nobody_who_asks_for_a_pipeline():
    splits = splits_of(split(100, canary="cascade"))
    by_default, by_name, by_route = (
        resolve(settings, *names, "ann", splits) for names in ((None, None), ("default", None), (None, "default"))
    )
    assert {plan.pipeline for plan in (by_default, by_name, by_route)} == {"cascade"}
    assert by_default.place is not None
    assert by_default.place.role == "canary"
    forced = resolve(settings, "one", None, "ann", splits)
    assert (forced.pipeline, forced.place, forced.why) == ("one", None, "forced")
    assert resolve(settings, "small", None, "ann", splits).why == "forced"
    with pytest.raises(ApiError, match="there is no model 'two'"):
        resolve(settings, "two", None, "ann", splits)


def scoring(user: str, *splits: Split, route: str = "split"):
    return resolve(settings, route, None, user, splits_of(*splits), scoring=True)


def test_a_score_call_is_no_trial_of_a_canary_without_stages():
    for route in ("default", "split"):
        for live in (True, False):
            to_bm25 = Split("r1", route, "one", "bm25", 100.0, live=live)
            plan = scoring("ann", to_bm25, route=route)
            assert (plan.pipeline, plan.place) == ("one", None)


def test_a_score_call_that_its_stable_could_not_answer_is_no_trial():
    """Of bm25's half, cascade has half."""
    users = [f"u{i}" for i in range(3000)]
    from_bm25 = Split("r1", "split", "bm25", "cascade", 50.0)
    plans = {user: scoring(user, from_bm25) for user in users}
    assert {plan.place for plan in plans.values()} == {None}
    counts = collections.Counter(plan.pipeline for plan in plans.values())
    assert counts["one"] + counts["cascade"] == len(users)
    assert counts["one"] / len(users) == pytest.approx(2 / 3, abs=0.03)
    for user in users:
        found = resolve(settings, "split", None, user, splits_of(from_bm25)).pipeline
        assert found in ("bm25", plans[user].pipeline), "a user stays where a score can be had"


def test_a_route_scores_by_what_it_was_promoted_to():
    words = GatewaySettings.model_validate({**SETTINGS, "routes": {"default": {"weights": {"bm25": 1}}}})
    promoted = split(100, stable="bm25", canary="one", live=False)
    assert resolve(words, None, None, "ann", splits_of(promoted), scoring=True).pipeline == "one"
    shadow = split(0, stable="bm25", canary="one")
    with pytest.raises(ApiError, match="it has: bm25"):
        resolve(words, None, None, "ann", splits_of(shadow), scoring=True)


def test_score_calls_follow_a_chain_of_promotions_through_one_that_cannot_score():
    route = GatewaySettings.model_validate({**SETTINGS, "routes": {"default": {"weights": {"one": 1}}}})
    first = split(100, stable="one", canary="bm25", live=False)
    for weight, live in ((100, False), (25, True)):
        chain = splits_of(first, split(weight, "r2", "bm25", "cascade", live))
        for user in (f"u{i}" for i in range(100)):
            found = resolve(route, None, None, user, chain).pipeline
            score = resolve(route, None, None, user, chain, scoring=True)
            assert score.pipeline == ("cascade" if found == "cascade" else "one")
            assert score.place is None


def test_score_calls_have_a_part_in_a_trial_of_two_rerankers():
    trial = Split("r1", "split", "one", "cascade", 25.0)
    plans = [scoring(f"u{i}", trial) for i in range(2000)]
    roles = collections.Counter(plan.place.role for plan in plans if plan.place is not None)
    assert roles["canary"] + roles["stable"] == len(plans)
    assert roles["canary"] / len(plans) == pytest.approx(0.25, abs=0.03)


def test_the_routes_own_weights_choose_first_and_stay():
    """A rollout on one of a route's pipelines leaves the calls of the others alone."""
    moving = Split("r1", "split", "one", "cascade", 100.0)
    for i in range(200):
        before = resolve(settings, None, "split", f"u{i}").pipeline
        after = resolve(settings, None, "split", f"u{i}", splits_of(moving)).pipeline
        assert after == {"one": "cascade", "bm25": "bm25"}[before]
