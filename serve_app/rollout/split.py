"""Which pipeline of a route answers a call: weighted, and the same for the same user."""

import hashlib
import random
from collections.abc import Mapping


def choose(weights: Mapping[str, float], user: str | None, salt: str) -> str:
    """A key of `weights` (at least one positive), in proportion to them. With a `user`, a hash of `salt` and
    `user` decides, so that a user stays where they are on every replica; without, chance."""
    point = _hash_point(salt, user) if user is not None else random.random()
    positive = [(name, weight) for name, weight in weights.items() if weight > 0]
    target = point * sum(weight for _, weight in positive)
    for name, weight in positive:
        target -= weight
        if target < 0:
            return name
    return positive[-1][0]


def _hash_point(salt: str, user: str) -> float:
    digest = hashlib.blake2b(user.encode(errors="surrogatepass"), key=salt.encode()[:64], digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
