"""Is the canary clicked less than stable? A test that may be looked at at any time, as often as one likes. Pure.

`fall(blocks, metric, margin, alpha)` takes the clicks of one block of time after the other, and
`running_evidence` is the arithmetic below it, on arrays. H0: in every block mean(canary) >= mean(stable) -
margin. For `ctr_at_1` a query is worth 1 if its first result was clicked; for `click_mrr` it is worth the
reciprocal rank of its topmost clicked result (max RR of Radlinski, Kurup, Joachims, CIKM 2008), else 0.

Method: an e-process of block-wise e-variables (Turner, Ly, Grünwald, "Generic E-variables for exact sequential
k-sample tests that allow for optional stopping", JSPI 230, 2024; linear nulls: Turner, Grünwald, "Exact
anytime-valid confidence intervals for contingency tables and beyond", 2023). A block of n_c and n_s queries and
an alternative (a_c, a_s) chosen before the block give

    E = prod f_c(y) over the canary's queries * prod f_s(y) over stable's,
    f_g(y) = y a_g / t_g + (1 - y) (1 - a_g) / (1 - t_g),

where (t_c, t_s) is the point of H0 with the smallest n_c KL(a_c, t_c) + n_s KL(a_s, t_s). E has an expectation
of at most 1 under H0 for every n_c, n_s: f_g is affine, so log E[E] is a concave function of the two means, 0 at
t, where its gradient is minus that of the KL sum, which by t's optimality points out of H0, a convex set. The
same holds for any values in [0, 1], not only for 0 and 1. So the running product is a test supermartingale, and
by Ville's inequality it ever reaches 1 / alpha with a probability of at most alpha; nothing is asymptotic.
Neither does traffic have to be split evenly or steadily, nor clicks to be as likely at noon as at midnight: only
what a block holds is compared with itself.

a_s is stable's mean over the blocks before, and products for several drops of a_c below it are averaged. In 2,000
simulated rollouts without a difference, looked at after each of 300 blocks, 2 to 3 % fire at alpha 0.05, and about
1 % with a margin of 0.01. With that margin, a fall of the click-through from 0.30 to 0.20 is found after 180 of
the canary's queries, at the median, where its share is 5 %, and after 390 where it is 50 %; to 0.25, 900 and
1,800.

What it takes for granted: given which side they are on, queries of one block are independent, and a block handed
in does not change any more (the clicks of the running minute may still be on their way).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from serve_app.rollout.figures import Clicks

ClickMetric = Literal["ctr_at_1", "click_mrr"]
Floats = NDArray[np.float64]

# What a query is worth, by the rank of its topmost clicked result; 0: none.
VALUES: dict[ClickMetric, Floats] = {
    "ctr_at_1": np.array([0.0, 1.0, *[0.0] * 9]),
    "click_mrr": np.array([0.0, *(1 / rank for rank in range(1, 11))]),
}
# Falls below what H0 allows that the test is made for, as parts of it; between them it loses little.
_DROPS = np.array([0.05, 0.1, 0.2, 0.35, 0.6, 0.9])
# Stable's queries that teach its mean before the first bet.
_LEARNT_FROM = 20


@dataclass(frozen=True, slots=True)
class Fall:
    """`p_value` is valid at every look: the smallest alpha at which the test would have fired by now."""

    fired: bool
    p_value: float
    canary: float | None
    stable: float | None
    canary_queries: int
    stable_queries: int


def fall(blocks: Sequence[tuple[Clicks, Clicks]], metric: ClickMetric, margin: float, alpha: float) -> Fall:
    """Whether the canary's mean is more than `margin` below stable's, at a false-alarm probability of at most
    `alpha` over all looks together. `blocks` are (canary, stable), oldest first, from the first one."""
    shape = (len(blocks), len(VALUES[metric]))
    canary = np.array([block[0].by_rank for block in blocks], dtype=np.float64).reshape(shape)
    stable = np.array([block[1].by_rank for block in blocks], dtype=np.float64).reshape(shape)
    evidence = running_evidence(canary, stable, VALUES[metric], margin)
    strongest = float(evidence.max(initial=0.0))
    return Fall(
        fired=strongest >= -math.log(alpha),
        p_value=math.exp(-strongest),
        canary=_mean(canary, VALUES[metric]),
        stable=_mean(stable, VALUES[metric]),
        canary_queries=int(canary.sum()),
        stable_queries=int(stable.sum()),
    )


def running_evidence(canary: Floats, stable: Floats, values: Floats, margin: float) -> Floats:
    """The logarithm of the e-process after every block: shape (..., blocks), from counts of shape
    (..., blocks, values). H0 is rejected at alpha once it reaches -log(alpha)."""
    n_c, n_s = canary.sum(-1), stable.sum(-1)
    before_n = np.cumsum(n_s, -1) - n_s
    total = stable @ values
    before_total = np.cumsum(total, -1) - total
    # Kept off 0 and 1, where a single query could bring everything down.
    a_s = np.clip((before_total + 0.5) / (before_n + 1), 0.005, 0.995)[..., None]
    allowed = a_s - margin
    a_c = np.clip(allowed * (1 - _DROPS), 1e-4, None)
    bets = (allowed > a_c) & ((before_n >= _LEARNT_FROM) & (n_c > 0) & (n_s > 0))[..., None]
    a_c = np.where(bets, a_c, a_s)
    t_s = _closest(a_c, a_s, n_c[..., None], n_s[..., None], np.where(bets, margin, 0.0))
    t_c = t_s - np.where(bets, margin, 0.0)
    logs = np.zeros(a_c.shape)
    for v, value in enumerate(values):
        logs += canary[..., v, None] * np.log(value * a_c / t_c + (1 - value) * (1 - a_c) / (1 - t_c))
        logs += stable[..., v, None] * np.log(value * a_s / t_s + (1 - value) * (1 - a_s) / (1 - t_s))
    products = np.cumsum(np.where(bets, logs, 0.0), -2)
    evidence: Floats = np.logaddexp.reduce(products, -1) - math.log(len(_DROPS))
    return evidence


def _closest(a_c: Floats, a_s: Floats, n_c: Floats, n_s: Floats, margin: Floats) -> Floats:
    """t_s of the point (t_s - margin, t_s) with the smallest n_c KL(a_c, t_c) + n_s KL(a_s, t_s), by bisection:
    the sum is convex, and its minimum lies between a_c + margin and a_s."""
    low, high = a_c + margin, np.broadcast_to(a_s, a_c.shape)
    for _ in range(30):
        t_s = (low + high) / 2
        t_c = t_s - margin
        slope = n_s * (t_s - a_s) / (t_s * (1 - t_s)) + n_c * (t_c - a_c) / (t_c * (1 - t_c))
        low, high = np.where(slope < 0, t_s, low), np.where(slope < 0, high, t_s)
    return (low + high) / 2


def _mean(counts: Floats, values: Floats) -> float | None:
    total = counts.sum()
    return float((counts @ values).sum() / total) if total else None
