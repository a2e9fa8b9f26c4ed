"""How good an order is, and how long answers take. Pure."""

import math
from collections.abc import Mapping, Sequence

from serve_app.evaluation.dataset import Grades

# Names as they are printed; ir-measures calls them nDCG@10, R@10, R@100 and RR@10.
METRICS = ("ndcg@10", "recall@10", "recall@100", "mrr@10")


def quality(grades: Grades, orders: Mapping[str, Sequence[str]]) -> dict[str, dict[str, float]]:
    """Every metric of every query: document ids in `orders` are best first; a query without any scores 0.

    nDCG takes the grade as the gain (Järvelin, Kekäläinen, 2002, as trec_eval does); for recall and MRR
    every grade above 0 is relevant.
    """
    import ir_measures
    from ir_measures import RR, R, nDCG

    measures = dict(zip((nDCG @ 10, R @ 10, R @ 100, RR @ 10), METRICS, strict=True))
    # Scores only say the order, so that equal scores at the gateway keep the order it answered in.
    run = {query: {id: float(-rank) for rank, id in enumerate(order)} for query, order in orders.items() if order}
    values = {query: dict.fromkeys(METRICS, 0.0) for query in grades}
    if run:
        for found in ir_measures.iter_calc(list(measures), grades, run):
            values[found.query_id][measures[found.measure]] = found.value
    return values


def means(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: math.fsum(value[name] for value in values) / len(values) for name in METRICS}


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Linear between the two nearest values; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
