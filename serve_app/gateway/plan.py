"""From the name a client gives to what will run. Pure."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from serve_app.config import Fusion, GatewaySettings, Stage
from serve_app.gateway.cache import Patience
from serve_app.gateway.deadline import Deadline
from serve_app.gateway.errors import ApiError
from serve_app.gateway.keys import Key
from serve_app.gateway.limits import limit
from serve_app.rollout.split import Place, Split, choose, place

# Recall depth where a client names a variant, which has no pipeline to say it.
_VARIANT_RECALL_K = 200


@dataclass(frozen=True, slots=True)
class Plan:
    """What a call will run. `route` and `pipeline` are names, None where the client went past them."""

    name: str
    route: str | None
    pipeline: str | None
    recall_k: int
    stages: tuple[Stage, ...] = ()
    fusion: Fusion | None = None
    # Where a rollout of the route put the call; None where none had a say.
    place: Place | None = None
    # Why this pipeline: the route's split, the client's wish, or because the canary gave no answer.
    why: Literal["split", "forced", "fallback"] = "split"

    @property
    def by_variant(self) -> bool:
        """The client named a variant: it is asked whatever the script of the query."""
        return self.pipeline is None


@dataclass(frozen=True, slots=True)
class Call:
    """A call's frame: which plan, until when, and what it changes for every stage.

    `settings` are those in force when it came, so that a call sees one set from beginning to end.
    """

    request_id: str
    # Whose rate pays for it; None where no keys are needed.
    key: Key | None
    settings: GatewaySettings
    plan: Plan
    deadline: Deadline
    started: float
    instruction: str | None = None
    max_tokens_per_doc: int | None = None
    # A copy of a call for the canary, whose answer nobody waits for.
    mirrored: bool = False
    # The canary's: what leaves something out is of no use, because stable answers in its place.
    whole: bool = False
    # Scores are to be computed, also where they are known.
    fresh: bool = False
    patience: Patience = field(default_factory=Patience)


def resolve(
    settings: GatewaySettings,
    model: str | None,
    route: str | None,
    user: str | None,
    splits: Callable[[str], Sequence[Split]] = lambda route: (),
    scoring: bool = False,
) -> Plan:
    """The plan for a route, pipeline or variant; the default route's when none is named. `splits` of a route are
    its rollouts'. `scoring`: only pipelines with a stage will do. Raises ApiError."""
    if route is not None:
        if model is not None:
            raise ApiError("invalid_request", "give model or route, not both", param="route")
        if route not in settings.routes:
            raise _unknown("route", route, settings.routes)
    name = route or model or settings.default_route
    if name in settings.routes:
        known = _known_splits(settings, splits(name))
        choice = _scoring_choice if scoring else _choice
        pipeline, placed = choice(settings, name, known, user)
        plan = pipeline_plan(settings, pipeline, route=name)
        return plan if placed is None else replace(plan, place=placed)
    if name in settings.pipelines:
        if scoring and not settings.pipelines[name].stages:
            raise ApiError("invalid_request", f"{name} has no rerank stage to score with", param="model")
        return replace(pipeline_plan(settings, name, route=None), why="forced")
    if name in settings.variants:
        recall_k = min(_VARIANT_RECALL_K, settings.limits.max_recall_k)
        return Plan(name, None, None, recall_k, (Stage(variant=name),), why="forced")
    raise _unknown("model", name, [*settings.routes, *settings.pipelines, *settings.variants])


def effective_weights(settings: GatewaySettings, route: str, splits: Sequence[Split]) -> dict[str, float]:
    """Percent of the route's calls that each pipeline answers, `splits` of its rollouts included."""
    weights = _moved(settings.routes[route].weights, _known_splits(settings, splits))
    total = sum(weights.values())
    return {pipeline: 100 * weight / total for pipeline, weight in weights.items()}


def timeout_ms(settings: GatewaySettings, plan: Plan, asked: int | None) -> int:
    """The call's deadline in ms: asked for, or the route's (the default route's where none was named)."""
    if asked is None:
        return settings.routes[plan.route or settings.default_route].timeout_ms
    limit(settings, "max_timeout_ms", asked, "timeout_ms")
    return asked


def variants_in_use(settings: GatewaySettings) -> set[str]:
    """Variants of the pipelines that some route sends traffic to."""
    return {
        stage.variant
        for route in settings.routes.values()
        for pipeline, weight in route.weights.items()
        if weight > 0
        for stage in settings.pipelines[pipeline].stages
    }


def pipeline_plan(settings: GatewaySettings, name: str, route: str | None) -> Plan:
    """The plan of the pipeline `name`, reached by `route`."""
    pipeline = settings.pipelines[name]
    return Plan(route or name, route, name, pipeline.recall_k, pipeline.stages, pipeline.fusion)


def _known_splits(settings: GatewaySettings, splits: Sequence[Split]) -> list[Split]:
    """A gateway whose settings are behind serves what it knows."""
    return [split for split in splits if split.canary in settings.pipelines]


def _choice(
    settings: GatewaySettings, route: str, splits: Sequence[Split], user: str | None
) -> tuple[str, Place | None]:
    return place(splits, choose(settings.routes[route].weights, user, salt=route), user)


def _scoring_choice(
    settings: GatewaySettings, route: str, splits: Sequence[Split], user: str | None
) -> tuple[str, Place | None]:
    """As `_choice`, among the pipelines that have a stage: a user whose pipeline has one stays there, the others
    are dealt out in proportion. Raises ApiError where there are none."""

    def scores(pipeline: str) -> bool:
        # A stable that this gateway doesn't know is nobody's choice.
        return pipeline in settings.pipelines and bool(settings.pipelines[pipeline].stages)

    pipeline, placed = _choice(settings, route, splits, user)
    if not scores(pipeline):
        # A canary that can't score is never tried.
        splits = [split for split in splits if scores(split.canary) or not scores(split.stable)]
        pipeline, placed = _choice(settings, route, splits, user)
    if not scores(pipeline):
        weights = _moved(settings.routes[route].weights, [split for split in splits if not scores(split.stable)])
        able = {name: weight for name, weight in weights.items() if weight > 0 and scores(name)}
        if not able:
            listed = ", ".join(name for name, weight in weights.items() if weight > 0)
            message = f"{route} has no pipeline with a rerank stage to score with; it has: {listed}"
            raise ApiError("invalid_request", message, param="model")
        pipeline, placed = place(splits, choose(able, user, salt=f"{route}\0score"), user)
    if placed is not None and not (scores(placed.split.stable) and scores(placed.split.canary)):
        # Where one side can't score, there is nothing to compare, to mirror to or to fall back to.
        placed = None
    return pipeline, placed


def _moved(weights: Mapping[str, float], splits: Sequence[Split]) -> dict[str, float]:
    """`weights` after what `splits`, oldest first, move from their stable to their canary."""
    moved = dict(weights)
    for split in splits:
        if split.stable in moved:
            kept = moved[split.stable] * (1 - min(split.weight, 100) / 100)
            moved[split.canary] = moved.get(split.canary, 0) + moved[split.stable] - kept
            moved[split.stable] = kept
    return moved


def _unknown(param: str, name: str, known: Iterable[str]) -> ApiError:
    listed = ", ".join(sorted(known))
    return ApiError("model_not_found", f"there is no {param} {name[:80]!r}; known: {listed}", param=param)
