"""A gateway's side of rollouts for tests: the real `Rollouts`, with users whose calls it counts."""

import asyncio
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any, Protocol

from serve_app.config import GatewaySettings
from serve_app.gateway.rollouts import Rollouts
from serve_app.rollout.split import Place, Split


class Asked(Protocol):
    async def ask(self, method: str, *arguments: Any, timeout_s: float) -> Any: ...


def settings(routes: Iterable[str], **more: Any) -> GatewaySettings:
    """Routes to the pipeline `stable`, and pipelines `canary` and `cold`, each with a variant: `cold-model`."""
    names = ("stable", "canary", "cold")
    return GatewaySettings.model_validate(
        {
            "rollout": "rollouts",
            "variants": {f"{name}-model": {} for name in names},
            "pipelines": {name: {"stages": [{"variant": f"{name}-model"}]} for name in names},
            "routes": {route: {"weights": {"stable": 100}} for route in routes},
            **more,
        }
    )


class Users:
    """`going` says how the calls of a route go: well, or badly on the canary; there are none where it isn't named.
    `seen` has the weights that each route ever had here, one after the other; None where no rollout has it."""

    def __init__(self, *routes: str) -> None:
        self.rollouts = Rollouts(self._ask)
        self.controller: Asked | None = None
        self.settings = settings(routes)
        self.going: dict[str, bool] = {}
        self.seen: dict[str, list[float | None]] = {route: [None] for route in routes}
        self.counted: dict[str, Counter[str]] = defaultdict(Counter)
        self.answers = self.failures = 0

    async def _ask(self, app: str, method: str, *arguments: Any, timeout_s: float) -> Any:
        try:
            if self.controller is None:
                raise ConnectionError("there is no controller")
            answer = await self.controller.ask(method, *arguments, timeout_s=timeout_s)
        except Exception:
            self.failures += 1
            raise
        self.answers += 1
        # What was counted waits, as it does without an answer.
        self.failures += method == "exchange" and not answer.stored
        return answer

    async def __aenter__(self) -> "Users":
        self.rollouts.configure(self.settings)
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        assert self.rollouts._running is not None
        self.rollouts._running.cancel()

    def weight(self, route: str) -> float | None:
        splits = self.rollouts.of(route)
        return splits[-1].weight if splits else None

    def call(self, split: Split, n: int = 1, well: bool = True) -> None:
        """`n` calls of each side that gets any, and mirrored ones."""
        for _ in range(n):
            if split.weight < 100:
                self._answered(split, "stable", True)
            if split.weight > 0:
                self._answered(split, "canary", well)
            if split.shadow:
                self.rollouts.mirrored(split, (["a", "b"], ["a", "b"]) if well else None)

    def _answered(self, split: Split, role: Any, well: bool) -> None:
        self.counted[split.rollout][role] += 1
        self.rollouts.answered(Place(split, role), uuid.uuid4().hex, 0.05, error=not well, searched=True)

    async def _run(self) -> None:
        while True:
            for route, seen in self.seen.items():
                if seen[-1] != self.weight(route):
                    seen.append(self.weight(route))
            for route, well in self.going.items():
                for split in self.rollouts.of(route):
                    if split.live:
                        self.call(split, 3, well)
            await asyncio.sleep(0.01)
