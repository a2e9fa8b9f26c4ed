"""A rollout's states, and what leads from one to the next. Pure: the controller brings the facts and stores what
comes back before it takes effect.

    pending → warming → [shadowing] → step i → … → promoted
                                        ├→ paused, inconclusive     (wait for an operator, or a pause's end)
                                        └→ rolled_back, aborted

`advance` says what time and facts lead to, `command` what an operator asks for. Each change moves by one step.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from serve_app.rollout.document import RolloutDocument
from serve_app.rollout.guards import Verdict, breached, streaks

Status = Literal[
    "pending",
    "warming",
    "shadowing",
    "step",
    "paused",
    "inconclusive",
    "promoted",
    "rolled_back",
    "aborted",
]
Action = Literal["pause", "resume", "promote", "abort", "undo"]
FINISHED: tuple[Status, ...] = ("promoted", "rolled_back", "aborted")
# A canary that has no replica after so long won't have one without help.
WARMING_LIMIT_S = 1800.0

_ALLOWED: dict[Status, tuple[Action, ...]] = {
    "pending": ("abort",),
    "warming": ("abort",),
    "shadowing": ("pause", "promote", "abort"),
    "step": ("pause", "promote", "abort"),
    "paused": ("resume", "promote", "abort"),
    "inconclusive": ("resume", "promote", "abort"),
    "promoted": ("undo",),
    "rolled_back": (),
    "aborted": (),
}


class RefusedError(Exception):
    """A command that the rollout's state does not allow. Says the state and what is allowed."""


@dataclass(frozen=True, slots=True)
class State:
    """Times are seconds since the epoch. `weight`: percent of the route's calls that the canary gets."""

    status: Status = "pending"
    # Index of the step under way; -1 before the first.
    step: int = -1
    weight: float = 0.0
    since: float = 0.0
    # Figures from this moment on are judged: earlier calls met another weight, or an operator has seen them fail.
    window_from: float = 0.0
    # And of clicks, those on searches from this one on; 0 for all of the rollout's.
    clicks_from: float = 0.0
    # When a timed pause ends, or an analysis gives up.
    until: float | None = None
    # What `resume` goes on with: the step under way once more, or the next.
    again: bool = False
    # Guards have no say: an operator was asked to decide after they failed.
    unguarded: bool = False
    # Failures in a row by metric, and how many of the canary's samples in the window each was last counted over.
    streaks: dict[str, int] = field(default_factory=dict)
    counted: dict[str, int] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return self.status in FINISHED

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "State":
        return cls(**{name: data[name] for name in _FIELDS if name in data})


_FIELDS = tuple(f.name for f in fields(State))


@dataclass(frozen=True, slots=True)
class Facts:
    """`not_ready`: variants of the canary without a running replica. `verdicts`: the last ones of the window; a
    failure counts once for the same samples, however often and by whomever they are given. `gone`: pipelines of
    the rollout that no gateway has any more."""

    now: float
    not_ready: Sequence[str] = ()
    verdicts: Sequence[Verdict] = ()
    gone: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Change:
    state: State
    reason: str


def advance(document: RolloutDocument, state: State, facts: Facts) -> Change | None:
    """The next state by itself; None when it stays. A look that only counts failures, or that finds the clock set
    back, changes the state, not its status."""
    now = facts.now
    if state.finished:
        return None
    if state.status == "pending":
        return Change(State("warming", since=now, window_from=now), "the controller has taken it up")
    if now < state.since:
        return Change(_set_back(state, now), "")
    if facts.gone:
        # Gateways send its calls to stable, or to where the route's own weights do: nothing is left to judge.
        names = " and ".join(map(repr, facts.gone))
        return Change(_end(state, "rolled_back", now), f"no gateway's settings have the pipeline {names} any more")
    if state.status == "warming":
        if not facts.not_ready:
            return _enter(document, state, 0, now, "the canary's variants have replicas")
        if now - state.since > WARMING_LIMIT_S:
            waiting = ", ".join(facts.not_ready)
            return Change(_end(state, "rolled_back", now), f"no replica of {waiting} within {WARMING_LIMIT_S:g} s")
        return None
    in_a_row, last = streaks(state.streaks, state.counted, facts.verdicts)
    counted = replace(state, streaks=in_a_row, counted=last)
    failed = [] if state.unguarded else breached(document.guards, counted.streaks)
    if failed:
        reason = "; ".join(v.text for v in facts.verdicts if v.metric in failed and v.outcome == "fail")
        return _failed(document, counted, now, reason or f"failed: {', '.join(failed)}")
    over = state.until is not None and now >= state.until
    if state.status == "paused":
        if over:
            return _enter(document, counted, state.step + 1, now, "the pause is over")
    elif state.status != "inconclusive":
        if document.steps[state.step].kind == "set_weight":
            return _enter(
                document, counted, state.step + 1, now, f"{state.weight:g} % of the calls are the canary's"
            )
        judged = {verdict.metric: verdict.outcome for verdict in facts.verdicts}
        guards = document.guards_at(state.weight)
        if judged and all(judged.get(metric) == "pass" for metric in guards):
            reason = "; ".join(v.text for v in facts.verdicts if v.metric in guards)
            return _enter(document, counted, state.step + 1, now, reason)
        if over:
            open_ = [v for v in facts.verdicts if v.metric in guards and v.outcome != "pass"]
            reason = "; ".join(v.text for v in open_) or "there were no calls to judge"
            if not state.unguarded and any(v.outcome == "fail" for v in open_):
                # As of few queries, which bring no more samples for another look.
                return _failed(document, counted, now, f"time is up: {reason}")
            return Change(
                replace(counted, status="inconclusive", since=now, until=None, again=True), f"time is up: {reason}"
            )
    return Change(counted, "") if counted != state else None


def _failed(document: RolloutDocument, state: State, now: float, reason: str) -> Change:
    if document.on_failure == "rollback":
        return Change(_end(state, "rolled_back", now), reason)
    return Change(replace(state, status="paused", since=now, until=None, again=True, unguarded=True), reason)


def command(document: RolloutDocument, state: State, action: Action, now: float) -> Change:
    """What an operator asks for. Raises RefusedError."""
    allowed = _ALLOWED[state.status]
    if state.status == "paused" and state.until is not None:
        # One that would end by itself may be held.
        allowed = ("pause", *allowed)
    if action not in allowed:
        listed = ", ".join(allowed) or "nothing: start another"
        raise RefusedError(
            f"the rollout is {describe(document, state)}, which {action} does not fit; allowed: {listed}"
        )
    if action == "abort":
        return Change(_end(state, "aborted", now), "aborted by an operator")
    if action == "undo":
        return Change(_end(state, "rolled_back", now), "undone by an operator")
    if action == "promote":
        return Change(_promoted(state, now), "promoted by an operator")
    if action == "pause" and state.status == "paused":
        return Change(replace(state, until=None), "held by an operator")
    if action == "pause":
        paused = replace(state, status="paused", since=now, until=None, again=True)
        return Change(paused, "paused by an operator")
    if state.step >= len(document.steps):
        raise RefusedError(
            f"the rollout is {describe(document, state)} and all steps are done; allowed: promote, abort"
        )
    change = _enter(document, state, state.step + (0 if state.again else 1), now, "resumed by an operator")
    if state.unguarded:
        # The operator has seen what failed; from here on it counts anew.
        anew = replace(change.state, unguarded=False, streaks={}, counted={}, window_from=now, clicks_from=now)
        return replace(change, state=anew)
    return change


def describe(document: RolloutDocument, state: State) -> str:
    """The state in words: `step 2 of 7 (analysis) at 25 %`."""
    name = state.status.replace("_", " ")
    if 0 <= state.step < len(document.steps) and not state.finished:
        where = f"step {state.step + 1} of {len(document.steps)} ({document.steps[state.step].kind})"
        name = where if name == "step" else f"{name} in {where}"
    return f"{name} at {state.weight:g} %"


def _enter(document: RolloutDocument, state: State, index: int, now: float, reason: str) -> Change:
    """Into step `index`, or past the last one."""
    if index >= len(document.steps):
        if document.on_success == "promote":
            return Change(_promoted(state, now), reason)
        held = replace(state, status="paused", step=index, since=now, until=None, again=False)
        return Change(held, f"{reason}; the steps are done, promote or abort")
    step = document.steps[index]
    entered = replace(state, status="step", step=index, since=now, until=None, again=False)
    if step.set_weight is not None:
        if step.set_weight != state.weight:
            entered = replace(entered, weight=step.set_weight, window_from=now, streaks={}, counted={})
    elif step.pause is not None:
        duration_s = step.pause.duration_s
        entered = replace(entered, status="paused", until=None if duration_s is None else now + duration_s)
    elif step.analysis is not None:
        entered = replace(entered, until=now + step.analysis.timeout_s)
    if entered.status == "step" and entered.weight == 0 and document.shadow > 0:
        entered = replace(entered, status="shadowing")
    return Change(entered, reason)


def _set_back(state: State, now: float) -> State:
    """Begun now: what was to be waited for, and a window that had not begun, would wait for the clock."""
    until = None if state.until is None else now + (state.until - state.since)
    window_from, clicks_from = min(state.window_from, now), min(state.clicks_from, now)
    return replace(state, since=now, until=until, window_from=window_from, clicks_from=clicks_from)


def _promoted(state: State, now: float) -> State:
    return replace(_end(state, "promoted", now), weight=100.0)


def _end(state: State, status: Status, now: float) -> State:
    return replace(state, status=status, weight=0.0, since=now, until=None, again=False)
