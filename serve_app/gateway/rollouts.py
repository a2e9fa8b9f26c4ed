"""The gateway's side of rollouts: which splits are in force, what is counted of them, and calls that are mirrored.

Nothing here is waited for on a call's way: splits are fetched and figures sent once a second, and while nobody
answers the last splits stay in force and figures wait.
"""

import asyncio
import logging
import random
import time
import uuid
from collections import deque
from collections.abc import Callable, Coroutine, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

from serve_app.config import GatewaySettings
from serve_app.gateway.deadline import Deadline
from serve_app.rollout.agreement import compare
from serve_app.rollout.counters import Counters
from serve_app.rollout.messages import Deployed, News, Reply, Splits
from serve_app.rollout.split import Place, Split
from serve_app.rollout.store import Report, Search

logger = logging.getLogger("ray.serve")

_EVERY_S = 1.0
_EXCHANGE_TIMEOUT_S = 5.0
# What waits while the rollout application is away; the oldest is dropped first. And what is sent at once: messages
# between deployments have a limit, and the store has to write it all within the timeout.
_UNSENT_REPORTS, _UNSENT_SEARCHES = 2_000, 20_000
_REPORTS_AT_ONCE, _SEARCHES_AT_ONCE = 500, 5_000
# Mirrored calls of one gateway that are under way at once; more are dropped.
_MIRRORED_AT_ONCE = 4
# Of what was mirrored for a rollout's guards, so much is known again.
_KNOWN_QUESTIONS = 4_000
_LATENCIES = 200
# Of a canary call's time, what is kept for stable to answer instead: twice what stable's slow calls take, within
# these parts; the larger one until that is known.
_LEAST_KEPT, _MOST_KEPT = 0.25, 0.5
_STABLE_MARGIN = 2
# On either side of a rollout, one call in this time is computed although its scores may be known: the canary is
# to be tried and both are to be timed, however much the cache answers.
_COMPUTED_EVERY_S = 1.0


class Ask(Protocol):
    """Calls a method of the rollout application. Raises whatever goes wrong."""

    def __call__(self, app: str, method: str, *arguments: Any, timeout_s: float) -> Coroutine[Any, Any, Any]: ...


@dataclass(slots=True)
class _Latencies:
    """The last answers of a rollout's stable side, in seconds."""

    last: deque[float] = field(default_factory=lambda: deque(maxlen=_LATENCIES))
    slow_s: float | None = None

    def add(self, took_s: float) -> None:
        self.last.append(took_s)
        if self.slow_s is None or len(self.last) % 20 == 0:
            self.slow_s = sorted(self.last)[len(self.last) * 95 // 100]


class Rollouts:
    """One per gateway replica, on its event loop."""

    def __init__(self, ask: Ask, clock: Callable[[], float] = time.monotonic) -> None:
        self._ask = ask
        self.clock = clock
        self._splits = Splits()
        self._heard = False
        # How far the controller's clock is ahead of this machine's: it judges calls by when they were.
        self._ahead_s = 0.0
        self._counters = Counters()
        self._searches: deque[Search] = deque(maxlen=_UNSENT_SEARCHES)
        self._unsent: deque[Report] = deque(maxlen=_UNSENT_REPORTS)
        self._gateway, self._seq = uuid.uuid4().hex, 0
        self._latencies: dict[str, _Latencies] = {}
        # When a call was last computed for a side of a rollout, or was to be.
        self._computed_at: dict[tuple[str, str], float] = {}
        self._mirrored: set[asyncio.Task[None]] = set()
        # By rollout: since when its guards judge, and the hashes of what was mirrored since, oldest first.
        self._questions: dict[str, tuple[float, dict[int, None]]] = {}
        self._app: str | None = None
        self._deployed = Deployed()
        self._running: asyncio.Task[None] | None = None
        self._silent = False

    def configure(self, settings: GatewaySettings) -> None:
        """Follows the rollout application that the settings name, off the calls' way. Needs a running loop."""
        self._app = settings.rollout
        self._deployed = deployed(settings)
        if self._app is None:
            self._splits, self._heard = Splits(), False
        elif self._running is None:
            self._running = asyncio.get_running_loop().create_task(self._run())

    def of(self, route: str) -> tuple[Split, ...]:
        """The route's splits, oldest first; one whole table for as long as the caller holds it."""
        return self._splits.by_route.get(route, ())

    async def ask(self, method: str, *arguments: Any, timeout_s: float = 15.0) -> Reply:
        """What operators and events ask of the rollout application."""
        if self._app is None:
            return Reply(error="not_found", message="this fleet has no rollouts (user_config.rollout is not set)")
        try:
            reply: Reply = await self._ask(self._app, method, *arguments, timeout_s=timeout_s)
            return reply
        except Exception as error:
            logger.warning("the rollout application %s did not answer %s: %s", self._app, method, error)
            return Reply(error="unavailable", message=f"the rollout application {self._app} does not answer")

    # ---- what is counted

    def answered(
        self,
        place: Place,
        request_id: str,
        took_s: float | None,
        *,
        error: bool = False,
        hung_up: bool = False,
        degraded: bool = False,
        late: bool = False,
        unasked: bool = False,
        scores: Sequence[float] = (),
        searched: bool = False,
    ) -> None:
        """Counts a call that `place` put somewhere: an answer, or that there was none. `took_s` is None for an
        answer with scores from the cache, of which the two sides have unequal parts; `late` is one of stable's
        that a canary would have been given up over; `unasked` is one that asked no model for anything, though its
        pipeline has some."""
        now = self._now()
        figures = self._counters.at(place.split.rollout, place.role, now)
        figures.add(
            # As of a canary's calls, so that both sides' are cut at the same time.
            None if took_s is None or late else took_s * 1e3,
            error=error,
            hung_up=hung_up,
            degraded=degraded,
            late=late,
            unasked=unasked,
            scores=scores,
        )
        if took_s is not None and not error:
            self._computed_at[place.split.rollout, place.role] = self.clock()
            if place.role == "stable":
                self._latencies.setdefault(place.split.rollout, _Latencies()).add(took_s)
        if searched and not error:
            self._searches.append(Search(request_id, place.split.rollout, place.role, now))

    def hung_up(self, place: Place, request_id: str, took_s: float) -> None:
        """Counts a call whose client left after `took_s` as one that failed, where that is longer than stable's
        slow calls take: a side that is slower than its clients wait has failed them. Who leaves sooner, as one
        who types on does, says nothing of either side."""
        slow_s = self._slow_s(place.split)
        if slow_s is not None and took_s > slow_s:
            self.answered(place, request_id, None, error=True, hung_up=True)

    def wants_computed(self, place: Place) -> bool:
        """Whether the scores of the call that comes are to be computed, also those that are known."""
        side, now = (place.split.rollout, place.role), self.clock()
        if now - self._computed_at.get(side, float("-inf")) < _COMPUTED_EVERY_S:
            return False
        self._computed_at[side] = now
        return True

    def was_not_computed(self, place: Place) -> None:
        """The call that was to be had nothing to compute: another one will do."""
        self._computed_at.pop((place.split.rollout, place.role), None)

    def trial_deadline(self, split: Split, deadline: Deadline) -> Deadline:
        """Until when the canary may answer, so that stable can after it."""
        left = deadline.remaining_s()
        slow_s = self._slow_s(split)
        kept = _MOST_KEPT if slow_s is None or not left else _STABLE_MARGIN * slow_s / left
        kept = min(_MOST_KEPT, max(_LEAST_KEPT, kept))
        return Deadline(deadline.clock() + left * (1 - kept), 0.0, deadline.clock)

    def _slow_s(self, split: Split) -> float | None:
        """What stable's slow calls take; None until there were some."""
        return self._latencies.get(split.rollout, _Latencies()).slow_s

    # ---- mirrored calls

    def wants_mirror(self, split: Split, question: Hashable) -> bool:
        """Whether the call just answered by stable is to be mirrored: by chance, while there is room, and once for
        one `question` until guards begin anew: a probe that asks the same all day is one sample."""
        chosen = split.shadow > 0 and random.random() < split.shadow and len(self._mirrored) < _MIRRORED_AT_ONCE
        if not chosen:
            return False
        since, known = self._questions.get(split.rollout, (_since(split), {}))
        if since != _since(split):
            known = {}
        self._questions[split.rollout] = _since(split), known
        if hash(question) in known:
            return False
        known[hash(question)] = None
        if len(known) > _KNOWN_QUESTIONS:
            del known[next(iter(known))]
        return True

    def was_not_mirrored(self, split: Split, question: Hashable) -> None:
        """The call was dropped: another one with its question will do."""
        since, known = self._questions.get(split.rollout, (_since(split), {}))
        if since == _since(split):
            known.pop(hash(question), None)

    def mirror(self, call: Coroutine[Any, Any, Any]) -> None:
        """Runs a mirrored call on its own; whatever it raises is its own affair."""
        task = asyncio.get_running_loop().create_task(_quietly(call))
        self._mirrored.add(task)
        task.add_done_callback(self._mirrored.discard)

    def mirrored(
        self, split: Split, orders: tuple[Sequence[Any], Sequence[Any]] | None, *, degraded: bool = False
    ) -> None:
        """Counts a mirrored call: stable's order and the canary's, or None where the canary failed it or left
        something out (`degraded`)."""
        figures = self._counters.at(split.rollout, "canary", self._now())
        figures.add_mirrored(compare(*orders) if orders is not None else None, degraded=degraded)

    def _now(self) -> float:
        return time.time() + self._ahead_s

    # ---- once a second

    async def _run(self) -> None:
        while True:
            if self._app is not None:
                try:
                    await self._exchange(self._app)
                    self._silent = False
                except Exception as error:
                    if not self._silent:
                        what = "no news from the rollout application, the last splits stay"
                        if not self._heard:
                            what = (
                                "no news yet from the rollout application: rollouts and promotions are not in "
                                "force here"
                            )
                        logger.warning("%s: %s", what, error)
                    self._silent = True
            await asyncio.sleep(_EVERY_S)

    async def _exchange(self, app: str) -> None:
        counted, self._counters = self._counters, Counters()
        self._seq += 1
        for rollout, role, bucket, figures in counted.rows():
            self._unsent.append(Report(rollout, role, bucket, figures.to_json(), self._gateway, self._seq))
        reports = tuple(islice(self._unsent, _REPORTS_AT_ONCE))
        searches = tuple(islice(self._searches, _SEARCHES_AT_ONCE))
        news = News(self._gateway, self._deployed, reports, searches)
        splits: Splits = await self._ask(app, "exchange", news, timeout_s=_EXCHANGE_TIMEOUT_S)
        # What arrived although the answer was lost is sent again, and stored once.
        # An application that is older than this gateway says nothing of it.
        if getattr(splits, "stored", True):
            _drop(self._unsent, reports)
            _drop(self._searches, searches)
        # The settings may have changed meanwhile. And what was read before the store went away is for those that
        # have nothing: others may have heard of a later state, from another controller.
        if self._app == app and not (self._heard and getattr(splits, "old", False)):
            self._splits, self._heard = splits, True
            if splits.said_at is not None:
                self._ahead_s = splits.said_at - time.time()
        live = {split.rollout for splits in self._splits.by_route.values() for split in splits if split.live}
        self._latencies = {name: found for name, found in self._latencies.items() if name in live}
        self._computed_at = {side: at for side, at in self._computed_at.items() if side[0] in live}
        self._questions = {name: known for name, known in self._questions.items() if name in live}


def deployed(settings: GatewaySettings) -> Deployed:
    """What the controller must know of the settings."""
    return Deployed(
        {
            name: tuple(dict.fromkeys(stage.variant for stage in pipeline.stages))
            for name, pipeline in settings.pipelines.items()
        },
        {
            name: tuple(pipeline for pipeline, weight in route.weights.items() if weight > 0)
            for name, route in settings.routes.items()
        },
    )


def _since(split: Split) -> float:
    # A controller that is older than this gateway says nothing of it.
    return getattr(split, "since", 0.0)


def _drop(queue: deque[Any], sent: Sequence[Any]) -> None:
    """Takes away what is still there of the oldest that were sent."""
    gone = {id(one) for one in sent}
    while queue and id(queue[0]) in gone:
        queue.popleft()


async def _quietly(call: Coroutine[Any, Any, Any]) -> None:
    try:
        await call
    except Exception:
        logger.exception("a mirrored call failed")
