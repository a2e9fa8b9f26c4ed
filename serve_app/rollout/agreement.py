"""How alike two orders of one query's results are, as ids, best first. Pure.

`compare(stable, canary)` gives all three figures of a mirrored call; the others compute one.
Only the first `DEPTH` results count: what users see.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations

DEPTH = 10
# With 0.9 the first ten ranks carry 86 % of the weight (Webber et al., section 4).
PERSISTENCE = 0.9


@dataclass(frozen=True, slots=True)
class Agreement:
    """`rbo` is in [0, 1]; `tau` in [-1, 1], None where fewer than two documents are in both orders."""

    top1: bool
    rbo: float
    tau: float | None


def compare(stable: Sequence[Hashable], canary: Sequence[Hashable]) -> Agreement:
    """The three figures over the first `DEPTH` of both orders. Raises ValueError for an id that comes twice."""
    stable, canary = stable[:DEPTH], canary[:DEPTH]
    for order in (stable, canary):
        if len(set(order)) != len(order):
            raise ValueError(f"an id stands twice in {list(order)!r}")
    return Agreement(
        top1_agreement(stable, canary), rank_biased_overlap(stable, canary), kendall_tau(stable, canary)
    )


def top1_agreement(a: Sequence[Hashable], b: Sequence[Hashable]) -> bool:
    """Whether both put the same document first. Two empty orders agree."""
    return list(a[:1]) == list(b[:1])


def rank_biased_overlap(a: Sequence[Hashable], b: Sequence[Hashable], p: float = PERSISTENCE) -> float:
    """Rank-biased overlap in its extrapolated form, RBO_ext, which assumes that the agreement seen goes on below:
    1 for equal orders, 0 for disjoint ones, of any lengths. Two empty orders agree.

    Webber, Moffat, Zobel, "A similarity measure for indefinite rankings", ACM TOIS 28(4), 2010, eq. 32
    (eq. 30 where both are of one length).
    """
    short, long = sorted((a, b), key=len)
    s, n = len(short), len(long)
    if s == 0:
        return float(n == 0)
    seen_short: set[Hashable] = set()
    seen_long: set[Hashable] = set()
    total = 0.0
    overlap = overlap_at_s = 0
    for depth in range(1, n + 1):
        if depth <= s:
            seen_short.add(short[depth - 1])
            overlap += short[depth - 1] in seen_long
        seen_long.add(long[depth - 1])
        overlap += long[depth - 1] in seen_short
        agreement = overlap / depth
        if depth == s:
            overlap_at_s = overlap
        elif depth > s:
            agreement += overlap_at_s * (depth - s) / (s * depth)
        total += agreement * p**depth
    tail = ((overlap - overlap_at_s) / n + overlap_at_s / s) * p**n
    # Rounding may leave 1 + 1e-16.
    return min(1.0, (1 - p) / p * total + tail)


def kendall_tau(a: Sequence[Hashable], b: Sequence[Hashable]) -> float | None:
    """Kendall's tau over the documents in both orders: 1 in the same order, -1 reversed; None for fewer than two.

    An order has no ties, so tau-a and tau-b are the same (Kendall, "A new measure of rank correlation", 1938).
    """
    rank = {document: i for i, document in enumerate(b)}
    ranks = [rank[document] for document in a if document in rank]
    pairs = len(ranks) * (len(ranks) - 1) // 2
    if pairs == 0:
        return None
    in_order = sum(first < second for first, second in combinations(ranks, 2))
    return 2 * in_order / pairs - 1
