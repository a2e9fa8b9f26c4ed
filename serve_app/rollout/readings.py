"""The figures that guards compare: canary's, stable's, what follows from both, and how sure that is. Pure.

`read(metric, canary, stable)` is all; `guards.py` judges what it gives. Click metrics are in `sequential.py`.
"""

import math
from collections import Counter
from dataclasses import dataclass

from serve_app.rollout.figures import SCORE_BINS, Figures
from serve_app.rollout.intervals import (
    chi_square_bound,
    least_difference,
    mean_bounds,
    quantile_ranks,
    wilson,
)


@dataclass(frozen=True, slots=True)
class Reading:
    """`value` is what the threshold is for, and `at_best` the best it is in truth but for one look in 2,000.
    Where there are no samples, all figures are None."""

    value: float | None
    at_best: float | None
    canary: float | None
    stable: float | None
    canary_samples: int
    stable_samples: int
    text: str


def read(metric: str, canary: Figures, stable: Figures) -> Reading:
    """The reading of a metric other than those of clicks; of rates, over users' calls."""
    match metric:
        case "error_rate":
            return _rate("calls failed", canary.errors, canary.asked, stable.errors, stable.asked)
        case "degraded_rate":
            what = "calls were degraded or late"
            return _rate(what, canary.not_whole, canary.asked, stable.not_whole, stable.asked)
        case "latency_p50_ratio":
            return _latency(0.5, canary, stable)
        case "latency_p95_ratio":
            return _latency(0.95, canary, stable)
        case "top1_agreement":
            return _top1(canary)
        case "rbo":
            return _mean("rank-biased overlap at 10", *canary.mirror.rbo_moments())
        case "kendall_tau":
            return _mean("Kendall's tau", *canary.mirror.tau_moments())
        case "score_drift":
            return _drift(canary, stable)
    raise ValueError(f"{metric!r} can't be read from figures")


def read_mirrored(metric: str, canary: Figures, stable: Figures) -> Reading | None:
    """The rates over mirrored calls, so that no user need meet a canary that raises. They have more time than
    users' calls and are dropped where the canary is busy, so that the two are not added up. None of other metrics,
    and where nothing was mirrored."""
    mirror = canary.mirror
    if not mirror.calls:
        return None
    match metric:
        case "error_rate":
            # On a mirrored call nobody hangs up.
            errors, asked = stable.errors - stable.hung_up, stable.asked - stable.hung_up
            return _rate("mirrored calls failed", mirror.errors, mirror.calls, errors, asked)
        case "degraded_rate":
            what = "mirrored calls were degraded"
            return _rate(what, mirror.degraded, mirror.calls, stable.degraded, stable.asked)
    return None


def _rate(what: str, k_c: int, n_c: int, k_s: int, n_s: int) -> Reading:
    text = f"on the canary {_share(k_c, n_c)} {what}, on stable {_share(k_s, n_s)}"
    if not n_c or not n_s:
        return Reading(None, None, _ratio(k_c, n_c), _ratio(k_s, n_s), n_c, n_s, text)
    p_c, p_s = k_c / n_c, k_s / n_s
    at_best = least_difference(p_c, wilson(k_c, n_c)[0], p_s, wilson(k_s, n_s)[1])
    return Reading(p_c - p_s, at_best, p_c, p_s, n_c, n_s, text)


def _latency(q: float, canary: Figures, stable: Figures) -> Reading:
    n_c, n_s = canary.answered, stable.answered
    on_canary, on_stable = canary.quantile_ms(q), stable.quantile_ms(q)
    text = (
        f"p{q * 100:.0f} is {_ms(on_canary)} on the canary ({n_c:,} answered calls) and {_ms(on_stable)} on stable"
    )
    text += f" ({n_s:,})"
    if on_canary is None or on_stable is None:
        return Reading(None, None, on_canary, on_stable, n_c, n_s, text)
    ratio = on_canary / on_stable
    low = canary.latency_at(quantile_ranks(q, n_c)[0])
    high = stable.latency_at(quantile_ranks(q, n_s)[1])
    at_best = 0.0
    if low is not None and high is not None:
        logs = [math.log(value) for value in (on_canary, low, on_stable, high)]
        at_best = math.exp(least_difference(*logs))
    return Reading(ratio, at_best, on_canary, on_stable, n_c, n_s, f"{text}, a ratio of {ratio:.2f}")


def _top1(canary: Figures) -> Reading:
    k, n = canary.mirror.top1, canary.mirror.pairs
    text = f"{_share(k, n)} of the mirrored calls have the same document first"
    if not n:
        return Reading(None, None, None, None, n, n, text)
    return Reading(k / n, wilson(k, n)[1], k / n, None, n, n, text)


def _mean(what: str, n: int, mean: float, variance: float) -> Reading:
    if not n:
        return Reading(None, None, None, None, n, n, f"{what} has been taken of no mirrored call")
    text = f"{what} is {mean:.2f} on average over {n:,} mirrored calls"
    return Reading(mean, mean_bounds(n, mean, variance)[1], mean, None, n, n, text)


def _drift(canary: Figures, stable: Figures) -> Reading:
    """Jensen-Shannon distance of the scores, base 2 (Endres, Schindelin, IEEE Trans. Inf. Theory 49, 2003).

    Of two samples of one distribution, 8 ln 2 / (1/n + 1/m) times its square is about chi-square. It is a
    metric, so what noise explains may be subtracted. n and m are calls, not scores: those of a call go together.
    """
    n_c, n_s = canary.scored, stable.scored
    middle_c, middle_s = _middle(canary.scores), _middle(stable.scores)
    if not n_c or not n_s:
        text = f"{n_c:,} calls of the canary and {n_s:,} of stable have scores"
        return Reading(None, None, middle_c, middle_s, n_c, n_s, text)
    distance = _distance(canary.scores, stable.scores)
    freedom = len(canary.scores.keys() | stable.scores.keys()) - 1
    noise = math.sqrt((1 / n_c + 1 / n_s) * chi_square_bound(freedom) / (8 * math.log(2)))
    text = (
        f"the distance between the scores of {n_c:,} calls of the canary and {n_s:,} of stable is {distance:.3f} "
        f"(mean scores {middle_c:.2f} and {middle_s:.2f})"
    )
    return Reading(distance, max(0.0, distance - noise), middle_c, middle_s, n_c, n_s, text)


def _distance(a: Counter[int], b: Counter[int]) -> float:
    n_a, n_b = a.total(), b.total()
    divergence = 0.0
    for i in a.keys() | b.keys():
        p, q = a[i] / n_a, b[i] / n_b
        for part in (p, q):
            if part:
                divergence += part / 2 * math.log2(2 * part / (p + q))
    return math.sqrt(min(1.0, max(0.0, divergence)))


def _middle(scores: Counter[int]) -> float | None:
    """The mean score, as far as bins tell."""
    total = scores.total()
    return sum((i + 0.5) * n for i, n in scores.items()) / total / SCORE_BINS if total else None


def _ratio(k: int, n: int) -> float | None:
    return k / n if n else None


def _share(k: int, n: int) -> str:
    return f"{k:,} of {n:,}" + (f" ({k / n:.1%})" if n else "")


def _ms(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.3g} ms" if value < 1000 else f"{value / 1000:,.3g} s"
