"""Traffic over time: calls a second of each kind, where a kind says how much work one call is.

Serve's counts see calls; what a replica works off are tokens. A trace therefore has kinds of calls, and their
shares may move while the number of calls does not.
"""

import csv
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_STEP_S = 1.0
_MOST_S = 31 * 86_400.0
# Of pairs in CSV files that don't say how many a call has: instruction, query and a product's text.
_TOKENS_PER_PAIR = 150.0
_COLUMNS = ("seconds", "calls_per_s", "tokens_per_call", "pairs_per_call")


class TraceError(ValueError):
    """A trace that can't be read: file, line, value, and what is allowed."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of call: so many pairs, so many tokens in all of them, prompts included."""

    name: str
    pairs: float
    tokens: float


TITLES = Kind("5 titles", 5, 5 * 120)
PRODUCTS = Kind("50 products", 50, 50 * 150)
DOCUMENTS = Kind("200 long documents", 200, 200 * 300)
_KINDS = (TITLES, PRODUCTS, DOCUMENTS)
# Calls a second of each kind in the made traces: 0.31 million tokens a second, nearly half of them documents'.
_BASE = np.array([80.0, 16.0, 2.4])


@dataclass(frozen=True, slots=True)
class Trace:
    """Rates by step: step i lasts from `starts_s[i]` to the next start, the last one until `seconds`.

    `calls_per_s`, `tokens_per_call` and `pairs_per_call` have the shape (steps, kinds)."""

    name: str
    seconds: float
    starts_s: Floats
    calls_per_s: Floats
    tokens_per_call: Floats
    pairs_per_call: Floats

    @property
    def tokens_per_s(self) -> Floats:
        """Expected arrivals by step."""
        return np.asarray((self.calls_per_s * self.tokens_per_call).sum(axis=1))

    def steps(self, times_s: Floats) -> npt.NDArray[np.int64]:
        """The step at each of the times."""
        return np.maximum(np.searchsorted(self.starts_s, times_s, side="right") - 1, 0)

    def scaled(self, factor: float) -> "Trace":
        """As many times the calls."""
        return replace(self, calls_per_s=self.calls_per_s * factor)


def constant(seconds: float = 1800.0) -> Trace:
    return _made("constant", seconds, lambda t, _: np.tile(_BASE, (len(t), 1)))


def diurnal(seconds: float = 86_400.0) -> Trace:
    """A day from midnight: a tenth of the afternoon's tokens at five in the morning. Documents are asked for in
    office hours, titles in the evening; the load wanders by some 5 % on top."""

    def rates(t: Floats, rng: np.random.Generator) -> Floats:
        hour = t / seconds * 24

        def hill(peak: float, width: float) -> Floats:
            away = (hour - peak + 12) % 24 - 12
            return np.exp(-0.5 * (away / width) ** 2)

        evening, office = hill(20.5, 3.0), hill(13.5, 2.5)
        by_kind = np.stack(
            [
                0.35 + 4.0 * evening + 1.5 * office,
                0.3 + 3.5 * evening + 2.0 * office,
                0.2 + 1.2 * evening + 3.5 * office,
            ]
        )
        # A first-order process that forgets within some ten minutes.
        every = max(1, len(t) // 1440)
        steps = rng.normal(0, 0.02, len(t) // every + 2)
        wander = np.empty_like(steps)
        level = 0.0
        for i, step in enumerate(steps):
            wander[i] = level = 0.92 * level + step
        noise = np.interp(np.arange(len(t)) / every, np.arange(len(wander)), wander)
        return np.asarray((by_kind * np.exp(noise)).T * _BASE)

    return _made("diurnal", seconds, rates, step_s=10.0)


def flash_sale(seconds: float = 1800.0) -> Trace:
    """Ten times the calls of every kind within 10 s at a third of the time; they ebb away over the last third."""

    def rates(t: Floats, _: np.random.Generator) -> Floats:
        begins, ebbs = seconds / 3, seconds * 2 / 3
        rise = np.clip((t - begins) / 10.0, 0, 1)
        ebb = np.exp(-np.clip(t - ebbs, 0, None) / (seconds / 12))
        return np.asarray((1 + 9 * rise * ebb)[:, None] * _BASE)

    return _made("flash-sale", seconds, rates)


def bursty(seconds: float = 10_800.0) -> Trace:
    """Bursts of two to ten minutes, a quarter of an hour apart on average. Each is of one kind: eight times as
    many documents (a sixth more calls, four times the tokens), products or titles."""

    def rates(t: Floats, rng: np.random.Generator) -> Floats:
        factors = np.ones((len(t), len(_KINDS)))
        at = 300.0
        while at < seconds:
            lasts = rng.uniform(120, 600)
            kind = rng.choice(len(_KINDS), p=[0.2, 0.3, 0.5])
            rise = np.clip((t - at) / 5, 0, 1) * np.clip((at + lasts - t) / 5, 0, 1)
            factors[:, kind] += 7 * rise
            at += lasts + rng.exponential(900.0)
        return np.asarray(factors * _BASE)

    return _made("bursty", seconds, rates)


MADE: dict[str, Callable[[], Trace]] = {
    "constant": constant,
    "diurnal": diurnal,
    "flash-sale": flash_sale,
    "bursty": bursty,
}


def from_csv(path: Path) -> Trace:
    """Columns `seconds`, `calls_per_s`, `tokens_per_call` and, if you like, `pairs_per_call`; the first row names
    them. A row holds from its second on; the last as long as the one before it. Several rows of one second
    are several kinds of calls at once. Raises TraceError."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = _rows(path, file)
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"{path}: is not CSV in UTF-8: {error}") from None
    starts = list(dict.fromkeys(row[0] for row in rows))
    if len(starts) < 2:
        raise TraceError(f"{path}: has {len(starts)} moments; allowed: 2 or more, as the first ones' ends")
    first = starts[0]
    kinds = max(Counter(row[0] for row in rows).values())
    table = np.zeros((3, len(starts), kinds))
    table[2] = 1
    step, kind = -1, 0
    before = math.nan
    for second, *values in rows:
        step, kind = (step, kind + 1) if second == before else (step + 1, 0)
        before = second
        table[:, step, kind] = values
    starts_s = np.array(starts) - first
    seconds = float(2 * starts_s[-1] - starts_s[-2])
    if seconds > _MOST_S:
        raise TraceError(
            f"{path}: lasts {seconds:,.0f} s; allowed: up to {_MOST_S:,.0f} (31 days); are these milliseconds?"
        )
    return Trace(path.stem, seconds, starts_s, *table)


def _rows(path: Path, file: TextIO) -> list[tuple[float, float, float, float]]:
    """Second, calls a second, tokens and pairs a call."""
    reader = csv.reader(file)
    header = [name.strip() for name in next(reader, [])]
    missing = [name for name in _COLUMNS[:3] if name not in header]
    unknown = [name for name in header if name not in _COLUMNS]
    if missing or unknown or len(set(header)) < len(header):
        raise TraceError(
            f"{path}:1: the columns are {', '.join(header) or 'none'}; allowed: {', '.join(_COLUMNS[:3])} and, "
            f"if you like, {_COLUMNS[3]}"
        )
    rows: list[tuple[float, float, float, float]] = []
    for cells in reader:
        where = f"{path}:{reader.line_num}"
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            raise TraceError(f"{where}: has {len(cells)} values; allowed: {len(header)}, as the first row")
        value = {name: _number(where, name, cell) for name, cell in zip(header, cells, strict=True)}
        if rows and value["seconds"] < rows[-1][0]:
            raise TraceError(f"{where}: seconds is {value['seconds']:g}; allowed: {rows[-1][0]:g} or more")
        pairs = value.get("pairs_per_call") or max(1.0, round(value["tokens_per_call"] / _TOKENS_PER_PAIR))
        rows.append((value["seconds"], value["calls_per_s"], value["tokens_per_call"], pairs))
    return rows


def _number(where: str, name: str, cell: str) -> float:
    least = {"pairs_per_call": 1.0, "tokens_per_call": 1.0}.get(name, 0.0)
    try:
        number = float(cell)
    except ValueError:
        number = math.nan
    if not least <= number < math.inf:
        raise TraceError(f"{where}: {name} is {cell.strip()!r}; allowed: a number from {least:g} on")
    return number


def _made(
    name: str, seconds: float, rates: Callable[[Floats, np.random.Generator], Floats], step_s: float = _STEP_S
) -> Trace:
    starts: Floats = np.arange(0.0, seconds, step_s, dtype=np.float64)
    # The load's course is part of the trace: it doesn't change with a run's seed.
    calls = rates(starts, np.random.default_rng(1))
    tokens: Floats = np.tile([float(kind.tokens) for kind in _KINDS], (len(starts), 1))
    pairs: Floats = np.tile([float(kind.pairs) for kind in _KINDS], (len(starts), 1))
    return Trace(name, seconds, starts, calls, tokens, pairs)
