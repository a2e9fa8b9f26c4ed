"""Which pipeline of a route answers a call: weighted, and the same for the same user. Pure."""

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Split:
    """A rollout's hold on its route: of the calls that are `stable`'s by the route's weights, `weight` percent go
    to `canary`. `shadow`: part of stable's calls that is mirrored. `live`: under way; a promoted rollout's split
    goes on with weight 100, without guards, until the route's own weights no longer name `stable`. `since`: when
    its guards began to judge, in the controller's time."""

    rollout: str
    route: str
    stable: str
    canary: str
    weight: float
    shadow: float = 0.0
    live: bool = True
    since: float = 0.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rollout put a call."""

    split: Split
    role: Literal["stable", "canary"]


def choose(weights: Mapping[str, float], user: str | None, salt: str) -> str:
    """A key of `weights` (at least one positive), in proportion to them. With a `user`, a hash of `salt` and
    `user` decides, so that a user stays where they are on every replica; without, chance."""
    positive = [(name, weight) for name, weight in weights.items() if weight > 0]
    target = _point(salt, user) * sum(weight for _, weight in positive)
    for name, weight in positive:
        target -= weight
        if target < 0:
            return name
    return positive[-1][0]


def place(splits: Sequence[Split], pipeline: str, user: str | None) -> tuple[str, Place | None]:
    """The pipeline after the route's `splits`, oldest first, and the last split that had a say.

    A user's point is a hash of route, rollout and user, and the canary has the points below its weight: raising it
    only ever moves users from stable to canary.
    """
    placed = None
    for split in splits:
        if split.stable != pipeline:
            continue
        to_canary = split.weight >= 100 or (
            split.weight > 0 and _point(f"{split.route}\0{split.rollout}", user) * 100 < split.weight
        )
        placed = Place(split, "canary" if to_canary else "stable")
        if to_canary:
            pipeline = split.canary
    return pipeline, placed


def _point(salt: str, user: str | None) -> float:
    """In [0, 1): by a hash, or by chance without a user."""
    if user is None:
        return random.random()
    text = f"{salt}\0{user}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") / 2**64
