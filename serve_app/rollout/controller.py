"""The controller: keeps the lease, brings the facts, stores each change before it takes effect. Knows no Ray.

Any number may live at once, as when a node drains; the store lets one act. What gateways and operators ask is read
from the store, so that every controller answers it.
"""

import asyncio
import contextlib
import logging
import os
import socket
import time
import uuid
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import asdict, replace
from itertools import takewhile
from typing import Any

from pydantic import ValidationError

from serve_app.config import closest, explain
from serve_app.rollout.document import RolloutDocument
from serve_app.rollout.facts import Looks, NotReady, Readiness
from serve_app.rollout.figures import Figures
from serve_app.rollout.guards import Verdict, judge
from serve_app.rollout.machine import Action, Change, Facts, RefusedError, State, advance, command, describe
from serve_app.rollout.messages import Deployed, News, Reply, Splits
from serve_app.rollout.split import Split, place
from serve_app.rollout.store import (
    Command,
    ConflictError,
    Event,
    Lease,
    Rollout,
    RouteBusyError,
    StaleLeaseError,
    Store,
    StoreError,
    StoreUnavailable,
    Transition,
    UnknownRolloutError,
)
from serve_app.rollout.window import clicks

logger = logging.getLogger("ray.serve")

TICK_S = 0.5
LEASE_S = 5.0
# Guards look at new figures this often.
_LOOK_S = 2.0
# A tick waits so long in all for the fleet and for figures; what takes longer is there for a later one.
_PATIENCE_S = 1.0
# What is in force is read anew when it is older, as it is where this process was frozen.
_SPLITS_S = 2.0
# Rollouts that may be new since they were last read; all, where that was long ago.
_NEW, _ALL, _AWAY_S = 200, 1_000_000, 30.0
_COMMAND_LIMIT_S = 10.0
# A pipeline that no gateway has for so long won't come back with the next settings.
_GONE_S = 60.0
# Gateways tell of their searches once a second, and an impression may be quicker: events of unknown searches are
# tried once more after so long, so many at most.
_EVENTS_AGAIN_S, _EVENTS_WAITING, _EVENTS_AT_ONCE = 5.0, 20_000, 1_000


class Controller:
    """`not_ready` asks the fleet; `holder` names this life of the controller."""

    def __init__(self, store: Store, not_ready: NotReady, holder: str | None = None) -> None:
        self.store = store
        self.holder = holder or f"{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
        self._lease: Lease | None = None
        self._looks = Looks(store)
        self._readiness = Readiness(not_ready)
        self._patient_until = 0.0
        self._deployed: dict[str, tuple[float, Deployed]] = {}
        self._splits = Splits()
        self._splits_at = float("-inf")
        # Unfinished and promoted ones, oldest first: others never come into force again.
        self._open: list[str] = []
        # Promoted ones that were said to override weights.
        self._overriding: set[str] = set()
        # Since when the rollout's pipelines are in no gateway's settings.
        self._gone_since: dict[str, float] = {}
        self._early: deque[tuple[float, Sequence[Event]]] = deque()
        self._failing = ""
        # Why gateways' news could not be stored, as it was said last.
        self._unstored = ""
        self._stuck: dict[str, str] = {}

    # ---- the loop

    async def run(self) -> None:
        """Acts while it holds the lease, for ever. While the store is down nothing changes."""
        while True:
            try:
                await self.tick()
                self._failing = ""
            except StaleLeaseError as error:
                self._lease = None
                self._looks.clear()
                logger.warning("rollouts: %s", error)
            except StoreError as error:
                # Gateways send what they counted meanwhile, so that windows are added up anew.
                self._looks.clear()
                if str(error) != self._failing:
                    logger.error("rollouts stand still: %s", error)
                self._failing = str(error)
            except Exception as error:
                if repr(error) != self._failing:
                    logger.exception("rollouts stand still")
                self._failing = repr(error)
            await asyncio.sleep(TICK_S)

    async def close(self) -> None:
        if self._lease is not None:
            await asyncio.to_thread(self.store.release, self._lease)

    async def tick(self) -> None:
        """One look at everything. Raises StoreError."""
        self._patient_until = time.monotonic() + _PATIENCE_S
        lease = await self._held()
        if lease is not None:
            for waiting in await asyncio.to_thread(self.store.waiting_commands):
                await self._alone(f"command {waiting.id} of {waiting.rollout_id}", self._apply(waiting, lease))
            active = await asyncio.to_thread(self.store.active)
            warming = [rollout for rollout in active if rollout.state.get("status") == "warming"]
            if warming:
                variants = {variant for rollout in warming for variant in self._variants(rollout)}
                await self._alone("the fleet's status", self._readiness.ask(sorted(variants), self._patience_s()))
            for rollout in active:
                await self._alone(f"rollout {rollout.id}", self._look(rollout, lease))
        over = await self._read_splits()
        if lease is not None:
            # The last one first: of two that cancel each other out, the upper one alone would be in force again.
            for rollout, reason in reversed(over):
                await self._alone(f"the end of {rollout.id}", self._retire(rollout, reason, lease))
        await self._count_early()

    async def _alone(self, what: str, work: Coroutine[Any, Any, None]) -> None:
        """What is wrong with one rollout holds up no other."""
        try:
            await work
            self._stuck.pop(what, None)
        except (StaleLeaseError, StoreUnavailable):
            raise
        except Exception as error:
            if self._stuck.get(what) != repr(error):
                logger.exception("%s stands still", what)
            self._stuck[what] = repr(error)

    def _patience_s(self) -> float:
        return max(0.0, self._patient_until - time.monotonic())

    async def _held(self) -> Lease | None:
        if self._lease is not None:
            await asyncio.to_thread(self.store.renew, self._lease)
        else:
            self._lease = await asyncio.to_thread(self.store.acquire, self.holder, LEASE_S)
            if self._lease is not None:
                logger.info(f"rollouts: {self.holder} acts (lease {self._lease.token})")
        return self._lease

    async def _look(self, rollout: Rollout, lease: Lease) -> None:
        document, state = _parts(rollout)
        now = time.time()
        facts = Facts(now)
        if state.status == "warming":
            not_ready = self._readiness.missing(self._variants(rollout))
            facts = Facts(now, not_ready=not_ready, gone=self._gone(rollout))
        elif state.status != "pending":
            look = await self._looks.look(rollout.id, document, state, _LOOK_S, self._patience_s())
            gone = self._gone(rollout)
            if look.verdicts is None and not gone:
                return
            facts = Facts(now, gone=gone, verdicts=look.verdicts or ())
        change = advance(document, state, facts)
        if change is not None:
            await self._commit(rollout, document, state, change, facts.verdicts, lease)

    async def _apply(self, waiting: Command, lease: Lease) -> None:
        rollout = await asyncio.to_thread(self.store.get, waiting.rollout_id)
        document, state = _parts(rollout)
        action: Action = waiting.action  # type: ignore[assignment]
        try:
            change = command(document, state, action, time.time())
            await asyncio.to_thread(self._check_undo, rollout, action)
        except RefusedError as error:
            await asyncio.to_thread(self.store.refuse_command, waiting, str(error), lease)
            return
        if by := str(waiting.body.get("by") or ""):
            change = replace(change, reason=f"{change.reason} ({by})")
        await self._commit(rollout, document, state, change, self._looks.verdicts(rollout.id), lease, waiting.id)

    def _check_undo(self, rollout: Rollout, action: Action) -> None:
        """Raises RefusedError where a promoted rollout can't be undone any more."""
        if action != "undo":
            return
        later = [active.id for active in self.store.active() if active.route == rollout.route]
        if later:
            raise RefusedError(
                f"route {rollout.route!r} has the unfinished rollout {later[0]!r}; abort that first"
            )
        over_it = [
            later.id
            for later in takewhile(lambda later: later.id != rollout.id, self.store.recent(100, rollout.route))
            if _is_promoted(later) and later.spec["stable"] == rollout.spec["canary"]
        ]
        if over_it:
            raise RefusedError(f"{over_it[0]!r} was promoted over this rollout's canary; undo that first")
        if rollout.state.get("retired"):
            raise RefusedError(
                f"the weights of route {rollout.route!r} have taken over from the rollout; "
                "change those, then: serve deploy FILE"
            )

    async def _retire(self, rollout: Rollout, reason: str, lease: Lease) -> None:
        _, state = _parts(rollout)
        logger.info(f"rollout {rollout.id} is done: {reason}")
        changed = replace(rollout, state={**rollout.state, "retired": True})
        entry = Transition(state.status, "promoted, and the route's own weights have taken over", reason)
        await asyncio.to_thread(self.store.commit, changed, entry, lease, None)

    async def _commit(
        self,
        rollout: Rollout,
        document: RolloutDocument,
        before: State,
        change: Change,
        verdicts: Sequence[Verdict],
        lease: Lease,
        command_id: str | None = None,
    ) -> None:
        after = change.state
        transition = None
        if change.reason:
            figures: dict[str, Any] = {verdict.metric: asdict(verdict) for verdict in verdicts}
            old, new = describe(document, before), describe(document, after)
            transition = Transition(old, new, change.reason, figures)
            logger.info(f"rollout {rollout.id} on {rollout.route}: {old} → {new}: {change.reason}")
        changed = replace(rollout, state={**rollout.state, **after.to_json()}, finished=after.finished)
        await asyncio.to_thread(self.store.commit, changed, transition, lease, command_id)
        if after.finished:
            self._looks.forget(rollout.id)

    # ---- what gateways ask

    async def exchange(self, news: News) -> Splits:
        """Takes in what a gateway counted, and says what is in force: also where the former couldn't be `stored`,
        and the gateway is to send the same again. While the store is away, that is what was in force when it was
        read last, and marked as `old`. Raises StoreError where it was never read."""
        self._deployed[news.gateway] = (time.monotonic(), news.deployed)
        stored = True
        try:
            if news.searches:
                await asyncio.to_thread(self.store.add_searches, news.searches)
            if news.reports:
                await asyncio.to_thread(self.store.add_figures, news.reports)
                self._looks.heard(news.reports)
                self._unstored = ""
        except StoreError as error:
            # Every gateway comes back once a second.
            if str(error) != self._unstored:
                logger.warning("what gateways counted could not be stored, they keep it: %s", error)
            self._unstored, stored = str(error), False
        old = False
        if time.monotonic() - self._splits_at > _SPLITS_S:
            try:
                await self._read_splits()
            except StoreError:
                old = self._splits_at > float("-inf")
                if not old:
                    raise
        return replace(self._splits, said_at=time.time(), stored=stored, old=old)

    async def _read_splits(self) -> list[tuple[Rollout, str]]:
        """Reads what is in force. Promoted rollouts that are over come back, oldest first, with the reason."""
        asked_at = time.monotonic()
        found = await asyncio.to_thread(self._read_open, asked_at - self._splits_at > _AWAY_S)
        by_route: dict[str, list[Split]] = {}
        over: dict[str, tuple[Rollout, str]] = {}
        # By route and canary.
        promoted: dict[tuple[str, str], Rollout] = {}
        # Calls come to a promoted rollout's stable by the route's own weights, or from one promoted before it.
        reached = {route: set(names) for route, names in self._in_force().routes.items()}
        for rollout in filter(_is_promoted, found):
            names = reached.get(rollout.route)
            under = promoted.get((rollout.route, rollout.spec["stable"]))
            promoted[rollout.route, rollout.spec["canary"]] = rollout
            if names is not None:
                if reason := self._over(rollout, names, under if under and under.id in over else None):
                    over[rollout.id] = rollout, reason
                    continue
                names.add(rollout.spec["canary"])
            by_route.setdefault(rollout.route, []).append(_split(rollout, 100.0))
        for rollout in found:
            state = State.from_json(rollout.state)
            if not state.finished and state.status not in ("pending", "warming"):
                by_route.setdefault(rollout.route, []).append(_split(rollout, state.weight, state))
        self._tell_overriding(rollout for rollout in filter(_is_promoted, found) if rollout.id not in over)
        if asked_at > self._splits_at:
            self._splits = Splits({route: tuple(splits) for route, splits in by_route.items()})
            self._splits_at = asked_at
        return list(over.values())

    def _over(self, rollout: Rollout, names: set[str], under: Rollout | None) -> str:
        """Why a promoted rollout isn't in force any more, for good; empty where it is. `names` get the route's
        calls; `under` is the promotion whose canary is this one's stable, where that is over. A pipeline of an old
        canary's name that comes some day gets no calls, and weights that name stable once more are what an
        operator wants."""
        stable, canary = rollout.spec["stable"], rollout.spec["canary"]
        if self._gone(rollout):
            return f"no gateway's settings have the pipeline {canary!r} any more"
        if stable not in names:
            return f"route {rollout.route!r} sends no calls to {stable!r} any more"
        if under is not None and under.spec["stable"] == canary:
            return f"it took {under.id!r} back, from which the weights of route {rollout.route!r} have taken over"
        return ""

    def _tell_overriding(self, promoted: Iterable[Rollout]) -> None:
        """Whoever writes weights for both sides wants a mix, and doesn't get it."""
        overriding = set()
        for rollout in promoted:
            route, stable, canary = rollout.route, rollout.spec["stable"], rollout.spec["canary"]
            # Of one gateway: while settings are deployed, others have older ones.
            if any({stable, canary} <= set(known.routes.get(route, ())) for _, known in self._deployed.values()):
                overriding.add(rollout.id)
                if rollout.id not in self._overriding:
                    logger.warning(
                        f"route {route!r} has weights for {stable!r} and {canary!r}, but rollout {rollout.id}, "
                        f"promoted, sends all calls of {stable!r} to {canary!r}; for both: "
                        f"serve-app rollout undo {rollout.id}"
                    )
        self._overriding = overriding

    def _read_open(self, all_: bool) -> list[Rollout]:
        """Rollouts that are in force or may come into force, oldest first."""
        newest = self.store.recent(_ALL if all_ else _NEW)
        found = {rollout.id: rollout for rollout in reversed(newest)}
        read = []
        for known in self._open:
            # A store that lost its last writes may not know it any more.
            with contextlib.suppress(UnknownRolloutError):
                read.append(found.pop(known) if known in found else self.store.get(known))
        open_ = [rollout for rollout in [*read, *found.values()] if not rollout.finished or _is_promoted(rollout)]
        self._open = [rollout.id for rollout in open_]
        return open_

    def _in_force(self) -> Deployed:
        """What the gateways that were heard lately serve; a pipeline counts when one of them has it."""
        self._deployed = {
            name: (at, deployed) for name, (at, deployed) in self._deployed.items() if time.monotonic() - at < 60
        }
        pipelines: dict[str, tuple[str, ...]] = {}
        routes: dict[str, tuple[str, ...]] = {}
        for _, deployed in self._deployed.values():
            pipelines |= deployed.pipelines
            for route, names in deployed.routes.items():
                routes[route] = tuple(dict.fromkeys([*routes.get(route, ()), *names]))
        return Deployed(pipelines, routes)

    def _gone(self, rollout: Rollout) -> list[str]:
        """Pipelines of the rollout that have been in no gateway's settings for a while, as far as one with its
        route was heard; of a promoted one, only the canary counts."""
        in_force = self._in_force()
        known = in_force.pipelines if rollout.route in in_force.routes else {}
        sides = ("canary",) if _is_promoted(rollout) else ("stable", "canary")
        gone = [rollout.spec[side] for side in sides if rollout.spec[side] not in known]
        if not known or not gone:
            self._gone_since.pop(rollout.id, None)
            return []
        since = self._gone_since.setdefault(rollout.id, time.monotonic())
        return gone if time.monotonic() - since > _GONE_S else []

    def _variants(self, rollout: Rollout) -> tuple[str, ...]:
        known = self._in_force().pipelines.get(rollout.spec["canary"])
        return known if known is not None else tuple(rollout.state.get("variants", ()))

    # ---- what operators ask

    async def start(self, body: Any, start_id: str, by: str) -> Reply:
        """Stores a rollout; the lease holder takes it up. The body is a rollout document. Sent again with the same
        `start_id`, which ends the rollout's id, it is the same rollout."""
        try:
            document = RolloutDocument.model_validate(body)
        except ValidationError as error:
            return Reply(error="invalid_request", message=explain(error, "rollout"))
        try:
            await self._read_splits()
        except StoreError as error:
            return Reply(error="unavailable", message=str(error))
        problem = self._cannot_start(document)
        if problem:
            return Reply(error="conflict", message=problem)
        deployed = self._in_force()
        state = {**State(since=time.time()).to_json(), "variants": list(deployed.pipelines[document.canary])}
        rollout = Rollout(
            # Ids stand in paths, and are names of the store's.
            id=f"{document.route.replace('/', '-')[:60]}-{start_id}",
            route=document.route,
            spec=document.model_dump(mode="json", exclude_none=True),
            state=state,
        )
        begun = Transition("none", "pending", f"started by {by}" if by else "started")
        return await self._replied(lambda: self.show_stored(self.store.create(rollout, begun)))

    def _cannot_start(self, document: RolloutDocument) -> str:
        deployed = self._in_force()
        if not deployed.pipelines:
            return "no gateway has said yet what it serves: none is up, or its user_config.rollout isn't set"
        if document.route not in deployed.routes:
            return f"route is {document.route!r}, which no gateway has; {_known(document.route, deployed.routes)}"
        for side in ("stable", "canary"):
            name = getattr(document, side)
            if name not in deployed.pipelines:
                return (
                    f"{side} is {name!r}, which is no pipeline of any gateway; "
                    f"{_known(name, deployed.pipelines)}. Add it under pipelines in the gateway's user_config, "
                    "and its variants as applications, then: serve deploy FILE"
                )
        splits = self._splits.by_route.get(document.route, ())
        promoted = [split for split in splits if not split.live]
        serving = {place(promoted, name, None)[0] for name in deployed.routes[document.route]}
        if document.stable not in serving:
            return (
                f"stable is {document.stable!r}, which gets no calls of route {document.route!r}; "
                f"those go to {', '.join(sorted(serving))}"
            )
        return ""

    async def act(self, rollout_id: str, action: Action, command_id: str, by: str) -> Reply:
        """Queues the command and waits until the lease holder has settled it. Sent again with the same
        `command_id`, it is the same command."""
        order = Command(rollout_id, command_id, action, {"by": by} if by else {})

        def stored() -> Command | None:
            return next((c for c in self.store.commands(rollout_id) if c.id == command_id), None)

        def queue() -> dict[str, Any]:
            rollout = self.store.get(rollout_id)
            if stored() is None:
                # Refused at once where the state says so already; the lease holder has the last word.
                command(*_parts(rollout), action, time.time())
                self._check_undo(rollout, action)
                self.store.add_command(order)
            return {}

        queued = await self._replied(queue)
        if queued.error:
            return queued
        give_up_at = time.monotonic() + _COMMAND_LIMIT_S
        while time.monotonic() < give_up_at:
            try:
                done = await asyncio.to_thread(stored)
            except StoreError as error:
                return Reply(error="unavailable", message=str(error))
            if done is not None and done.status == "refused":
                return Reply(error="conflict", message=done.reason)
            if done is not None and done.status == "applied":
                return await self.show(rollout_id)
            await asyncio.sleep(0.1)
        return Reply(
            error="unavailable",
            message=f"no controller has taken up {action} within {_COMMAND_LIMIT_S:g} s; it waits in the store",
        )

    async def show(self, rollout_id: str) -> Reply:
        return await self._replied(lambda: self.show_stored(self.store.get(rollout_id)))

    async def recent(self, route: str | None) -> Reply:
        return await self._replied(
            lambda: {"rollouts": [self._brief(rollout) for rollout in self.store.recent(100, route)]}
        )

    async def history(self, rollout_id: str) -> Reply:
        def read() -> dict[str, Any]:
            self.store.get(rollout_id)
            return {"id": rollout_id, "history": [asdict(entry) for entry in self.store.history(rollout_id)]}

        return await self._replied(read)

    async def events(self, events: Sequence[Event]) -> Reply:
        reply = await self._replied(lambda: asdict(self.store.add_events(events)))
        live = any(split.live for splits in self._splits.by_route.values() for split in splits)
        if live and reply.body.get("unknown"):
            self._early.append((time.monotonic() + _EVENTS_AGAIN_S, events))
            while sum(len(waiting) for _, waiting in self._early) > _EVENTS_WAITING:
                self._early.popleft()
        return reply

    async def _count_early(self) -> None:
        """Events that may have come before their search, some in one go: what waits behind is for the next ticks.
        Those that were counted are not counted again."""
        due = list(takewhile(lambda waiting: waiting[0] <= time.monotonic(), self._early))
        batch: list[Event] = []
        while due and len(batch) < _EVENTS_AT_ONCE:
            batch += due.pop(0)[1]
            self._early.popleft()
        if not batch:
            return
        try:
            await asyncio.to_thread(self.store.add_events, batch)
        except StoreError:
            self._early.appendleft((0.0, batch))
            raise

    def show_stored(self, rollout: Rollout) -> dict[str, Any]:
        """Everything about a rollout: its document, state, figures of the window, verdicts."""
        document, state = _parts(rollout)
        canary, stable = self._looks.figures(rollout.id, state.window_from)
        clicked = clicks(self.store, rollout.id, document, state.clicks_from, time.time())
        return {
            **self._brief(rollout),
            "document": rollout.spec,
            "figures": {"canary": _summary(canary), "stable": _summary(stable)},
            "guards": [asdict(verdict) for verdict in judge(document.guards, canary, stable, clicked)],
            "streaks": state.streaks,
        }

    def _brief(self, rollout: Rollout) -> dict[str, Any]:
        document, state = _parts(rollout)
        return {
            "id": rollout.id,
            "route": rollout.route,
            "stable": document.stable,
            "canary": document.canary,
            "status": state.status,
            "state": describe(document, state),
            "step": state.step,
            "steps": len(document.steps),
            "weight": state.weight,
            "shadow": document.shadow,
            "since": state.since,
            "until": state.until,
            "created_at": rollout.created_at,
            "updated_at": rollout.updated_at,
        }

    async def _replied(self, read: Callable[[], dict[str, Any]]) -> Reply:
        try:
            return Reply(await asyncio.to_thread(read))
        except UnknownRolloutError as error:
            return Reply(error="not_found", message=str(error))
        except (RouteBusyError, ConflictError, RefusedError) as error:
            return Reply(error="conflict", message=str(error))
        except StoreUnavailable as error:
            return Reply(error="unavailable", message=str(error))


def _is_promoted(rollout: Rollout) -> bool:
    """And in force, if calls reach it."""
    return rollout.state.get("status") == "promoted" and not rollout.state.get("retired")


def _parts(rollout: Rollout) -> tuple[RolloutDocument, State]:
    return RolloutDocument.stored(rollout.spec), State.from_json(rollout.state)


def _split(rollout: Rollout, weight: float, live: State | None = None) -> Split:
    """`live`: the state of a rollout that is under way."""
    spec = rollout.spec
    named = (rollout.id, rollout.route, spec["stable"], spec["canary"], weight)
    if live is None:
        return Split(*named, live=False)
    return Split(*named, float(spec.get("shadow", 0)), since=live.window_from)


def _summary(figures: Figures) -> dict[str, Any]:
    mirror = figures.mirror
    return {
        "calls": figures.calls,
        "asked": figures.asked,
        "errors": figures.errors,
        "degraded": figures.not_whole,
        "p50_ms": figures.quantile_ms(0.5),
        "p95_ms": figures.quantile_ms(0.95),
        "mirrored": mirror.calls,
        "mirrored_errors": mirror.errors,
        "mirrored_degraded": mirror.degraded,
        "top1_agreement": mirror.top1 / mirror.pairs if mirror.pairs else None,
        "rbo": mirror.rbo_moments()[1] if mirror.pairs else None,
        "kendall_tau": mirror.tau_moments()[1] if mirror.tau_pairs else None,
    }


def _known(name: str, allowed: "dict[str, Any]") -> str:
    listed = f"known: {', '.join(sorted(allowed))}"
    return " ".join(filter(None, [closest(name, list(allowed)), listed]))
