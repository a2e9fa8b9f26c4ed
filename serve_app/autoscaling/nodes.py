"""Nodes with GPUs: replicas are packed on them, new ones come when replicas find no room, idle ones go."""

import math
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class NodeType:
    """`provision_s`: from asking for a node until replicas can start there. `idle_timeout_s`: it goes when it has
    been empty for so long."""

    gpus: int = 4
    provision_s: float = 120.0
    idle_timeout_s: float = 60.0

    def replicas(self, num_gpus: float) -> int:
        """How many replicas of `num_gpus` each fit. A share never spans two cards, and what takes more than one
        card takes whole ones (Ray refuses 1.5). Raises ValueError where none fits."""
        if num_gpus > 1:
            room = self.gpus // num_gpus if num_gpus == int(num_gpus) else 0
        else:
            room = self.gpus * math.floor(1 / num_gpus + 1e-9)
        if not room:
            raise ValueError(
                f"num_gpus is {num_gpus:g}, but nodes have {self.gpus}; allowed: up to 1, or a whole number up to "
                f"{self.gpus}"
            )
        return int(room)


@dataclass(slots=True, eq=False)
class Node:
    room: int
    used: int = 0
    # Since when nothing is on it; None while something is.
    idle_since: float | None = None


@dataclass(slots=True)
class Nodes:
    """What is up and what is on its way. Time is the caller's: every method that needs it takes `now`."""

    type: NodeType
    num_gpus: float
    up: list[Node] = field(default_factory=list)
    coming: int = 0

    @property
    def gpus(self) -> int:
        """Of all nodes that are paid for: from the moment they are asked for."""
        return (len(self.up) + self.coming) * self.type.gpus

    def arrive(self, now: float, count: int = 1) -> None:
        self.coming = max(0, self.coming - count)
        self.up += [Node(self.type.replicas(self.num_gpus), 0, now) for _ in range(count)]

    def place(self, count: int) -> dict[Node, int]:
        """How many replicas go where, of up to `count`: the fullest node first
        (`RAY_SERVE_USE_PACK_SCHEDULING_STRATEGY=1`). Fewer where there is no room."""
        placed: dict[Node, int] = {}
        for node in sorted((node for node in self.up if node.used < node.room), key=lambda node: -node.used):
            placed[node] = taken = min(node.room - node.used, count)
            node.used += taken
            node.idle_since = None
            count -= taken
            if not count:
                break
        return placed

    def ask_for(self, waiting: int) -> int:
        """Asks for the nodes that so many replicas without room still lack, and says how many those are."""
        lacking = max(0, math.ceil(waiting / self.type.replicas(self.num_gpus)) - self.coming)
        self.coming += lacking
        return lacking

    def free(self, node: Node, count: int, now: float) -> None:
        node.used -= count
        if not node.used:
            node.idle_since = now

    def drop_idle(self, now: float) -> None:
        self.up = [
            node
            for node in self.up
            if node.idle_since is None or now - node.idle_since < self.type.idle_timeout_s - 1e-9
        ]
