"""What the OpenAPI document says of routes whose handlers read their requests by themselves."""

import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serve_app.gateway import wire

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": wire.ErrorBody, "description": description}
    for status, description in {
        400: "The body is not valid, or over a limit",
        401: "No key, or a wrong one",
        403: "Not open here",
        404: "No such model",
        409: "The state does not allow it",
        408: "The body came too slowly",
        413: "The body is over limits.max_body_bytes",
        415: "The body is compressed",
        429: "Too many calls under way; see Retry-After",
        500: "A fault in the gateway",
        503: "Nothing that could answer is up; see Retry-After",
        504: "Nothing could be answered within the deadline",
    }.items()
}


def parameter(where: str, name: str, schema: dict[str, Any], description: str) -> dict[str, Any]:
    """One that may be left out, in `where`: header or query."""
    return {"name": name, "in": where, "required": False, "schema": schema, "description": description}


REQUEST_ID = parameter(
    "header",
    "X-Request-Id",
    {"type": "string", "pattern": r"^[A-Za-z0-9._:-]{1,128}$"},
    "Comes back in the answer and in the logs.",
)
OF_CALLS = (
    parameter("header", "X-Timeout-Ms", {"type": "integer", "minimum": 1}, "As timeout_ms."),
    REQUEST_ID,
    parameter("header", "Cache-Control", {"type": "string"}, "no-cache: every score is computed."),
)


def takes(
    body: type[BaseModel] | None,
    answer: type[BaseModel],
    summary: str,
    parameters: Sequence[dict[str, Any]] = (REQUEST_ID,),
) -> dict[str, Any]:
    """Arguments of a route that has a body, or None for one without, and `parameters`."""
    extra: dict[str, Any] = {"parameters": list(parameters)}
    if body is not None:
        schema = {"$ref": f"#/components/schemas/{body.__name__}"}
        extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {"summary": summary, "responses": {200: {"model": answer}, **ERRORS}, "openapi_extra": extra}


def document(app: FastAPI, bodies: Sequence[type[BaseModel]]) -> dict[str, Any]:
    """The document, with the schemas of `bodies` and of what stands in paths. Made once."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        _, definitions = models_json_schema(
            [(body, "validation") for body in bodies], ref_template="#/components/schemas/{model}"
        )
        schema["components"]["schemas"].update(definitions["$defs"])
        for path, operations in schema["paths"].items():
            # FastAPI knows those only that are arguments of a handler.
            of_path = [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                for name in re.findall(r"{(\w+)}", path)
            ]
            for operation in operations.values():
                operation["parameters"] = [*operation.get("parameters", []), *of_path]
        app.openapi_schema = schema
    return app.openapi_schema
