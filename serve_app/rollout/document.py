"""The rollout document: what a user writes to move a route's traffic from one pipeline to another.

`parse(text)` reads YAML or JSON; `RolloutDocument.model_validate` takes what is parsed already, and
`model_dump(mode="json")` gives the document back with every default filled in. `route`, `stable` and `canary` are
enough:

    route: default
    stable: small
    canary: cascade
    shadow: 0.1                       # a tenth of the calls is mirrored to the canary, answers discarded
    steps:
      - analysis: {timeout_s: 600}    # before the first weight only mirrored calls are judged
      - set_weight: 10
      - pause: {duration_s: 300}
      - analysis: {}
      - pause: {}                     # until resumed
    guards:                           # in place of the default ones
      error_rate: {threshold: 0.01}
      degraded_rate: {}               # without it, one whose reranker raises on searches is not noticed
      rbo: {}
    on_success: promote
    on_failure: rollback

The end of the steps is success. `promote` then gives the canary the whole route, whatever the last weight was,
so that a last `set_weight: 100` is only needed for something to come after it, such as a pause; `hold` leaves
the weight and waits.
"""

from typing import Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from serve_app import strictyaml
from serve_app.config import Block, Name, RouteName, closest, explain
from serve_app.rollout.guards import METRICS, Guard, MetricName, default_guard

_WEIGHTS = (5, 25, 50, 100)
_DEFAULT_GUARDS: tuple[MetricName, ...] = (
    "error_rate",
    "degraded_rate",
    "latency_p50_ratio",
    "latency_p95_ratio",
)
_DEFAULT_MIRROR_GUARDS: tuple[MetricName, ...] = ("rbo", "kendall_tau")
# What mirrored calls alone give samples for.
_MIRRORED = (
    "error_rate",
    "degraded_rate",
    *(name for name, metric in METRICS.items() if metric.source == "mirror"),
)


# The context of documents that were accepted once, maybe by a version that allowed more.
_STORED = {"stored": True}


class Pause(Block):
    # None: until resumed.
    duration_s: float | None = Field(default=None, gt=0, allow_inf_nan=False, strict=True)


class Analysis(Block):
    """Waits until every guard passes. After `timeout_s` without that the rollout is inconclusive."""

    timeout_s: float = Field(default=1800, gt=0, allow_inf_nan=False, strict=True)


class Step(Block):
    """One of the three; `kind` says which."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})

    # Percent of the route's calls that the canary gets.
    set_weight: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False, strict=True)
    pause: Pause | None = None
    analysis: Analysis | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_one_key(cls, step: Any) -> Any:
        """`- analysis:` and `- pause:` with nothing behind them are null in YAML, and mean their defaults."""
        if isinstance(step, cls):
            return step
        if not isinstance(step, dict) or len(step) != 1 or next(iter(step)) not in cls.model_fields:
            raise ValueError(
                f"a step is one of set_weight, pause and analysis, as a mapping of one key, not {step!r}"
            )
        ((kind, value),) = step.items()
        if kind == "set_weight" and value is None:
            raise ValueError("set_weight is null; allowed: 0 to 100")
        return {kind: {} if value is None else value}

    @model_serializer
    def _one_key(self) -> dict[str, Any]:
        return {self.kind: getattr(self, self.kind)}

    @property
    def kind(self) -> Literal["set_weight", "pause", "analysis"]:
        if self.set_weight is not None:
            return "set_weight"
        return "pause" if self.pause is not None else "analysis"


class RolloutDocument(Block):
    """Moves `route` from the pipeline `stable` to the pipeline `canary`."""

    route: RouteName
    stable: Name
    canary: Name
    # Part of the calls that stable answers which the canary gets a copy of.
    shadow: float = Field(default=0, ge=0, le=1, allow_inf_nan=False, strict=True)
    # Both are filled in below.
    steps: tuple[Step, ...] = Field(default_factory=tuple, min_length=1, max_length=100)
    guards: dict[MetricName, Guard] = Field(default_factory=dict)
    # promote: the canary gets the route. hold: the weight stays as it is until promoted by hand.
    on_success: Literal["promote", "hold"] = "promote"
    # rollback: stable gets everything. pause: the weight stays as it is until somebody decides.
    on_failure: Literal["rollback", "pause"] = "rollback"

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, document: Any) -> Any:
        if not isinstance(document, dict):
            return document
        shadow = document.get("shadow", 0) != 0
        guards = document.get("guards", _DEFAULT_GUARDS + (_DEFAULT_MIRROR_GUARDS if shadow else ()))
        first = shadow and isinstance(guards, dict | tuple) and any(name in _MIRRORED for name in guards)
        if isinstance(guards, tuple):
            guards = dict.fromkeys(guards)
        return {"steps": _default_steps(first), **document, "guards": guards}

    @field_validator("guards", mode="before")
    @classmethod
    def _metric_defaults(cls, guards: Any) -> Any:
        """What a guard leaves out is its metric's."""
        if not isinstance(guards, dict):
            raise ValueError(f"is a {type(guards).__name__}; allowed: a mapping of metrics to their settings")
        filled = {}
        for metric, guard in guards.items():
            if metric not in METRICS:
                known = ", ".join(METRICS)
                raise ValueError(f"{metric!r} is no metric; {closest(str(metric), list(METRICS))} known: {known}")
            if isinstance(guard, dict | None):
                guard = default_guard(metric).model_dump(exclude_none=True) | (guard or {})
            filled[metric] = guard
        return filled

    @field_validator("guards")
    @classmethod
    def _guards_fit_their_metrics(
        cls, guards: dict[MetricName, Guard], info: ValidationInfo
    ) -> dict[MetricName, Guard]:
        for name, guard in guards.items():
            metric = METRICS[name]
            if not metric.low <= guard.threshold <= metric.high:
                raise ValueError(
                    f"{name}.threshold is {guard.threshold:g} ({metric.allowed}); "
                    f"allowed: {metric.low:g} to {metric.high:g}"
                )
            if (guard.alpha is None) == (metric.source == "clicks"):
                raise ValueError(f"{name}.alpha is {guard.alpha}; ctr_at_1 and click_mrr have one, others none")
            if guard.min_samples < metric.fewest and info.context != _STORED:
                raise ValueError(
                    f"{name}.min_samples is {guard.min_samples}; allowed: {metric.fewest} and more, "
                    "because noise can't be told from fewer"
                )
        return guards

    @model_validator(mode="after")
    def _makes_sense(self) -> "RolloutDocument":
        if self.canary == self.stable:
            raise ValueError(f"canary and stable are both {self.canary!r}; allowed: two pipelines")
        for name in self.guards:
            if METRICS[name].source == "mirror" and not self.shadow:
                raise ValueError(f"guards.{name} needs mirrored calls, but shadow is 0; allowed: shadow above 0")
        weight = 0.0
        for i, step in enumerate(self.steps):
            if step.set_weight is not None:
                if step.set_weight < weight:
                    raise ValueError(
                        f"steps[{i}].set_weight is {step.set_weight:g} after {weight:g}; "
                        f"allowed: {weight:g} to 100"
                    )
                weight = step.set_weight
            elif step.analysis is not None:
                self._can_be_judged(i, weight)
        return self

    @classmethod
    def stored(cls, spec: dict[str, Any]) -> "RolloutDocument":
        """One that a rollout was started with."""
        return cls.model_validate(spec, context=_STORED)

    def _can_be_judged(self, i: int, weight: float) -> None:
        where = f"steps[{i}] is an analysis at weight {weight:g}"
        if weight == 100:
            raise ValueError(f"{where}, where stable gets no calls to compare with; allowed: below 100")
        if not self.guards:
            raise ValueError(f"{where}, but guards is empty")
        if not self.guards_at(weight):
            raise ValueError(
                f"{where}, but without users' calls none of guards can be judged; "
                f"allowed: a set_weight above 0 before it, or shadow above 0 and one of {', '.join(_MIRRORED)}"
            )

    def guards_at(self, weight: float) -> dict[MetricName, Guard]:
        """The guards that get samples at a canary's weight in percent: without users' calls those that mirrored
        calls serve, without stable's calls none."""
        if weight >= 100:
            return {}
        if weight > 0:
            return dict(self.guards)
        return {name: guard for name, guard in self.guards.items() if self.shadow and name in _MIRRORED}


def parse(text: str) -> RolloutDocument:
    """A document in YAML, of which JSON is a part. Raises ValueError with every problem on a line of its own."""
    try:
        raw = strictyaml.parse(text)
    except strictyaml.YamlError as error:
        raise ValueError(error.within("rollout")) from None
    try:
        return RolloutDocument.model_validate(raw)
    except ValidationError as error:
        raise ValueError(explain(error, "rollout")) from None


def _default_steps(mirror_first: bool) -> list[dict[str, Any]]:
    """An analysis before every weight; before the first only where there are mirrored calls to judge."""
    steps: list[dict[str, Any]] = [{"analysis": {}}] if mirror_first else []
    for weight in _WEIGHTS[:-1]:
        steps += [{"set_weight": weight}, {"analysis": {}}]
    return [*steps, {"set_weight": _WEIGHTS[-1]}]
