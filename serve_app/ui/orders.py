"""What moved between two orders of documents. Pure; ranks count from 1."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Direction = Literal["up", "down", "same", "new", "gone"]


@dataclass(frozen=True, slots=True)
class Move:
    """From one order to another. `places`: how far, of those that are in both; `other`: the rank in the other
    order, None where it isn't shown there."""

    direction: Direction
    places: int = 0
    other: int | None = None


def came(now: int, was: int | None) -> Move:
    """How the document at rank `now` got there from rank `was`; `new` where it had none."""
    if was is None:
        return Move("new")
    direction: Direction = "same" if now == was else "up" if now < was else "down"
    return Move(direction, abs(now - was), was)


def went(was: int, now: int | None) -> Move:
    """Where the document at rank `was` went: the same as `came`, seen from the order before."""
    if now is None:
        return Move("gone")
    direction: Direction = "same" if now == was else "up" if now < was else "down"
    return Move(direction, abs(now - was), now)


def ranks(order: Sequence[str]) -> dict[str, int]:
    """By document; of one that stands twice, the better."""
    found: dict[str, int] = {}
    for rank, document in enumerate(order, 1):
        found.setdefault(document, rank)
    return found


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of two orders: how many documents they share, of how many (the longer's), and whether the first is one."""

    shared: int
    of: int
    same_first: bool


def agreement(one: Sequence[str], other: Sequence[str]) -> Agreement:
    return Agreement(
        shared=len(set(one) & set(other)),
        of=max(len(set(one)), len(set(other))),
        same_first=bool(one and other) and one[0] == other[0],
    )


def shares(values: Sequence[float]) -> list[float]:
    """Lengths of bars, 0 to 1: of the way from 0 (or the least value, where it is below) to the greatest."""
    if not values:
        return []
    low, high = min(0.0, *values), max(values)
    return [(value - low) / (high - low) if high > low else 0.0 for value in values]
