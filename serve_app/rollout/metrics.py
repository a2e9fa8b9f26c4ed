"""What the rollout application tells Prometheus: where each route's newest rollout is (docs/operations.md).

It is read from the store, so that every controller tells the same, whoever acts.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import get_args

from ray.util.metrics import Gauge

from serve_app.rollout.machine import FINISHED, State, Status
from serve_app.rollout.store import Rollout, Store, StoreError

_EVERY_S = 5.0
_NEWEST = 200
# A rollout that has ended is told of for as long, so that an alert lasts until somebody has seen it.
_ENDED_S = 3600.0


async def report_rollouts(store: Store, replica: str) -> None:
    """Tells of the rollouts and the store every few seconds, for ever."""
    metrics = Metrics(replica)
    while True:
        try:
            metrics.tell(newest(await asyncio.to_thread(store.recent, _NEWEST), time.time()))
        except StoreError:
            metrics.tell(None)
        await asyncio.sleep(_EVERY_S)


def newest(rollouts: Sequence[Rollout], now: float) -> dict[str, State]:
    """By route, the state of the newest rollout of `rollouts`, which come newest first; none where it ended long
    ago."""
    by_route: dict[str, State] = {}
    for rollout in reversed(rollouts):
        by_route[rollout.route] = State.from_json(rollout.state)
    return {
        route: state
        for route, state in by_route.items()
        if state.status not in FINISHED or now - state.since < _ENDED_S
    }


class Metrics:
    """`replica` tells two controllers apart, which there are while one takes over."""

    def __init__(self, replica: str) -> None:
        self._replica = {"replica": replica}
        self._up = Gauge("serve_app_rollout_store_up", "1 while the store answers.", tag_keys=("replica",))
        self._weight = Gauge(
            "serve_app_rollout_weight_percent",
            "Of the route's calls, what the canary gets.",
            tag_keys=("replica", "route"),
        )
        self._state = Gauge(
            "serve_app_rollout_state",
            "1 for the state of the route's newest rollout, 0 for all others.",
            tag_keys=("replica", "route", "state"),
        )

    def tell(self, states: dict[str, State] | None) -> None:
        """None: the store does not answer. Ray forgets what isn't told again."""
        self._up.set(float(states is not None), self._replica)
        for route, state in (states or {}).items():
            labels = {**self._replica, "route": route}
            self._weight.set(state.weight, labels)
            for status in get_args(Status):
                self._state.set(float(state.status == status), {**labels, "state": status})
