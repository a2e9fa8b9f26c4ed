"""What gateways count of a rollout, small, mergeable and free of I/O.

`Figures` are of one side in one stretch of time (`counters.py` keeps many); `Clicks` are counted by what reads
`/v1/events`. Everything is kept in whole numbers, so that merging is exact whatever its order.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from serve_app.rollout.agreement import DEPTH, Agreement

# Latencies are kept in bins of a constant ratio, and quantiles read from them are within 2 % of the exact ones
# (DDSketch: Masson, Rim, Lee, PVLDB 12(12), 2019).
RELATIVE_ERROR = 0.02
_GAMMA = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
_LOG_GAMMA = math.log(_GAMMA)
_MIN_LATENCY_MS = 0.01
SCORE_BINS = 20
# Sums of agreements are kept in millionths.
_MICRO = 1_000_000


@dataclass(slots=True)
class Mirror:
    """Calls mirrored to the canary; those that were dropped are not in it.

    `errors` of `calls` got no answer from the canary, `degraded` an incomplete one. The sums are over the other
    calls, in millionths; tau is undefined for some, so it has its own number of `tau_pairs`.
    """

    calls: int = 0
    errors: int = 0
    degraded: int = 0
    top1: int = 0
    rbo: int = 0
    rbo_squares: int = 0
    tau_pairs: int = 0
    tau: int = 0
    tau_squares: int = 0

    @property
    def pairs(self) -> int:
        """Calls that both sides answered in full."""
        return self.calls - self.errors - self.degraded

    def rbo_moments(self) -> tuple[int, float, float]:
        """Pairs, mean, and variance of one pair."""
        return _moments(self.pairs, self.rbo, self.rbo_squares)

    def tau_moments(self) -> tuple[int, float, float]:
        """Pairs with a tau, mean, and variance of one pair."""
        return _moments(self.tau_pairs, self.tau, self.tau_squares)


@dataclass(slots=True)
class Figures:
    """Calls of one side. `latency` and `scores` count by bin; `scored` calls brought scores. Latencies are of
    calls whose scores were all computed for them, or that had no stage to ask; `unasked` calls asked the side's
    models for none and could not fail by them (their scores were known, or there was nothing to score). `late`
    ones of stable came in full, but after the time that a canary has. Of the `errors`, `hung_up` are calls whose
    clients had waited long enough."""

    calls: int = 0
    errors: int = 0
    hung_up: int = 0
    degraded: int = 0
    late: int = 0
    unasked: int = 0
    scored: int = 0
    latency: Counter[int] = field(default_factory=Counter)
    scores: Counter[int] = field(default_factory=Counter)
    mirror: Mirror = field(default_factory=Mirror)

    def add(
        self,
        latency_ms: float | None,
        *,
        error: bool = False,
        hung_up: bool = False,
        degraded: bool = False,
        late: bool = False,
        unasked: bool = False,
        scores: Sequence[float] = (),
    ) -> None:
        """Counts a call. `scores` are its relevance scores, best first, of which the first ten count; what is
        outside [0, 1] goes to the nearest bin. An error's latency is left out: failing fast is no speed. So is
        one that says nothing of the side's models (None)."""
        self.calls += 1
        if error:
            self.errors += 1
            self.hung_up += hung_up
            return
        self.degraded += degraded
        self.late += late and not degraded
        self.unasked += unasked
        if latency_ms is not None:
            self.latency[math.ceil(math.log(max(latency_ms, _MIN_LATENCY_MS)) / _LOG_GAMMA)] += 1
        finite = [score for score in scores[:DEPTH] if math.isfinite(score)]
        self.scored += bool(finite)
        for score in finite:
            self.scores[min(SCORE_BINS - 1, max(0, int(score * SCORE_BINS)))] += 1

    def add_mirrored(self, agreement: Agreement | None, *, degraded: bool = False) -> None:
        """Counts a mirrored call on the canary's side; None: the canary failed it, or left something out."""
        mirror = self.mirror
        mirror.calls += 1
        if agreement is None:
            mirror.degraded += degraded
            mirror.errors += not degraded
            return
        mirror.top1 += agreement.top1
        mirror.rbo += round(agreement.rbo * _MICRO)
        mirror.rbo_squares += round(agreement.rbo**2 * _MICRO)
        if agreement.tau is not None:
            mirror.tau_pairs += 1
            mirror.tau += round(agreement.tau * _MICRO)
            mirror.tau_squares += round(agreement.tau**2 * _MICRO)

    @property
    def asked(self) -> int:
        """Calls that models could fail."""
        return self.calls - self.unasked

    @property
    def not_whole(self) -> int:
        """Answers that a canary would not have been let give: something is left out, or they came too late."""
        return self.degraded + self.late

    @property
    def answered(self) -> int:
        """Calls with a latency."""
        return self.latency.total()

    def latency_at(self, rank: int) -> float | None:
        """The `rank`-th smallest latency (from 1) in ms, within RELATIVE_ERROR; None where there is none."""
        if rank < 1:
            return None
        below = 0
        for i in sorted(self.latency):
            below += self.latency[i]
            if below >= rank:
                return float(2 * _GAMMA**i / (_GAMMA + 1))
        return None

    def quantile_ms(self, q: float) -> float | None:
        """The smallest latency that at least `q` of the answered calls don't exceed; None of no calls."""
        return self.latency_at(max(1, math.ceil(q * self.answered)))

    def merge(self, other: "Figures") -> "Figures":
        """Both together."""
        a, b = self.mirror, other.mirror
        return Figures(
            self.calls + other.calls,
            self.errors + other.errors,
            self.hung_up + other.hung_up,
            self.degraded + other.degraded,
            self.late + other.late,
            self.unasked + other.unasked,
            self.scored + other.scored,
            self.latency + other.latency,
            self.scores + other.scores,
            Mirror(**{name: getattr(a, name) + getattr(b, name) for name in _MIRROR_COUNTS}),
        )

    def to_json(self) -> dict[str, Any]:
        """Whole numbers only, without those that are 0; bins as pairs of bin and count."""
        data: dict[str, Any] = {name: value for name in _COUNTS if (value := getattr(self, name))}
        for name, bins in (("latency", self.latency), ("scores", self.scores)):
            if bins:
                data[name] = [[i, bins[i]] for i in sorted(bins)]
        mirror = {name: value for name in _MIRROR_COUNTS if (value := getattr(self.mirror, name))}
        return data | ({"mirror": mirror} if mirror else {})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Figures":
        """From what `to_json` gave. Raises ValueError for anything else."""
        try:
            return cls(
                calls=int(data.get("calls", 0)),
                errors=int(data.get("errors", 0)),
                hung_up=int(data.get("hung_up", 0)),
                degraded=int(data.get("degraded", 0)),
                late=int(data.get("late", 0)),
                unasked=int(data.get("unasked", 0)),
                scored=int(data.get("scored", 0)),
                latency=_bins(data.get("latency", ())),
                scores=_bins(data.get("scores", ())),
                mirror=Mirror(**{name: int(value) for name, value in data.get("mirror", {}).items()}),
            )
        except (AttributeError, TypeError) as error:
            raise ValueError(f"these are no figures: {error}") from None


_COUNTS = ("calls", "errors", "hung_up", "degraded", "late", "unasked", "scored")
_MIRROR_COUNTS = tuple(f.name for f in fields(Mirror))


@dataclass(slots=True)
class Clicks:
    """Queries that were shown, each counted once: under the rank (1 to 10) of its topmost clicked result, or
    under 0 where none of the first ten was clicked. `by_rank` has 11 numbers."""

    by_rank: list[int] = field(default_factory=lambda: [0] * (DEPTH + 1))

    @property
    def queries(self) -> int:
        return sum(self.by_rank)


def _bins(pairs: Iterable[Sequence[int]]) -> Counter[int]:
    return Counter({int(i): int(n) for i, n in pairs})


def _moments(n: int, total: int, squares: int) -> tuple[int, float, float]:
    if n == 0:
        return 0, 0.0, 0.0
    mean = total / n / _MICRO
    # Sums of rounded numbers may leave a little less than nothing.
    variance = max(0.0, squares / n / _MICRO - mean * mean) * n / max(1, n - 1)
    return n, mean, variance
