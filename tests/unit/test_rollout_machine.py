"""A rollout's states: every way through them, and what holds whatever happens."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from serve_app.rollout.document import RolloutDocument
from serve_app.rollout.guards import Verdict
from serve_app.rollout.machine import (
    _ALLOWED,
    FINISHED,
    WARMING_LIMIT_S,
    Facts,
    RefusedError,
    State,
    advance,
    command,
    describe,
)

STEPS = [
    {"set_weight": 5},
    {"analysis": {"timeout_s": 60}},
    {"pause": {"duration_s": 30}},
    {"set_weight": 50},
    {"pause": {}},
    {"set_weight": 100},
]


def document(steps: list[dict[str, Any]] | None = None, **changes: Any) -> RolloutDocument:
    named = {"route": "default", "stable": "one", "canary": "two", "steps": steps or STEPS}
    return RolloutDocument.model_validate({**named, "guards": {"error_rate": {"failure_limit": 1}}, **changes})


def verdict(outcome: str, metric: str = "error_rate", samples: int = 50, stable_samples: int = 50) -> Verdict:
    text = f"{metric} {outcome}"
    return Verdict(
        metric,  # type: ignore[arg-type]
        outcome,  # type: ignore[arg-type]
        0.1,
        0.02,
        0.1,
        0.0,
        samples,
        stable_samples,
        20,
        text,
    )


class Run:
    """A rollout on its way, a second a look; every look has seen more calls than the one before."""

    def __init__(self, plan: RolloutDocument, state: State | None = None) -> None:
        self.document, self.state, self.now, self.seen = plan, state or State(), 1000.0, 0
        self.reasons: list[str] = []

    def look(self, *outcomes: str, after_s: float = 1, not_ready: tuple[str, ...] = (), new: bool = True) -> State:
        self.now += after_s
        self.seen += new
        facts = Facts(self.now, not_ready, [verdict(outcome, samples=self.seen) for outcome in outcomes])
        change = advance(self.document, self.state, facts)
        if change is not None:
            # What is stored is what goes on.
            self.state = State.from_json(json.loads(json.dumps(change.state.to_json())))
            assert self.state == change.state
            if change.reason:
                self.reasons.append(change.reason)
        return self.state

    def do(self, action: str) -> State:
        change = command(self.document, self.state, action, self.now)  # type: ignore[arg-type]
        self.state = change.state
        self.reasons.append(change.reason)
        return self.state

    def to_step(self, index: int) -> "Run":
        """Into step `index`, by passing."""
        for _ in range(50):
            if self.state.step == index and self.state.status in ("step", "shadowing", "paused"):
                return self
            if self.state.status == "paused" and self.state.until is None:
                self.do("resume")
            else:
                self.look("pass", after_s=31)
        raise AssertionError(self.state)


def at(state: State) -> tuple[str, int, float]:
    return state.status, state.step, state.weight


# ---- paths


def test_a_good_canary_goes_through_every_step_once():
    run = Run(document())
    assert at(run.look()) == ("warming", -1, 0)
    assert at(run.look(not_ready=("large",))) == ("warming", -1, 0)
    assert at(run.look()) == ("step", 0, 5)
    assert at(run.look("pass")) == ("step", 1, 5)
    assert run.state.until == run.now + 60
    assert at(run.look("inconclusive")) == ("step", 1, 5)
    assert at(run.look("pass")) == ("paused", 2, 5)
    assert at(run.look("pass", after_s=29)) == ("paused", 2, 5)
    assert at(run.look("pass")) == ("step", 3, 50)
    assert at(run.look("pass")) == ("paused", 4, 50)
    assert at(run.look("pass", after_s=1e6)) == ("paused", 4, 50)
    assert at(run.do("resume")) == ("step", 5, 100)
    assert at(run.look()) == ("promoted", 5, 100)
    assert run.reasons[1] == "the canary's variants have replicas"
    assert run.reasons[3] == "error_rate pass"
    assert run.look("fail", after_s=1e6).status == "promoted"


def test_without_users_a_canary_is_shadowing():
    plan = document(
        [{"analysis": {"timeout_s": 60}}, {"set_weight": 5}, {"analysis": {}}], shadow=0.5, guards={"rbo": {}}
    )
    run = Run(plan)
    run.look()
    assert at(run.look()) == ("shadowing", 0, 0)
    change = advance(plan, run.state, Facts(run.now + 1, (), [verdict("pass", "rbo")]))
    assert change is not None
    assert at(change.state) == ("step", 1, 5)


def test_metrics_that_mirrored_calls_cannot_serve_hold_nobody_up_while_shadowing():
    plan = document(
        [{"analysis": {"timeout_s": 60}}, {"set_weight": 5}],
        shadow=0.5,
        guards={"rbo": {}, "latency_p50_ratio": {}},
    )
    run = Run(plan)
    run.look()
    run.look()
    verdicts = [verdict("pass", "rbo"), verdict("inconclusive", "latency_p50_ratio")]
    change = advance(plan, run.state, Facts(run.now + 1, (), verdicts))
    assert change is not None
    assert at(change.state) == ("step", 1, 5)


def test_a_canary_that_never_gets_a_replica_is_given_up():
    run = Run(document(on_failure="pause"))
    run.look()
    run.look(not_ready=("large",), after_s=WARMING_LIMIT_S - 1)
    assert run.state.status == "warming"
    assert at(run.look(not_ready=("large", "small"), after_s=2)) == ("rolled_back", -1, 0)
    assert "large, small" in run.reasons[-1]
    assert "1800 s" in run.reasons[-1]


@pytest.mark.parametrize("step", [1, 2, 4])
def test_failures_in_a_row_bring_it_back_from_a_step_a_timed_pause_and_an_open_pause(step):
    run = Run(document()).to_step(step)
    assert run.look("fail").status != "rolled_back"
    assert run.state.streaks == {"error_rate": 1}
    assert at(run.look("fail")) == ("rolled_back", step, 0)
    assert run.reasons[-1] == "error_rate fail"


def test_a_pass_ends_a_row_of_failures_and_an_open_look_does_not():
    run = Run(document()).to_step(4)
    run.look("fail")
    run.look("pass")
    run.look("fail")
    run.look("inconclusive")
    assert run.state.status == "paused"
    assert run.look("fail").status == "rolled_back"


def test_the_same_calls_fail_once_whoever_looks_and_however_often():
    run = Run(document()).to_step(4)
    run.look("fail")
    for _ in range(5):
        run.look("fail", new=False)
    assert run.state.streaks == {"error_rate": 1}
    assert run.look("fail").status == "rolled_back"


def test_the_same_mirrored_calls_fail_once_however_many_calls_stable_answers_meanwhile():
    plan = document(shadow=0.5, guards={"rbo": {}, "error_rate": {}})
    state = Run(document()).to_step(4).state
    for stable_samples in (100, 101, 102):
        verdicts = [verdict("fail", "rbo", 30, 30), verdict("fail", samples=40, stable_samples=stable_samples)]
        change = advance(plan, state, Facts(5000.0, verdicts=verdicts))
        state = change.state if change else state
        assert (state.status, state.streaks) == ("paused", {"rbo": 1, "error_rate": 1})
    change = advance(plan, state, Facts(5000.0, verdicts=[verdict("fail", "rbo", 31, 31)]))
    assert change is not None
    assert change.state.status == "rolled_back"


def test_a_look_that_only_counts_has_no_reason_and_one_that_finds_nothing_new_changes_nothing():
    run = Run(document()).to_step(4)
    counted = advance(run.document, run.state, Facts(run.now + 1, (), [verdict("fail")]))
    assert counted is not None
    assert counted.reason == ""
    assert advance(run.document, run.state, Facts(run.now + 1, (), [verdict("inconclusive")])) is None
    assert advance(run.document, run.state, Facts(run.now + 1)) is None


def test_a_new_weight_is_judged_by_its_own_calls():
    run = Run(document()).to_step(2)
    run.look("fail")
    before = run.state.window_from
    run.look(after_s=31)
    assert at(run.state) == ("step", 3, 50)
    assert (run.state.streaks, run.state.counted, run.state.window_from) == ({}, {}, run.now)
    assert before < run.now


def test_time_is_up_for_an_analysis_is_inconclusive_and_says_what_was_open():
    run = Run(document()).to_step(1)
    run.look("inconclusive", after_s=58)
    assert run.state.status == "step"
    # The last look's verdicts say it, also where nothing has come since.
    assert at(run.look("inconclusive", after_s=5, new=False)) == ("inconclusive", 1, 5)
    assert run.reasons[-1] == "time is up: error_rate inconclusive"
    assert at(run.look("pass", after_s=1e6)) == ("inconclusive", 1, 5)
    assert at(run.do("resume")) == ("step", 1, 5)
    assert run.state.until == run.now + 60
    assert at(run.look("pass")) == ("paused", 2, 5)


@pytest.mark.parametrize(
    ("on_failure", "then"), [("rollback", ("rolled_back", 1, 0)), ("pause", ("paused", 1, 5))]
)
def test_time_is_up_for_a_guard_that_fails_without_samples_for_a_second_look(on_failure, then):
    run = Run(document(on_failure=on_failure)).to_step(1)
    assert at(run.look("fail", after_s=30)) == ("step", 1, 5)
    assert at(run.look("fail", after_s=20, new=False)) == ("step", 1, 5)
    assert at(run.look("fail", after_s=11, new=False)) == then
    assert run.reasons[-1] == "time is up: error_rate fail"


@pytest.mark.parametrize(("step", "waits_s", "then"), [(1, 60, ("inconclusive", 1, 5)), (2, 30, ("step", 3, 50))])
def test_a_clock_set_back_begins_a_wait_anew(step, waits_s, then):
    run = Run(document()).to_step(step)
    before = run.state
    assert at(run.look(after_s=-3600)) == at(before)
    assert (run.state.since, run.state.until) == (run.now, run.now + waits_s)
    assert at(run.look(after_s=waits_s - 1)) == at(before)
    assert at(run.look()) == then


def test_a_clock_set_back_leaves_clicks_to_judge():
    run = Run(document(on_failure="pause")).to_step(1)
    run.look("fail")
    run.look("fail")
    run.do("resume")
    assert run.look(after_s=-3600).clicks_from == run.now


def test_a_clock_set_back_ends_no_waiting_for_a_replica():
    run = Run(document())
    run.look()
    run.look(not_ready=("large",), after_s=-3600)
    run.look(not_ready=("large",), after_s=WARMING_LIMIT_S - 1)
    assert run.state.status == "warming"
    assert run.look(not_ready=("large",), after_s=2).status == "rolled_back"


def test_a_clock_set_back_leaves_a_window_that_has_begun_and_begins_any_other():
    run = Run(document()).to_step(2)
    begun = run.state.window_from
    run.look(after_s=-1.5)
    assert run.state.since == run.now > begun
    assert run.state.window_from == begun
    run.look("fail", after_s=-3600)
    # The verdicts were of another window.
    assert (run.state.window_from, run.state.streaks) == (run.now, {"error_rate": 0})
    run.look("fail")
    assert run.look("fail").status == "rolled_back"


def test_an_analysis_without_any_calls_says_so():
    run = Run(document()).to_step(1)
    assert run.look(after_s=100, new=False).status == "inconclusive"
    assert run.reasons[-1] == "time is up: there were no calls to judge"


def test_an_inconclusive_canary_that_then_fails_comes_back():
    run = Run(document()).to_step(1)
    run.look(after_s=100)
    run.look("fail")
    assert run.look("fail").status == "rolled_back"


def test_on_failure_pause_keeps_the_weight_and_leaves_the_decision():
    run = Run(document(on_failure="pause")).to_step(1)
    run.look("fail")
    assert at(run.look("fail")) == ("paused", 1, 5)
    for _ in range(5):
        assert at(run.look("fail", after_s=1e5)) == ("paused", 1, 5)
    # Resumed, guards have their say again and count from 0.
    assert at(run.do("resume")) == ("step", 1, 5)
    assert (run.state.unguarded, run.state.streaks, run.state.window_from) == (False, {}, run.now)
    run.look("fail")
    assert run.state.status == "step"
    assert run.look("fail").status == "paused"
    assert at(run.do("promote")) == ("promoted", 1, 100)


def test_hold_waits_at_the_last_weight_still_guarded():
    steps = [{"set_weight": 5}, {"set_weight": 20}]
    run = Run(document(steps, on_success="hold")).to_step(1)
    assert at(run.look()) == ("paused", 2, 20)
    assert run.reasons[-1].endswith("the steps are done, promote or abort")
    assert describe(run.document, run.state) == "paused at 20 %"
    with pytest.raises(RefusedError, match=r"paused at 20 % and all steps are done; allowed: promote, abort"):
        run.do("resume")
    assert at(Run(run.document, run.state).do("promote")) == ("promoted", 2, 100)
    run.look("fail")
    assert run.look("fail").status == "rolled_back"


def test_the_end_of_the_steps_gives_the_canary_the_route_whatever_the_last_weight():
    run = Run(document([{"set_weight": 5}])).to_step(0)
    assert at(run.look()) == ("promoted", 0, 100)


# ---- operators


@pytest.mark.parametrize("step", [0, 1, 3])
def test_pause_and_resume_come_back_to_the_same_step_and_weight(step):
    run = Run(document()).to_step(step)
    _, _, weight = at(run.state)
    assert at(run.do("pause")) == ("paused", step, weight)
    assert at(run.look("pass", after_s=1e6)) == ("paused", step, weight)
    window_from = run.state.window_from
    assert at(run.do("resume")) == ("step", step, weight)
    assert run.state.window_from == window_from


def test_an_analysis_that_goes_on_keeps_the_samples_that_it_had():
    run = Run(document()).to_step(1)
    run.look("inconclusive", after_s=61)
    before = run.state
    assert before.status == "inconclusive"
    after = run.do("resume")
    assert (after.status, after.until, after.window_from) == ("step", run.now + 60, before.window_from)


def test_what_an_operator_has_seen_fail_counts_anew():
    run = Run(document(on_failure="pause")).to_step(1)
    run.look("fail")
    assert run.look("fail").unguarded
    after = run.do("resume")
    assert (after.unguarded, after.streaks, after.counted) == (False, {}, {})
    assert after.window_from == after.clicks_from == run.now


def test_resume_ends_a_timed_pause_early():
    run = Run(document()).to_step(2)
    assert at(run.do("resume")) == ("step", 3, 50)


def test_a_timed_pause_can_be_held():
    run = Run(document()).to_step(2)
    assert at(run.do("pause")) == ("paused", 2, 5)
    assert at(run.look("pass", after_s=1e6)) == ("paused", 2, 5)
    with pytest.raises(RefusedError, match=r"allowed: resume, promote, abort$"):
        run.do("pause")
    assert at(run.do("resume")) == ("step", 3, 50)


@pytest.mark.parametrize("step", [0, 1, 2, 4])
def test_without_its_pipelines_nothing_is_left_to_roll_out(step):
    run = Run(document(on_failure="pause")).to_step(step)
    facts = Facts(run.now, verdicts=[verdict("pass")], gone=("two",))
    change = advance(run.document, run.state, facts)
    assert (change.state.status, change.state.weight) == ("rolled_back", 0)
    assert change.reason == "no gateway's settings have the pipeline 'two' any more"


def test_guards_watch_while_an_operator_pauses():
    run = Run(document()).to_step(1)
    run.do("pause")
    run.look("fail")
    assert run.look("fail").status == "rolled_back"


def test_undo_takes_a_promoted_canary_back():
    run = Run(document([{"set_weight": 5}])).to_step(0)
    run.look()
    assert at(run.do("undo")) == ("rolled_back", 0, 0)


@pytest.mark.parametrize("status", list(_ALLOWED))
@pytest.mark.parametrize("action", ["pause", "resume", "promote", "abort", "undo"])
def test_what_a_state_does_not_allow_is_refused_with_the_state_and_what_it_allows(status, action):
    state = State(status, step=1, weight=5.0, again=True)
    if action in _ALLOWED[status]:
        after = command(document(), state, action, 5.0).state
        expected = {"pause": 5, "resume": 5, "promote": 100, "abort": 0, "undo": 0}
        assert after.weight == expected[action]
        assert after.since == 5.0
    else:
        with pytest.raises(RefusedError) as refused:
            command(document(), state, action, 5.0)
        message = str(refused.value)
        assert describe(document(), state) in message
        assert message.endswith(", ".join(_ALLOWED[status]) or "start another")


def test_a_state_in_words():
    assert describe(document(), State()) == "pending at 0 %"
    assert describe(document(), State("step", 1, 25.0)) == "step 2 of 6 (analysis) at 25 %"
    assert describe(document(), State("inconclusive", 1, 2.5)) == "inconclusive in step 2 of 6 (analysis) at 2.5 %"
    assert describe(document(), State("rolled_back", 1)) == "rolled back at 0 %"


def test_a_state_of_another_version_is_read():
    stored = {**State("step", 2, 5.0).to_json(), "variants": ["small"], "judged": 40}
    del stored["counted"]
    assert State.from_json(stored) == State("step", 2, 5.0)


# ---- whatever happens

weights = st.lists(st.sampled_from([0.0, 0.5, 5.0, 25.0, 50.0, 99.0, 100.0]), max_size=5).map(sorted)


@st.composite
def documents(draw: st.DrawFn) -> RolloutDocument:
    steps: list[dict[str, Any]] = []
    shadow = draw(st.sampled_from([0.0, 0.5]))
    for weight in [None, *draw(weights)]:
        if weight is not None:
            steps.append({"set_weight": weight})
        kinds = [{"pause": {}}, {"pause": {"duration_s": 5.0}}]
        if (weight or 0) < 100 and (weight or shadow):
            kinds.append({"analysis": {"timeout_s": 5.0}})
        steps += draw(st.lists(st.sampled_from(kinds), max_size=2))
    return document(
        steps or [{"set_weight": 5.0}],
        shadow=shadow,
        on_success=draw(st.sampled_from(["promote", "hold"])),
        on_failure=draw(st.sampled_from(["rollback", "pause"])),
    )


class AnyOrder(RuleBasedStateMachine):
    @initialize(plan=documents())
    def start(self, plan: RolloutDocument) -> None:
        self.run = Run(plan)
        self.before = self.run.state

    def moved(self, after: State, back_allowed: bool = False) -> None:
        before, self.before = self.before, after
        plan = self.run.document
        if before.finished:
            assert after == before or (before.status == "promoted" and after.status == "rolled_back")
            assert after.weight == (100 if after.status == "promoted" else 0)
            return
        assert 0 <= after.step - before.step <= 1
        if after.weight < before.weight:
            assert after.status in ("rolled_back", "aborted")
        if after.weight != before.weight:
            assert after.finished or after.weight == plan.steps[after.step].set_weight
        if after.finished:
            assert after.weight == (100 if after.status == "promoted" else 0)
            assert after.until is None
        if after.status == "shadowing":
            assert after.weight == 0
        if after.status == "step":
            assert plan.steps[after.step].kind != "pause"
        # Earlier calls are of another weight.
        assert after.window_from >= before.window_from
        if after.weight != before.weight and not after.finished:
            assert after.window_from == self.run.now
            assert not after.streaks

    @rule(
        outcomes=st.lists(st.sampled_from(["pass", "fail", "inconclusive"]), max_size=1),
        after_s=st.sampled_from([0.0, 1.0, 4.0, 6.0, 2000.0]),
        not_ready=st.sampled_from([(), ("large",)]),
        new=st.booleans(),
    )
    def look(self, outcomes, after_s, not_ready, new):
        before = self.run.state
        after = self.run.look(*outcomes, after_s=after_s, not_ready=not_ready, new=new)
        self.moved(after)
        if after.finished and not before.finished and after.status != "promoted":
            assert after.status == "rolled_back"
            assert before.status == "warming" or self.run.document.on_failure == "rollback"
        if before.status == "warming" and not_ready:
            assert after.weight == 0
        if before.status == "inconclusive" or (before.status == "paused" and before.until is None):
            # Nothing goes on without an operator.
            assert after.weight in (before.weight, 0)
            assert after.status in (before.status, "rolled_back", "paused")
        if before.unguarded:
            assert at(after) == at(before)

    @rule(action=st.sampled_from(["pause", "resume", "promote", "abort", "undo"]))
    def act(self, action):
        before = self.run.state
        try:
            after = self.run.do(action)
        except RefusedError as error:
            refused = str(error)
        else:
            refused = ""
        if refused:
            assert describe(self.run.document, before) in refused
            assert "allowed: " in refused
            assert self.run.state == before
            return
        held = action == "pause" and before.status == "paused" and before.until is not None
        assert held or action in _ALLOWED[before.status]
        if action == "resume":
            assert after.status == "promoted" or after.step == before.step + (not before.again)
            assert not after.unguarded
        if action == "pause":
            as_before = {"status": before.status, "since": before.since, "until": before.until}
            assert replace(after, **as_before, again=before.again) == before
            assert after.again is not held
        self.moved(after)

    @precondition(lambda self: hasattr(self, "run"))
    @invariant()
    def it_can_be_stored_and_always_be_left(self):
        state = self.run.state
        assert State.from_json(json.loads(json.dumps(state.to_json(), allow_nan=False))) == state
        assert describe(self.run.document, state)
        if not state.finished:
            assert command(self.run.document, state, "abort", self.run.now).state.weight == 0


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@given(documents())
@settings(max_examples=50, deadline=None)
def test_a_canary_that_always_passes_and_an_operator_who_resumes_end_in_a_promotion(plan):
    run = Run(plan)
    entered = []
    for _ in range(100):
        if run.state.step not in entered:
            entered.append(run.state.step)
        if run.state.finished:
            break
        if run.state.status == "paused" and run.state.until is None:
            run.do("promote" if run.state.step >= len(plan.steps) else "resume")
        else:
            run.look("pass", after_s=3)
    assert run.state.status == "promoted"
    assert entered[:-1] == list(range(-1, len(entered) - 2))
    assert max(entered) in (len(plan.steps) - 1, len(plan.steps))
    assert set(FINISHED) == {"promoted", "rolled_back", "aborted"}
