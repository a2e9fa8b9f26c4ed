"""From the name a client gives to what will run. Pure."""

from collections.abc import Callable, Iterable, Sequence
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
) -> Plan:
    """The plan for a route, pipeline or variant; the default route's when none is named. `splits` of a route are
    its rollouts'. Raises ApiError."""
    if route is not None:
        if model is not None:
            raise ApiError("invalid_request", "give model or route, not both", param="route")
        if route not in settings.routes:
            raise _unknown("route", route, settings.routes)
    name = route or model or settings.default_route
    if name in settings.routes:
        chosen = choose(settings.routes[name].weights, user, salt=name)
        # A gateway whose settings are behind serves what it knows.
        known = [split for split in splits(name) if split.canary in settings.pipelines]
        pipeline, placed = place(known, chosen, user)
        plan = pipeline_plan(settings, pipeline, route=name)
        return plan if placed is None else replace(plan, place=placed)
    if name in settings.pipelines:
        return replace(pipeline_plan(settings, name, route=None), why="forced")
    if name in settings.variants:
        recall_k = min(_VARIANT_RECALL_K, settings.limits.max_recall_k)
        return Plan(name, None, None, recall_k, (Stage(variant=name),), why="forced")
    raise _unknown("model", name, [*settings.routes, *settings.pipelines, *settings.variants])


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


def _unknown(param: str, name: str, known: Iterable[str]) -> ApiError:
    listed = ", ".join(sorted(known))
    return ApiError("model_not_found", f"there is no {param} {name[:80]!r}; known: {listed}", param=param)
