"""How sure a figure is: one-sided bounds from few samples. Pure.

Guards are looked at again and again, so a look may only rarely be wrong: all bounds are at `Z`, wrong once
in 2,000.
"""

import math

Z = 3.29
CONFIDENCE = "99.95 %"


def wilson(k: int, n: int) -> tuple[float, float]:
    """Lower and upper bound of a probability of which `k` of `n` (at least 1) were seen: Wilson, JASA 22, 1927."""
    p, z2 = k / n, Z * Z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def least_difference(a: float, a_low: float, b: float, b_high: float) -> float:
    """Lower bound of a - b, from a's lower and b's upper bound: "square and add" (Newcombe, Statistics in
    Medicine 17, 1998, method 10, for proportions; Zou, Donner, Statistics in Medicine 27, 2008, for the rest)."""
    return a - b - math.hypot(a - a_low, b_high - b)


def quantile_ranks(q: float, n: int) -> tuple[int, int]:
    """Ranks (from 1) of the two of `n` sorted values that bound their `q` quantile, whatever their distribution:
    the number of values below it is binomial, here in its normal approximation (David, Nagaraja, "Order
    Statistics", 3rd ed., section 7.1). A rank below 1 or above n: there are too few values for that bound."""
    half = Z * math.sqrt(n * q * (1 - q))
    return math.floor(n * q - half), math.ceil(n * q + half) + 1


def mean_bounds(n: int, mean: float, variance: float) -> tuple[float, float]:
    """Normal bounds of a mean of `n` values. Takes the values for independent and `n` for dozens."""
    half = Z * math.sqrt(variance / max(1, n))
    return mean - half, mean + half


def chi_square_bound(freedom: int) -> float:
    """The chi-square value that is only exceeded in one of 2,000 cases (Wilson, Hilferty, PNAS 17, 1931)."""
    if freedom < 1:
        return 0.0
    return float(freedom * (1 - 2 / (9 * freedom) + Z * math.sqrt(2 / (9 * freedom))) ** 3)
