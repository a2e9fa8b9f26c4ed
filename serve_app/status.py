"""What Serve says of its applications, cheaply.

`serve.status()` validates every deployment's config anew and pickles its router for that: 20 ms each, on a gateway
that asks every two seconds. This reads the same answer of the controller as it comes.
"""

from dataclasses import dataclass, field
from typing import Any

from ray.serve.context import _get_global_client


@dataclass(slots=True)
class AppStatus:
    """`status` is Serve's word, e.g. RUNNING; `running` the replicas that run, by deployment; `deployed_at_s` when
    it was deployed last, in seconds since the epoch; `messages` what Serve says of it and of its deployments."""

    status: str
    running: dict[str, int] = field(default_factory=dict)
    deployed_at_s: float = 0.0
    messages: list[str] = field(default_factory=list)


def applications() -> dict[str, AppStatus]:
    """By name; none while Serve hasn't started. Blocks on the controller."""
    return {name: _status(app) for name, app in details().get("applications", {}).items()}


def details() -> dict[str, Any]:
    """The controller's whole answer, as `ray.serve.schema.ServeInstanceDetails` describes it; words are enums."""
    client = _get_global_client(raise_if_no_controller_running=False)
    answer: dict[str, Any] = client.get_serve_details() if client is not None else {}
    return answer


def word(value: Any) -> str:
    """A status as text, be it an enum or not."""
    return str(getattr(value, "value", value))


def _status(app: dict[str, Any]) -> AppStatus:
    deployments: dict[str, Any] = app["deployments"]
    return AppStatus(
        word(app["status"]),
        {
            name: sum(word(replica["state"]) == "RUNNING" for replica in deployment["replicas"])
            for name, deployment in deployments.items()
        },
        app["last_deployed_time_s"],
        [app["message"], *(deployment["message"] for deployment in deployments.values())],
    )
