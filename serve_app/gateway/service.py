"""What the gateway does for a call, whatever dialect it came in: run its plan, and fall back where it can."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Literal

from pydantic import ValidationError

from serve_app import __version__
from serve_app.config import GatewaySettings, Stage, explain
from serve_app.gateway import lexical
from serve_app.gateway.canary import SHOWN, CanaryFailedError, answer
from serve_app.gateway.deadline import Deadline
from serve_app.gateway.errors import ApiError
from serve_app.gateway.fleet import Fleet, all_or_none
from serve_app.gateway.fusion import best_first
from serve_app.gateway.keys import Keys
from serve_app.gateway.limits import check_documents, check_query, is_blank, limit
from serve_app.gateway.pipeline import Ranking, Scorer, StageFailure, StageReport, run
from serve_app.gateway.plan import Call, effective_weights, pipeline_plan, variants_in_use
from serve_app.gateway.recalling import Recalled, Recalling
from serve_app.gateway.rollouts import Rollouts
from serve_app.gateway.scoring import Scoring
from serve_app.gateway.scripts import foreign_letter
from serve_app.recall.messages import Candidate, RecallRequest
from serve_app.reranker.messages import PromptTooLongError, ScoreRequest, ScoreResult

logger = logging.getLogger("ray.serve")

# Blank documents are put this much below the worst of the others.
_BELOW = 1e-6
# What is asked of a gateway, each kind with places of its own: events that wait for the rollout application keep
# no search out, and searches no operator who would relieve them.
Kind = Literal["calls", "operators", "events", "fleet"]
# Places of each kind but `calls`, which have limits.max_concurrent_calls.
_BESIDE_CALLS = 32
# Queries of one score call that are under way at once.
_QUERIES_AT_ONCE = 8
# How often a score call asks for what came of another revision than the rest.
_REVISION_TRIES = 4
# What BM25 in place of a model is waited for at least, also where the deadline is near: what the longest call
# takes (lexical.py), unless others are before it.
_LEXICAL_LEAST_S = 0.25
_NO_MEMORY = "user_config.cache.max_bytes: this machine hasn't so much memory"
# Engines take lower numbers first.
_MIRRORED_PRIORITY = 10


class Service:
    """Answers calls from the settings in force; these are swapped whole, and a call keeps those it began with."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.keys = Keys()
        # The gateway's own, whose replicas share a key's rate.
        self.application: str | None = None
        self.rollouts = Rollouts(fleet.ask)
        self.recalling = Recalling(fleet)
        self.scoring = Scoring(fleet)
        self._settings: GatewaySettings | None = None
        # What is wrong with settings that were refused while older ones stay in force.
        self.settings_error: str | None = None
        self._under_way: Counter[Kind] = Counter()
        # One call's after the other: they hold the interpreter's lock, and what waits too long isn't begun.
        self._lexical = ThreadPoolExecutor(1, "bm25")

    @property
    def settings(self) -> GatewaySettings:
        if self._settings is None:
            raise ApiError(
                "unavailable", "the gateway has no settings: its user_config is missing", retry_after_s=5
            )
        return self._settings

    def configure(self, user_config: dict[str, Any]) -> None:
        """Puts `user_config` in force. Raises ValueError for bad settings, unless there are older ones: then
        these go on, and `settings_error` says what is wrong."""
        try:
            settings = GatewaySettings.model_validate(user_config)
            # First what may fail: for memory.
            self.scoring.configure(settings.cache)
        except (ValidationError, MemoryError) as error:
            message = explain(error, "user_config") if isinstance(error, ValidationError) else _NO_MEMORY
            if self._settings is None:
                raise ValueError(message) from None
            logger.error("settings refused, the old ones stay in force:\n%s", message)
            self.settings_error = message
            return
        self.recalling.configure(settings.cache)
        self._settings, self.settings_error = settings, None

    def enter(self, kind: Kind = "calls") -> None:
        """Counts a call in; raises ApiError when too many of its kind are under way. Every call that entered must
        leave."""
        under_way, limits = self._under_way[kind], self.settings.limits
        allowed = limits.max_concurrent_calls if kind == "calls" else _BESIDE_CALLS
        if under_way >= allowed:
            what = "limits.max_concurrent_calls is" if kind == "calls" else f"allowed for {kind}:"
            message = f"{under_way} calls are under way; {what} {allowed}"
            raise ApiError("too_many_requests", message, retry_after_s=1)
        self._under_way[kind] += 1

    def leave(self, kind: Kind = "calls") -> None:
        self._under_way[kind] -= 1

    def _spend(self, call: Call, pairs: int) -> None:
        """Counts `pairs` against the rate of the call's key, after all that may refuse it. Raises ApiError."""
        gateways = self.fleet.running(self.application, "Gateway") if self.application else None
        self.keys.spend(call.key, pairs, gateways or 1)

    async def search(
        self, call: Call, query: str, *, recall_k: int | None, top_n: int, rerank: bool
    ) -> tuple[Call, list[Candidate], Ranking]:
        """Recall, then the plan's stages over what it found. The call that comes back is the one that was
        answered: stable's where a canary failed. Raises ApiError where recall fails."""
        settings = call.settings
        check_query(settings, query)
        if settings.recall is None:
            raise ApiError("not_found", "this fleet has no catalogue (user_config.recall is not set)")
        limit(settings, "max_recall_k", recall_k or 0, "recall_k")
        limit(settings, "max_recall_k", top_n, "top_n")
        reranked = rerank and call.plan.stages
        self._spend(call, max(recall_k or call.plan.recall_k, top_n) if reranked else 1)
        if not rerank:
            # BM25's order is no answer of the canary's.
            call = replace(call, plan=replace(call.plan, place=None))
        # What was recalled for the canary serves stable too, and the mirrored copy.
        recalled: dict[int, Recalled] = {}

        async def attempt(call: Call) -> tuple[list[Candidate], Ranking]:
            k = max(recall_k or call.plan.recall_k, top_n)
            if k not in recalled:
                recalled[k] = await self._recall(call, query, k)
            candidates = recalled[k].candidates
            ranking = await self._rank(
                call,
                call.plan.stages if rerank else (),
                query,
                [_text(candidate) for candidate in candidates],
                [candidate.score for candidate in candidates],
            )
            ranking.reports.insert(
                0, StageReport("recall", took_ms=recalled[k].took_ms, cached=recalled[k].cached)
            )
            return candidates, ranking

        def order(found: tuple[list[Candidate], Ranking]) -> list[str]:
            candidates, ranking = found
            return [candidates[position].id for position in ranking.order[:SHOWN]]

        call, (candidates, ranking) = await answer(
            self.rollouts,
            call,
            attempt,
            ranking_of=lambda found: found[1],
            order_of=order,
            searched=True,
            question=query,
        )
        return call, candidates, ranking

    async def rerank(
        self, call: Call, query: str, documents: list[str], param: str = "documents"
    ) -> tuple[Call, Ranking]:
        """The plan's stages over the caller's documents, which the dialect calls `param`; BM25 over them where no
        stage could answer. The call that comes back is the one that was answered."""
        check_query(call.settings, query)
        check_documents(call.settings, documents, param)
        self._spend(call, len(documents))

        async def attempt(call: Call) -> Ranking:
            return await self._rank(call, call.plan.stages, query, documents, None)

        return await answer(
            self.rollouts,
            call,
            attempt,
            ranking_of=lambda ranking: ranking,
            order_of=lambda ranking: ranking.order[:SHOWN],
            searched=False,
            question=(query, *documents),
        )

    async def _recall(self, call: Call, query: str, k: int) -> Recalled:
        assert call.settings.recall is not None
        request = RecallRequest(query, k, call.request_id, call.deadline.remaining_s())
        try:
            return await self.recalling.recall(call.settings.recall, request, fresh=call.fresh)
        except StageFailure as failure:
            raise _nothing_possible(failure) from failure

    async def score(
        self, call: Call, pairs: Sequence[tuple[str, str]], params: tuple[str, str]
    ) -> tuple[Call, Ranking]:
        """The last stage's score of every (query, document) pair, as a ranking, and the call that was answered.
        The call's plan must have a stage; the dialect calls the two sides `params`. BM25 is no stand-in here: a
        score is a model's number or an error, as for queries that the stage would skip."""
        left, right = params
        check_documents(call.settings, [document for _, document in pairs], right)
        positions_of: dict[str, list[int]] = {}
        for position, (query, document) in enumerate(pairs):
            if is_blank(document):
                param = f"{right}[{position}]"
                raise ApiError("invalid_request", f"{param} is blank", param=param)
            positions_of.setdefault(query, []).append(position)
        for query in positions_of:
            check_query(call.settings, query, left)
        try:
            _check_scripts(call, positions_of, left)
        except ApiError:
            place = call.plan.place
            if place is None or not place.split.live or place.role == "stable":
                raise
            # What a canary can't read, stable may.
            stable = pipeline_plan(call.settings, place.split.stable, call.plan.route)
            _check_scripts(replace(call, plan=stable), positions_of, left)
        self._spend(call, len(pairs))

        async def attempt(call: Call) -> Ranking:
            _check_scripts(call, positions_of, left)
            return await self._score(call, pairs, positions_of, left)

        return await answer(
            self.rollouts,
            call,
            attempt,
            ranking_of=lambda ranking: ranking,
            order_of=lambda ranking: ranking.order[:SHOWN],
            searched=False,
            question=tuple(pairs),
        )

    async def _score(
        self, call: Call, pairs: Sequence[tuple[str, str]], positions_of: dict[str, list[int]], query_param: str
    ) -> Ranking:
        stage = call.plan.stages[-1]
        started = time.monotonic()
        scorer = self._scorer(call)
        places = asyncio.Semaphore(_QUERIES_AT_ONCE)
        answered: dict[str, ScoreResult] = {}
        results: list[ScoreResult] = []

        async def score(query: str, positions: list[int]) -> ScoreResult:
            async with places:
                documents = [pairs[p][1] for p in positions]
                return await scorer(stage, query, documents, call.deadline.remaining_s())

        try:
            for attempt in range(_REVISION_TRIES):
                if attempt:
                    # While a variant is replaced, queries may meet two revisions; what came last will be there.
                    ((kept, _),) = Counter(result.fingerprint for result in results).most_common(1)
                    answered = {query: result for query, result in answered.items() if result.fingerprint == kept}
                asked = {query: positions for query, positions in positions_of.items() if query not in answered}
                results = await all_or_none([score(query, positions) for query, positions in asked.items()])
                answered |= zip(asked, results, strict=True)
                if len({result.fingerprint for result in answered.values()}) == 1:
                    break
            else:
                # One that is served by unlike machines has two for good.
                what = "scores are of two revisions of"
                logger.warning("request %s: %s %s, which answer in turns", call.request_id, what, stage.variant)
        except StageFailure as failure:
            raise _nothing_possible(failure, query_param) from failure
        scores = [0.0] * len(pairs)
        report = StageReport(stage.variant, took_ms=(time.monotonic() - started) * 1e3)
        for query, positions in positions_of.items():
            result = answered[query]
            report.count(result)
            for position, value in zip(positions, result.scores, strict=True):
                scores[position] = value
        return Ranking(best_first(scores), scores, list(scores), [[] for _ in scores], [report])

    async def _rank(
        self,
        call: Call,
        stages: Sequence[Stage],
        query: str,
        documents: list[str],
        recall_scores: list[float] | None,
    ) -> Ranking:
        scorer = self._scorer(call)

        async def whole(stage: Stage, query: str, documents: list[str], timeout_s: float) -> ScoreResult:
            try:
                return await scorer(stage, query, documents, timeout_s)
            except StageFailure as failure:
                raise CanaryFailedError(failure.reason, degraded=True) from failure

        try:
            ranking = await run(
                stages,
                call.plan.fusion,
                query,
                documents,
                recall_scores,
                score=whole if call.whole else scorer,
                fallback_scores=lambda: self._lexical_scores(query, documents, call.deadline),
                skip=_skipper(call, query),
                deadline=call.deadline,
            )
        except StageFailure as failure:
            raise _nothing_possible(failure) from failure
        for report in ranking.reports:
            if report.failure is not None:
                logger.warning(
                    "request %s degraded: %s: %s", call.request_id, report.failure.reason, report.failure.detail
                )
        return ranking

    async def _lexical_scores(self, query: str, documents: list[str], deadline: Deadline) -> list[float]:
        """BM25's; 0 for all, which leaves them in the caller's order, where there is no time for that."""
        scoring = asyncio.get_running_loop().run_in_executor(self._lexical, _bounded_bm25, query, documents)
        try:
            async with asyncio.timeout(max(_LEXICAL_LEAST_S, deadline.remaining_s())):
                return await scoring
        except TimeoutError:
            return [-_BELOW if is_blank(document) else 0.0 for document in documents]

    def _scorer(self, call: Call) -> Scorer:
        async def score(stage: Stage, query: str, documents: list[str], timeout_s: float) -> ScoreResult:
            # Blank documents never reach a model; they are worth the least.
            written = [document for document in documents if not is_blank(document)]
            if not written:
                return ScoreResult([0.0] * len(documents), [], 0, 0, 0, "", 0.0)
            # The operator's bounds what a call costs; a client may ask for less.
            caps = [cap for cap in (call.max_tokens_per_doc, stage.max_tokens_per_doc) if cap is not None]
            request = ScoreRequest(
                query=query,
                documents=written,
                instruction=call.instruction or stage.instruction,
                max_tokens_per_doc=min(caps, default=None),
                request_id=call.request_id,
                priority=_MIRRORED_PRIORITY if call.mirrored else 0,
            )
            pairs_per_call = call.settings.variants[stage.variant].pairs_per_call
            try:
                result = await self.scoring.score(
                    stage.variant,
                    request,
                    pairs_per_call,
                    timeout_s,
                    mirrored=call.mirrored,
                    fresh=call.fresh,
                    patience=call.patience,
                )
            except PromptTooLongError as error:
                raise StageFailure("prompt_too_long", str(error)) from None
            if len(written) == len(documents):
                return result
            worst = min(0.0, *result.scores) - _BELOW
            scores = iter(result.scores)
            spread = [worst if is_blank(document) else next(scores) for document in documents]
            return replace(result, scores=spread)

        return score

    def models(self) -> dict[str, Any]:
        """Every name that `model` may have, in OpenAI's list shape."""
        settings = self.settings
        entries: list[dict[str, Any]] = []
        for name, route in settings.routes.items():
            effective = effective_weights(settings, name, self.rollouts.of(name))
            entries.append({"id": name, "kind": "route", "weights": route.weights, "effective_weights": effective})
        for name, pipeline in settings.pipelines.items():
            entries.append({"id": name, "kind": "pipeline", **pipeline.model_dump(mode="json", exclude_none=True)})
        for name in settings.variants:
            running = self.fleet.running(name, "Reranker")
            entries.append({"id": name, "kind": "variant", "running_replicas": running})
        # `model_type` is Xinference's.
        frame = {"object": "model", "created": 0, "owned_by": "serve-app", "model_type": "rerank"}
        return {"object": "list", "data": [{**frame, **entry} for entry in entries]}

    def info(self) -> dict[str, Any]:
        """What TEI's clients ask before their first call: Dify's takes batches of one where no size is said."""
        settings = self.settings
        return {
            "model_id": settings.default_route,
            "model_type": {"reranker": {}},
            "max_concurrent_requests": settings.limits.max_concurrent_calls,
            "max_client_batch_size": settings.limits.max_documents,
            "version": __version__,
        }

    def readiness(self) -> tuple[bool, dict[str, Any]]:
        """Whether calls can be answered, be it degraded: recall, where there is one, has a replica. And what each
        application has that a route's traffic needs; a sleeping or dead variant takes no gateway out."""
        settings = self.settings
        needed = [(settings.recall, "Recall")] if settings.recall else []
        needed += [(variant, "Reranker") for variant in sorted(variants_in_use(settings))]
        applications = {
            app: {"status": self.fleet.status(app), "running_replicas": self.fleet.running(app, deployment) or 0}
            for app, deployment in needed
        }
        ready = settings.recall is None or bool(self.fleet.running(settings.recall, "Recall"))
        body: dict[str, Any] = {"ready": ready, "applications": applications}
        if self.settings_error is not None:
            body["settings_error"] = self.settings_error
        if self.keys.problem is not None:
            body["keys_error"] = self.keys.problem
        return ready, body


def _skipper(call: Call, query: str) -> Callable[[Stage], str | None]:
    def skip(stage: Stage) -> str | None:
        scripts = () if call.plan.by_variant else call.settings.variants[stage.variant].scripts
        letter = foreign_letter(query, scripts)
        if letter is None:
            return None
        return f"the query has {letter!r}, and variants.{stage.variant}.scripts is [{', '.join(scripts)}]"

    return skip


def _check_scripts(call: Call, queries: Iterable[str], param: str) -> None:
    """Refuses queries that the stage which is to score them would skip. Raises ApiError."""
    for query in queries:
        if why := _skipper(call, query)(call.plan.stages[-1]):
            raise ApiError("invalid_request", why, param=param)


def _nothing_possible(failure: StageFailure, query_param: str = "query") -> ApiError:
    if failure.reason == "prompt_too_long":
        return ApiError("prompt_too_long", failure.detail, param=query_param)
    code = {"timeout": "deadline_exceeded", "overloaded": "overloaded"}.get(failure.reason, "unavailable")
    return ApiError(code, failure.detail, retry_after_s=failure.retry_after_s)


def _text(candidate: Candidate) -> str:
    """What a reranker reads of a recalled document."""
    return "\n".join(part for part in (candidate.title, candidate.text) if part)


def _bounded_bm25(query: str, documents: list[str]) -> list[float]:
    """BM25 squeezed into [0, 1), the range in which clients expect a relevance score; blank documents below."""
    scores = lexical.bm25(query, documents)
    return [
        -_BELOW if is_blank(document) else score / (1 + score)
        for score, document in zip(scores, documents, strict=True)
    ]
