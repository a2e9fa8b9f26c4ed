"""`/v1/rollouts` for operators and `/v1/events` for clicks: bodies in and out of the rollout application."""

import hashlib
import hmac
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ConfigDict, Discriminator, Field, RootModel, Tag
from pydantic_core import to_json

from serve_app.access import ADMIN_KEY, secret
from serve_app.gateway.errors import ApiError
from serve_app.gateway.openapi import REQUEST_ID, parameter, takes
from serve_app.gateway.service import Service
from serve_app.rollout.messages import Reply
from serve_app.rollout.store import Event

_KINDS: dict[str, Literal["click", "impression"]] = {
    "click": "click",
    "impression": "impression",
    "view": "impression",
}
_ACTIONS = ("pause", "resume", "promote", "abort", "undo")
_MAX_EVENTS = 1000
# Nobody looks at their answer; who sends them tries again.
_EVENTS_TIMEOUT_S = 3.0
_OPERATOR = parameter("header", "X-Operator", {"type": "string"}, "Who asks, for the history.")
_ROUTE = parameter("query", "route", {"type": "string"}, "Of this route only.")


class RolloutBody(RootModel[dict[str, Any]]):
    """A rollout document: `route`, `stable` and `canary`, and what docs/rollouts.md lists."""


class Position(BaseModel):
    model_config = ConfigDict(extra="allow")
    ordinal: int | None = Field(default=None, ge=1, le=2**31, description="Rank of the result, from 1.")


class EventAttributes(BaseModel):
    model_config = ConfigDict(extra="allow")
    position: Position | None = None


class OtherEvent(BaseModel):
    """An event of User Behavior Insights (ubi 1.3) that isn't counted: what it says is its own affair."""

    model_config = ConfigDict(extra="allow")
    action_name: str = Field(max_length=100)


class UbiEvent(OtherEvent):
    """An impression or a click, as User Behavior Insights (ubi 1.3) has them."""

    query_id: str = Field(min_length=1, max_length=128, description="`id` of the search's answer.")
    event_id: str | None = Field(
        default=None,
        min_length=1,
        max_length=128,
        description="An event counts once by it; where it is absent, by all that the event says.",
    )
    event_attributes: EventAttributes | None = None


def _tag(event: Any) -> str:
    action = event.get("action_name") if isinstance(event, dict) else getattr(event, "action_name", None)
    # What isn't even an action is refused as a counted one is.
    return "OtherEvent" if isinstance(action, str) and action not in _KINDS else "UbiEvent"


_COUNTED_OR_NOT = Discriminator(_tag)


class EventsBody(BaseModel):
    """One or many events."""

    model_config = ConfigDict(extra="forbid")
    events: list[
        Annotated[Annotated[UbiEvent, Tag("UbiEvent")] | Annotated[OtherEvent, Tag("OtherEvent")], _COUNTED_OR_NOT]
    ] = Field(min_length=1, max_length=_MAX_EVENTS)


class Anything(RootModel[dict[str, Any]]):
    """An object; docs/rollouts.md shows it."""


Answer = Callable[..., Awaitable[Response]]


def add_control(app: FastAPI, service: Service, answer: Answer) -> None:
    """Adds the routes to `app`. `answer` reads a body and answers."""

    def guarded(ask: Callable[[Request, Any], Awaitable[Reply]], body: type[BaseModel] | None = None) -> Any:
        async def endpoint(request: Request) -> Response:
            async def reply(read: Any) -> dict[str, Any]:
                return _body(await ask(request, read))

            # The admin key is all that operators need.
            return await answer(request, body, reply, "operators", check_admin)

        return endpoint

    async def start(request: Request, body: RolloutBody) -> Reply:
        # Chosen here, as a command's below: where a replica dies, its calls go to another one.
        start_id = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:4]}"
        return await service.rollouts.ask("start", body.root, start_id, _operator(request))

    async def recent(request: Request, _: None) -> Reply:
        return await service.rollouts.ask("recent", request.query_params.get("route"))

    async def show(request: Request, _: None) -> Reply:
        return await service.rollouts.ask("show", request.path_params["rollout"])

    async def history(request: Request, _: None) -> Reply:
        return await service.rollouts.ask("history", request.path_params["rollout"])

    async def act(request: Request, _: None) -> Reply:
        action = request.path_params["action"]
        if action not in _ACTIONS:
            raise ApiError("not_found", f"there is no action {action[:40]!r}; known: {', '.join(_ACTIONS)}")
        command_id = f"{action}-{uuid.uuid4().hex}"
        return await service.rollouts.ask(
            "act", request.path_params["rollout"], action, command_id, _operator(request)
        )

    one = "/v1/rollouts/{rollout}"
    begin = takes(RolloutBody, Anything, "Start a rollout", (_OPERATOR, REQUEST_ID))
    app.post("/v1/rollouts", **begin)(guarded(start, RolloutBody))
    app.get("/v1/rollouts", **takes(None, Anything, "Rollouts, the newest first", (_ROUTE, REQUEST_ID)))(
        guarded(recent)
    )
    app.get(one, **takes(None, Anything, "A rollout with its figures"))(guarded(show))
    app.get(f"{one}/history", **takes(None, Anything, "All its transitions"))(guarded(history))
    command = takes(None, Anything, ", ".join(_ACTIONS), (_OPERATOR, REQUEST_ID))
    app.post(f"{one}/{{action}}", **command)(guarded(act))

    @app.post("/v1/events", **takes(EventsBody, Anything, "Impressions and clicks"))
    async def events(request: Request) -> Response:
        async def reply(body: EventsBody) -> dict[str, Any]:
            counted = [_event(event) for event in body.events if isinstance(event, UbiEvent)]
            raw = [
                to_json(event.model_dump(exclude_unset=True), inf_nan_mode="null").decode()
                for event in body.events
            ]
            _check_running(service)
            answered = _body(await service.rollouts.ask("events", counted, raw, timeout_s=_EVENTS_TIMEOUT_S))
            return {**answered, "ignored": len(body.events) - len(counted)}

        return await answer(request, EventsBody, reply, "events")


def check_admin(request: Request) -> None:
    """Raises ApiError unless the call brings the admin key as `Authorization: Bearer …`."""
    key = secret(ADMIN_KEY)
    if not key:
        raise ApiError("forbidden", f"rollouts are closed: set {ADMIN_KEY} in the gateway's environment")
    given = request.headers.get("authorization", "")
    scheme, _, token = given.partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(token.strip().encode(), key.encode()):
        raise ApiError("unauthorized", "give the admin key: Authorization: Bearer KEY")


def _check_running(service: Service) -> None:
    """Raises ApiError where the rollout application is known to have no replica."""
    app, fleet = service.settings.rollout, service.fleet
    if app is not None and fleet.apps is not None and not fleet.running(app, "Rollout"):
        raise ApiError("unavailable", f"the rollout application {app} has no replica", retry_after_s=5)


def _operator(request: Request) -> str:
    """Who asks, for the history; as they say."""
    return "".join(c for c in request.headers.get("x-operator", "") if c.isprintable())[:100]


def _event(event: UbiEvent) -> Event:
    said = event.model_dump_json(exclude_unset=True)
    position = event.event_attributes.position if event.event_attributes else None
    identity = event.event_id or hashlib.blake2b(said.encode(), digest_size=16).hexdigest()
    return Event(identity, event.query_id, _KINDS[event.action_name], position.ordinal if position else None)


def _body(reply: Reply) -> dict[str, Any]:
    if reply.error is not None:
        raise ApiError(reply.error, reply.message, retry_after_s=1 if reply.error == "unavailable" else None)
    return reply.body
