"""The score cache's memory: names for pairs, and a table of scores that never grows. Pure."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

# Names of pairs and keys of scores: 128 bits each, as rows of two numbers.
Keys = npt.NDArray[np.uint64]
Scores = npt.NDArray[np.float64]
# Seconds since the epoch.
Times = npt.NDArray[np.uint32]

_ENTRY = np.dtype([("key", "<u8", 2), ("score", "<f8"), ("expires", "<u4"), ("used", "<u4")])
# Entries that compete for one place: the more there are, the nearer is what is pushed out to the least recently
# used of all.
_WAYS = 8
# Of one call, what may be spent on waiting for a shared cache. With what giving up costs by itself, it is less
# than the 5 ms that are promised.
_PATIENCE_S = 0.002


@dataclass(slots=True)
class Patience:
    """How much longer a call waits for a shared cache, over all its stages and attempts together."""

    left_s: float = _PATIENCE_S


def pair_names(
    query: str, documents: Sequence[str], instruction: str | None, max_tokens_per_doc: int | None
) -> list[bytes]:
    """16 bytes for each document, of all on the caller's side that decides its score."""
    head = hashlib.sha256(json.dumps([query, instruction, max_tokens_per_doc]).encode()).digest()
    # SHA-256, because processors compute it themselves: twice as fast as BLAKE2 where they do, as fast elsewhere.
    # A document may hold half a surrogate pair, which only its own row can have brought.
    return [
        hashlib.sha256(head + document.encode("utf-8", "surrogatepass")).digest()[:16] for document in documents
    ]


def keys_of(variant: str, fingerprint: str, names: Sequence[bytes]) -> Keys:
    """What scores of these pairs are stored under. Variants with the same fingerprint share none: a canary that
    differs in nothing that decides scores is still to be tried."""
    side = np.frombuffer(hashlib.sha256(f"{variant} {fingerprint}".encode()).digest()[:16], "<u8")
    keys: Keys = np.frombuffer(b"".join(names), "<u8").reshape(-1, 2) ^ side
    return keys


class ScoreTable:
    """Scores by key in at most `max_bytes`, which is all the memory it takes: 32 bytes a score. Each key has one
    place with room for a few; the least recently used one there, or one past its time, makes room."""

    def __init__(self, max_bytes: int, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self._born = clock()
        # Untouched memory isn't taken yet.
        self._table: npt.NDArray[Any] = np.zeros((max(1, max_bytes // (_WAYS * _ENTRY.itemsize)), _WAYS), _ENTRY)
        # Also those past their time that nothing has replaced.
        self.entries = 0

    @property
    def size_bytes(self) -> int:
        return self._table.nbytes

    def get(self, keys: Keys) -> tuple[Scores, npt.NDArray[np.bool_]]:
        """A score for each key, and which of them are there; those count as used."""
        places = self._places(keys)
        rows = self._table[places]
        match = (rows["key"] == keys[:, None, :]).all(axis=-1) & (rows["expires"] > self.clock())
        ways = match.argmax(axis=1)
        found = match.any(axis=1)
        self._table["used"][places[found], ways[found]] = self._now()
        scores: Scores = rows["score"][np.arange(len(keys)), ways]
        return scores, found

    def put(self, keys: Keys, scores: Scores, expires: Times) -> None:
        entries = np.empty(len(keys), _ENTRY)
        entries["key"], entries["score"], entries["expires"] = keys, scores, expires
        entries["used"] = self._now()
        places = self._places(keys)
        while len(places):
            # One at a time for each place, so that each sees what the one before left.
            _, now = np.unique(places, return_index=True)
            self._put(places[now], entries[now])
            places, entries = np.delete(places, now), np.delete(entries, now)

    def _put(self, places: npt.NDArray[np.intp], entries: npt.NDArray[Any]) -> None:
        rows = self._table[places]
        match = (rows["key"] == entries["key"][:, None, :]).all(axis=-1)
        used = np.where(rows["expires"] > self.clock(), rows["used"].astype(np.int64), -1)
        ways = np.where(match.any(axis=1), match.argmax(axis=1), used.argmin(axis=1))
        self.entries += int((rows["expires"][np.arange(len(places)), ways] == 0).sum())
        self._table[places, ways] = entries

    def _places(self, keys: Keys) -> npt.NDArray[np.intp]:
        return (keys[:, 0] % np.uint64(len(self._table))).astype(np.intp)

    def _now(self) -> int:
        """Tenths of a second: they last for 13 years."""
        return max(0, int((self.clock() - self._born) * 10))
