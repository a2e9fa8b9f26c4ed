"""A request's body: read within limits, and what is wrong with it said in words.

Errors name the field, what was seen there and what is allowed; of texts they show nothing but the length, because
queries and documents are the caller's affair.
"""

import asyncio
import json
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json

from serve_app.config import GatewaySettings, known_names
from serve_app.gateway import wire
from serve_app.gateway.errors import ApiError
from serve_app.gateway.limits import limit

B = TypeVar("B", bound=BaseModel)

# A body that trickles in must not hold one of limits.max_concurrent_calls for ever.
_TIMEOUT_S = 10
# Errors of strings in the place of something short: they may be shown.
_OF_WORDS = ("int_parsing", "int_parsing_size", "bool_parsing", "literal_error")
_NOT_OBJECTS = ("model_type", "model_attributes_type", "dict_type")
# Their messages say it, or there is nothing to be seen.
_TELLING = ("missing", "value_error", "too_long", "too_short")
_SHOWN_CHARS = 80


async def read(request: Request, model: type[B], settings: GatewaySettings) -> B:
    """The body as `model`. Raises ApiError."""
    data = await _json(request, settings.limits.max_body_bytes)
    if not isinstance(data, dict):
        raise ApiError("invalid_request", f"the body is {_seen(data)}; allowed: a JSON object")
    # Before millions of texts are looked at, one by one.
    for name in wire.TEXTS:
        if isinstance(texts := data.get(name), list):
            limit(settings, "max_documents", len(texts), name, "documents")
    _check_names(model, data)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        # Of what a field may be, the one that came nearest.
        problem = max(problems, key=lambda problem: len(problem["loc"]))
        param = _path(problem["loc"])
        message = _message(problem)
        raise ApiError(
            "invalid_request", f"{param}: {message}" if param else message, param=param or None
        ) from None


def got(value: Any) -> str:
    """What an error's message says of the `value` seen; of a string, that it is one."""
    return f" (got {_seen(value)})"


async def _json(request: Request, max_bytes: int) -> Any:
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.strip().lower() not in ("", "identity"):
        raise ApiError("unsupported_encoding", f"Content-Encoding is {encoding[:40]!r}; allowed: identity")
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            async for chunk in request.stream():
                size += len(chunk)
                if size > max_bytes:
                    message = f"the body is over limits.max_body_bytes, which is {max_bytes}"
                    raise ApiError("body_too_large", message)
                chunks.append(chunk)
    except TimeoutError:
        raise ApiError("body_too_slow", f"the body was not here within {_TIMEOUT_S} s") from None
    try:
        return from_json(b"".join(chunks), allow_inf_nan=False)
    except ValueError as error:
        raise ApiError("invalid_json", f"the body is not valid JSON in UTF-8: {error}") from None


def _check_names(model: type[BaseModel], data: dict[str, Any]) -> None:
    """Refuses fields that `model` forbids, by the first few names. Raises ApiError."""
    if model.model_config.get("extra") != "forbid":
        return
    known = {field.alias or name for name, field in model.model_fields.items()}
    unknown = [name for name in data if name not in known]
    if not unknown:
        return
    names = [name[:_SHOWN_CHARS] for name in unknown[:3]]
    more = f" and {len(unknown) - len(names)} more" if len(unknown) > len(names) else ""
    what = f"{', '.join(names)}{more} {'is' if len(unknown) == 1 else 'are'} unknown"
    raise ApiError("invalid_request", f"{what}; {known_names(names[0], known)}", param=names[0])


def _message(problem: ErrorDetails) -> str:
    kind, value = problem["type"], problem["input"]
    # Pydantic's own names a class.
    message = "Input should be an object" if kind in _NOT_OBJECTS else problem["msg"].removeprefix("Value error, ")
    if kind in _TELLING:
        return message
    if isinstance(value, str) and kind in _OF_WORDS:
        return f"{message} (got {_short(value[:_SHOWN_CHARS])})"
    if isinstance(value, str) and kind.startswith("string_too_"):
        return f"{message} (got {len(value)})"
    return f"{message}{got(value)}"


def _seen(value: Any) -> str:
    for kind, name in ((list, "a list"), (dict, "an object"), (str, "a string")):
        if isinstance(value, kind):
            return name
    return _short(value)


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 3] + "..."


_UNION_MEMBERS = ("str", "TextDocument", "RerankBody", "TeiBody", "UbiEvent", "OtherEvent")


def _path(loc: tuple[int | str, ...]) -> str:
    """`documents[3].text` for a pydantic location, without the names of union members."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part not in _UNION_MEMBERS and not part.startswith(("list[", "function-")):
            path += f".{part}" if path else part
    return path
