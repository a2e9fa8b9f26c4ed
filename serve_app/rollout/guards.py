"""Whether a canary is worse than stable, metric by metric. Pure.

`judge(guards, canary, stable, clicks)` compares both over one window; `streaks` and `breached` count failures in
a row. `METRICS` says what each threshold means and its defaults; `default_guard(metric)` makes a guard of them.

A verdict is `fail` only where noise is no explanation: a bound on the difference, wrong in one of 2,000 looks
(`intervals.py`), is beyond the threshold. It is `pass` where there are enough samples and the figure itself
keeps the threshold, and `inconclusive` in between: more samples will tell. The click metrics have the test of
`sequential.py` instead, with its own alpha over all looks: they fail once it fires, and pass with enough samples
as long as it hasn't.

Windows should begin no earlier than the weight that is in force: earlier calls met another load.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ConfigDict, Field

from serve_app.config import Block
from serve_app.rollout.figures import Clicks, Figures
from serve_app.rollout.intervals import CONFIDENCE
from serve_app.rollout.readings import Reading, read, read_mirrored
from serve_app.rollout.sequential import ClickMetric, fall

MetricName = Literal[
    "error_rate",
    "degraded_rate",
    "latency_p50_ratio",
    "latency_p95_ratio",
    "top1_agreement",
    "rbo",
    "kendall_tau",
    "score_drift",
    "ctr_at_1",
    "click_mrr",
]
Outcome = Literal["pass", "fail", "inconclusive"]


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric's defaults. `allowed` says what the threshold means, which may be `low` to `high`; `source` is what
    has to be there for samples, of which `fewest` have to be asked for."""

    allowed: str
    threshold: float
    low: float
    high: float
    min_samples: int
    source: Literal["calls", "mirror", "clicks"] = "calls"
    fewest: int = 1


METRICS: dict[MetricName, Metric] = {
    "error_rate": Metric("canary minus stable, at most", 0.02, 0, 1, 20),
    "degraded_rate": Metric("canary minus stable, at most", 0.02, 0, 1, 20),
    "latency_p50_ratio": Metric("canary / stable, at most", 1.5, 1, 100, 30),
    "latency_p95_ratio": Metric("canary / stable, at most", 2.0, 1, 100, 50),
    # A better model orders differently; what these defaults catch is an order that has nothing to do with
    # stable's. Ten documents in random order: 0.1, 0.65 and 0; ten random ones of fifty: 0.02, 0.13 and 0.
    "top1_agreement": Metric("share of mirrored calls, at least", 0.25, 0, 1, 30, "mirror"),
    # Their noise is measured by how much calls differ, of which a few that happen to be alike say nothing.
    "rbo": Metric("mean over mirrored calls, at least", 0.4, 0, 1, 30, "mirror", fewest=10),
    "kendall_tau": Metric("mean over mirrored calls, at least", 0.2, -1, 1, 30, "mirror", fewest=10),
    # Jensen-Shannon. For canaries that should score as stable does: another build, GPU share or quantisation.
    "score_drift": Metric("distance, at most", 0.25, 0, 1, 100),
    "ctr_at_1": Metric("stable minus canary, at most", 0.01, 0, 1, 200, "clicks"),
    "click_mrr": Metric("stable minus canary, at most", 0.01, 0, 1, 200, "clicks"),
}


def _all_optional(schema: dict[str, Any]) -> None:
    """In a document a guard may leave out what its metric has a default for."""
    schema.pop("required", None)


class Guard(Block):
    """What is allowed, from how many samples a side on, and how many evaluations in a row may fail before it
    counts. `alpha` is a click metric's false-alarm probability over the whole rollout; others have none."""

    model_config = ConfigDict(json_schema_extra=_all_optional)

    threshold: float = Field(allow_inf_nan=False)
    min_samples: int = Field(ge=1)
    failure_limit: int = Field(ge=0)
    alpha: float | None = Field(default=None, gt=0, le=0.5)


@dataclass(frozen=True, slots=True)
class Verdict:
    """`value` is compared with `threshold`; it and the sides' figures are None where there are no samples.
    Latencies are in ms. `text` says it all in a sentence."""

    metric: MetricName
    outcome: Outcome
    value: float | None
    threshold: float
    canary: float | None
    stable: float | None
    canary_samples: int
    stable_samples: int
    min_samples: int
    text: str


def default_guard(metric: MetricName) -> Guard:
    defaults = METRICS[metric]
    # A hiccup ends; what the click test has found stays found.
    clicks = defaults.source == "clicks"
    return Guard(
        threshold=defaults.threshold,
        min_samples=defaults.min_samples,
        failure_limit=0 if clicks else 1,
        alpha=0.05 if clicks else None,
    )


def judge(
    guards: Mapping[MetricName, Guard],
    canary: Figures,
    stable: Figures,
    clicks: Sequence[tuple[Clicks, Clicks]] = (),
) -> list[Verdict]:
    """A verdict for every guard. `canary` and `stable` are of the same window; `clicks` are the (canary, stable)
    blocks of the whole rollout, oldest first, of which none changes any more."""
    return [
        _judge_clicks(metric, guard, clicks)
        if metric == "ctr_at_1" or metric == "click_mrr"
        else _judge_figures(metric, guard, canary, stable)
        for metric, guard in guards.items()
    ]


def streaks(
    before: Mapping[str, int], counted: Mapping[str, int], verdicts: Sequence[Verdict]
) -> tuple[dict[str, int], dict[str, int]]:
    """Failures in a row by metric, and over how many of the canary's samples each was `counted` last. A pass ends
    a row, an inconclusive look neither ends nor lengthens it; nor does one that has seen no more of the canary,
    however often it is taken."""
    after, counted = dict(before), dict(counted)
    for verdict in verdicts:
        if verdict.outcome == "fail" and counted.get(verdict.metric) != verdict.canary_samples:
            after[verdict.metric] = after.get(verdict.metric, 0) + 1
            counted[verdict.metric] = verdict.canary_samples
        elif verdict.outcome == "pass":
            after[verdict.metric] = 0
    return after, counted


def breached(guards: Mapping[MetricName, Guard], streaks: Mapping[str, int]) -> list[MetricName]:
    """The metrics that failed more often in a row than their guard lets them."""
    return [metric for metric, guard in guards.items() if streaks.get(metric, 0) > guard.failure_limit]


def _judge_figures(metric: MetricName, guard: Guard, canary: Figures, stable: Figures) -> Verdict:
    verdict = _judge_reading(metric, guard, read(metric, canary, stable))
    mirrored = read_mirrored(metric, canary, stable)
    if mirrored is None or verdict.outcome == "fail":
        return verdict
    # Mirrored calls decide while there are no others. Then they may only show that it fails.
    of_mirrored = _judge_reading(metric, guard, mirrored)
    return of_mirrored if not canary.asked or of_mirrored.outcome == "fail" else verdict


def _judge_reading(metric: MetricName, guard: Guard, reading: Reading) -> Verdict:
    value, at_best = reading.value, reading.at_best
    # Of agreement, little is bad; of everything else, much.
    sign = -1 if METRICS[metric].source == "mirror" else 1
    if value is None or at_best is None or _few(guard, reading):
        return _verdict(metric, guard, "inconclusive", reading, "")
    if sign * at_best > sign * guard.threshold:
        sure = f"{at_best:.3g} at best, with {CONFIDENCE} confidence"
        return _verdict(metric, guard, "fail", reading, sure)
    if sign * value > sign * guard.threshold:
        return _verdict(metric, guard, "inconclusive", reading, "which may be noise")
    return _verdict(metric, guard, "pass", reading, "")


def _judge_clicks(metric: ClickMetric, guard: Guard, clicks: Sequence[tuple[Clicks, Clicks]]) -> Verdict:
    found = fall(clicks, metric, guard.threshold, guard.alpha or 0.05)
    value = None if found.canary is None or found.stable is None else found.stable - found.canary
    what = "click-through at 1" if metric == "ctr_at_1" else "mean reciprocal rank of clicks"
    text = f"{what} is {_figure(found.canary)} on the canary ({found.canary_queries:,} queries) and "
    text += f"{_figure(found.stable)} on stable ({found.stable_queries:,} queries)"
    reading = Reading(value, None, found.canary, found.stable, found.canary_queries, found.stable_queries, text)
    if _few(guard, reading) or value is None:
        return _verdict(metric, guard, "inconclusive", reading, "")
    return _verdict(metric, guard, "fail" if found.fired else "pass", reading, f"p = {found.p_value:.2g}")


def _few(guard: Guard, reading: Reading) -> bool:
    return min(reading.canary_samples, reading.stable_samples) < guard.min_samples


def _verdict(metric: MetricName, guard: Guard, outcome: Outcome, reading: Reading, remark: str) -> Verdict:
    if _few(guard, reading):
        remark = f"{guard.min_samples:,} a side are needed"
    state = {"pass": "passes", "fail": "fails", "inconclusive": "is inconclusive"}[outcome]
    text = f"{metric} {state}: {reading.text}; allowed: {METRICS[metric].allowed} {guard.threshold:g}"
    return Verdict(
        metric=metric,
        outcome=outcome,
        value=reading.value,
        threshold=guard.threshold,
        canary=reading.canary,
        stable=reading.stable,
        canary_samples=reading.canary_samples,
        stable_samples=reading.stable_samples,
        min_samples=guard.min_samples,
        text=f"{text} ({remark})" if remark else text,
    )


def _figure(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"
