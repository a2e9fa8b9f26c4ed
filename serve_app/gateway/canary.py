"""A call that a rollout has placed: answered by its canary or by stable, counted, perhaps mirrored.

No client pays for a canary: what it can't answer in full and in time, stable answers within the call's deadline.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from serve_app.gateway.deadline import Deadline
from serve_app.gateway.errors import ApiError
from serve_app.gateway.pipeline import Ranking
from serve_app.gateway.plan import Call, pipeline_plan, timeout_ms
from serve_app.gateway.rollouts import Rollouts

logger = logging.getLogger("ray.serve")

A = TypeVar("A")

# Results that are compared and whose scores are counted: what users see.
SHOWN = 10
# Mirrored calls wait behind live ones, so they get more of the route's time than those.
_MIRRORED_TIME = 2


class CanaryFailedError(Exception):
    """No whole answer; the message is why, in a word. `degraded`: one that left something out could be given."""

    def __init__(self, why: str, *, degraded: bool = False) -> None:
        super().__init__(why)
        self.degraded = degraded


async def answer(
    rollouts: Rollouts,
    call: Call,
    attempt: Callable[[Call], Awaitable[A]],
    *,
    ranking_of: Callable[[A], Ranking],
    order_of: Callable[[A], Sequence[Any]],
    searched: bool,
    question: Hashable,
) -> tuple[Call, A]:
    """What `attempt` makes of the call, and the call that was answered. `order_of` names the results, best first.
    Of calls with one `question` one is mirrored. Raises what `attempt` raises for stable, or where no rollout has
    a say."""
    place = call.plan.place
    if place is None or not place.split.live:
        return call, await attempt(call)
    started = time.monotonic()
    forced = rollouts.wants_computed(place)
    fresh = call.fresh or forced
    trial = rollouts.trial_deadline(place.split, call.deadline)
    if place.role == "canary":
        try:
            whole = await _whole(attempt, replace(call, deadline=trial, fresh=fresh))
        except asyncio.CancelledError:
            rollouts.hung_up(place, call.request_id, time.monotonic() - started)
            raise
        except CanaryFailedError as failure:
            plan = pipeline_plan(call.settings, place.split.stable, call.plan.route)
            stable_place = replace(place, role="stable")
            stable = replace(call, plan=replace(plan, place=stable_place, why="fallback"))
            # By kind, as stable's are: what degrades both alike is no difference.
            degraded = failure.degraded
            try:
                answered = await attempt(stable)
            except asyncio.CancelledError:
                rollouts.answered(place, call.request_id, None, error=not degraded, degraded=degraded)
                raise
            except Exception as error:
                _count_failure(rollouts, call, error)
                raise
            rollouts.answered(place, call.request_id, None, error=not degraded, degraded=degraded)
            logger.warning(
                "request %s: stable %s answers for canary %s: %s (%s)",
                call.request_id,
                place.split.stable,
                place.split.canary,
                failure,
                failure.__cause__,
            )
            return stable, answered
        _count(rollouts, call, ranking_of(whole), started, searched, forced)
        return call, whole
    trial_s = trial.remaining_s()
    try:
        answered = await attempt(replace(call, fresh=fresh))
    except asyncio.CancelledError:
        rollouts.hung_up(place, call.request_id, time.monotonic() - started)
        raise
    except Exception as error:
        _count_failure(rollouts, call, error)
        raise
    ranking = ranking_of(answered)
    late = not trial.remaining_s() or _outlasts(ranking, trial_s, searched)
    degraded = _count(rollouts, call, ranking, started, searched, forced, late)
    order = order_of(answered)
    # Of fewer than two results there is one order.
    if not degraded and len(order) > 1 and rollouts.wants_mirror(place.split, question):
        rollouts.mirror(_mirrored(rollouts, call, attempt, order_of, order, question))
    return call, answered


async def _mirrored(
    rollouts: Rollouts,
    call: Call,
    attempt: Callable[[Call], Awaitable[A]],
    order_of: Callable[[A], Sequence[Any]],
    stable_order: Sequence[Any],
    question: Hashable,
) -> None:
    assert call.plan.place is not None
    split = call.plan.place.split
    plan = pipeline_plan(call.settings, split.canary, call.plan.route)
    deadline = Deadline.after(_MIRRORED_TIME * timeout_ms(call.settings, plan, None) / 1e3)
    try:
        whole = await _whole(attempt, replace(call, plan=plan, deadline=deadline, mirrored=True))
    except CanaryFailedError as failure:
        # A canary that is busy with live calls, which go first, drops mirrored ones; that is no failure.
        if str(failure) == "overloaded" or (str(failure) == "timeout" and split.weight > 0):
            rollouts.was_not_mirrored(split, question)
        else:
            rollouts.mirrored(split, None, degraded=failure.degraded)
    else:
        rollouts.mirrored(split, (stable_order, order_of(whole)))


async def _whole(attempt: Callable[[Call], Awaitable[A]], call: Call) -> A:
    """The canary's answer with nothing left out. Raises CanaryFailedError."""
    try:
        return await attempt(replace(call, whole=True))
    except CanaryFailedError:
        raise
    except ApiError as error:
        raise CanaryFailedError("timeout" if error.code == "deadline_exceeded" else error.code) from error
    except Exception as error:
        logger.exception("request %s: the canary failed", call.request_id)
        raise CanaryFailedError("error") from error


def _count_failure(rollouts: Rollouts, call: Call, error: Exception) -> None:
    """A call that nobody could answer counts on its side, unless it is the caller's fault."""
    assert call.plan.place is not None
    if not isinstance(error, ApiError) or error.status >= 500:
        rollouts.answered(call.plan.place, call.request_id, None, error=True)


def _outlasts(ranking: Ranking, trial_s: float, searched: bool) -> bool:
    """Whether a stage took longer than it would have been given of `trial_s`, as `Deadline.share_s` gives it."""
    stages = [report for report in ranking.reports if report.skipped is None]
    left_s = trial_s - (stages.pop(0).took_ms / 1e3 if searched else 0)
    for i, report in enumerate(stages):
        if report.took_ms / 1e3 > left_s / (len(stages) - i):
            return True
        left_s -= report.took_ms / 1e3
    return False


def _count(
    rollouts: Rollouts,
    call: Call,
    ranking: Ranking,
    started: float,
    searched: bool,
    forced: bool,
    late: bool = False,
) -> bool:
    """Whether the answer is degraded. `forced`: it was to be computed for the rollout's sake. `late`: a canary
    wouldn't have had the time."""
    assert call.plan.place is not None
    # Of a pipeline without any, or for another script, recall is all there is to time.
    has_stages = len(call.plan.stages) > sum(report.skipped is not None for report in ranking.reports)
    degraded = any(report.failure is not None for report in ranking.reports)
    scores = [score for p in ranking.order[:SHOWN] if (score := ranking.rerank_scores[p]) is not None]
    pairs = sum(report.pairs for report in ranking.reports)
    hits = sum(report.cache_hits for report in ranking.reports)
    # None where all scores were known, or were being computed for others.
    tokens = sum(report.tokens for report in ranking.reports)
    computed = pairs and not hits if has_stages else not any(report.cached for report in ranking.reports)
    if forced and has_stages and not pairs and not degraded:
        rollouts.was_not_computed(call.plan.place)
    rollouts.answered(
        call.plan.place,
        call.request_id,
        time.monotonic() - started if computed else None,
        degraded=degraded,
        late=late,
        unasked=has_stages and not tokens and not degraded and not late,
        scores=scores,
        searched=searched,
    )
    return degraded
