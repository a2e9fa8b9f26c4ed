"""What gateways and the rollout application say to each other. Plain data, free of Ray."""

from dataclasses import dataclass, field
from typing import Any

from serve_app.rollout.split import Split
from serve_app.rollout.store import Report, Search


@dataclass(frozen=True, slots=True)
class Deployed:
    """What a gateway's settings have: the variants of each pipeline, and each route's pipelines with a weight."""

    pipelines: dict[str, tuple[str, ...]] = field(default_factory=dict)
    routes: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class News:
    """From a gateway, once a second: what it counted since, and what it serves."""

    gateway: str
    deployed: Deployed
    reports: tuple[Report, ...] = ()
    searches: tuple[Search, ...] = ()


@dataclass(frozen=True, slots=True)
class Splits:
    """What is in force, by route, oldest first. Whole: a gateway replaces all it had. `said_at` is the
    controller's time, by which gateways count; `stored` says whether it has kept what they sent. `old`: the store
    is away, and this is what was in force when it was read last."""

    by_route: dict[str, tuple[Split, ...]] = field(default_factory=dict)
    said_at: float | None = None
    stored: bool = True
    old: bool = False


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer to an operator or to events: a body, or an error with the gateway's code for it. Errors cross
    handles as data, because Serve wraps exceptions in one mode and not in the other."""

    body: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    message: str = ""
