"""The gateway's HTTP surface: routes, bodies in and out, one error body for everything that goes wrong."""

import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from serve_app import __version__
from serve_app.config import GatewaySettings
from serve_app.gateway import wire
from serve_app.gateway.answers import rerank_answer, score_answer, search_answer, tei_answer
from serve_app.gateway.body import got, read
from serve_app.gateway.control import EventsBody, RolloutBody, add_control
from serve_app.gateway.cors import check_page
from serve_app.gateway.deadline import Deadline
from serve_app.gateway.errors import ApiError
from serve_app.gateway.openapi import ERRORS, OF_CALLS, document, takes
from serve_app.gateway.overview import add_fleet
from serve_app.gateway.pipeline import StageReport
from serve_app.gateway.plan import Call, resolve, timeout_ms
from serve_app.gateway.service import Kind, Service
from serve_app.logs import name_call

logger = logging.getLogger("ray.serve")

B = TypeVar("B", bound=BaseModel)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_BODIES = (wire.SearchBody, wire.AnyRerankBody, wire.CohereV2Body, wire.ScoreBody, RolloutBody, EventsBody)


class _Route(APIRoute):
    """Calls `endpoint(request)` at once: the handlers read their requests by themselves, and FastAPI's look for
    arguments takes some 30 microseconds a call."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        return self.endpoint


# Is told of a call after its answer: path, status, seconds, the call and its stages as far as it came.
Observer = Callable[[str, int, float, Call | None, Sequence[StageReport]], None]


def create_app(service: Service, observe: Observer = lambda *call: None) -> FastAPI:
    """The ASGI application over `service`; `observe` is told of every call that had a body or asked an operator's
    question."""
    app = FastAPI(
        title="serve-app",
        version=__version__,
        description="BM25 recall and vLLM reranking behind one gateway.",
    )
    app.router.route_class = _Route

    @app.post("/v1/search", **takes(wire.SearchBody, wire.SearchAnswer, "Search the catalogue", OF_CALLS))
    async def search(request: Request) -> Response:
        async def answer(body: wire.SearchBody) -> Any:
            call = _call(service, request, body)
            call, candidates, ranking = await service.search(
                call, body.query, recall_k=body.recall_k, top_n=body.top_n, rerank=body.rerank
            )
            request.state.ran = call, ranking.reports
            return search_answer(call, body.query, candidates, ranking, body.top_n, body.explain)

        return await _answer(service, observe, request, wire.SearchBody, answer)

    async def rerank_documents(request: Request, body: wire.RerankBody, shown_by_default: bool) -> Any:
        call = _call(service, request, body)
        query = body.query if isinstance(body.query, str) else _text(body.query, None, "query")
        warnings = _check_rank_fields(body.documents, body.rank_fields) if body.rank_fields else ()
        documents = [
            document if isinstance(document, str) else _text(document, body.rank_fields, f"documents[{i}]")
            for i, document in enumerate(body.documents)
        ]
        call, ranking = await service.rerank(call, query, documents)
        request.state.ran = call, ranking.reports
        wanted = shown_by_default if body.return_documents is None else body.return_documents
        shown = (
            [_shown(*pair, body.rank_fields) for pair in zip(body.documents, documents, strict=True)]
            if wanted
            else None
        )
        return rerank_answer(call, ranking, body.top_n, shown, body.use_activation is False, warnings)

    async def rerank_texts(request: Request, body: wire.TeiBody) -> Any:
        call = _call(service, request, body)
        if not body.truncate:
            # What is cached doesn't say whether it was cut.
            call = replace(call, fresh=True)
        call, ranking = await service.rerank(call, body.query, body.texts, "texts")
        request.state.ran = call, ranking.reports
        if not body.truncate:
            _check_whole(call, ranking.reports)
        return tei_answer(ranking, body.top_n, body.texts if body.return_text else None, body.raw_scores)

    @app.post(
        "/v1/rerank", **takes(wire.RerankBody, wire.RerankAnswer, "Rerank documents (Cohere v1, Jina)", OF_CALLS)
    )
    async def rerank_v1(request: Request) -> Response:
        # Cohere v1 leaves the documents out unless asked, vLLM and Jina put them in.
        return await _answer(
            service, observe, request, wire.RerankBody, lambda body: rerank_documents(request, body, False)
        )

    @app.post(
        "/rerank",
        **takes(
            wire.AnyRerankBody, wire.AnyRerankAnswer, "Rerank documents (vLLM, Jina) or texts (TEI)", OF_CALLS
        ),
    )
    async def rerank(request: Request) -> Response:
        async def answer(body: wire.AnyRerankBody) -> Any:
            if isinstance(body.root, wire.TeiBody):
                return await rerank_texts(request, body.root)
            return await rerank_documents(request, body.root, True)

        return await _answer(service, observe, request, wire.AnyRerankBody, answer)

    @app.post(
        "/v2/rerank", **takes(wire.CohereV2Body, wire.RerankAnswer, "Rerank documents (Cohere v2)", OF_CALLS)
    )
    async def rerank_v2(request: Request) -> Response:
        async def answer(body: wire.CohereV2Body) -> Any:
            call = _call(service, request, body)
            call, ranking = await service.rerank(call, body.query, body.documents)
            request.state.ran = call, ranking.reports
            shown = [{"text": text} for text in body.documents] if body.return_documents else None
            return rerank_answer(call, ranking, body.top_n, shown, body.use_activation is False)

        return await _answer(service, observe, request, wire.CohereV2Body, answer)

    async def score(request: Request) -> Response:
        async def answer(body: wire.ScoreBody) -> Any:
            call = _call(service, request, body, scoring=True)
            call, ranking = await service.score(call, body.pairs(), body.names())
            request.state.ran = call, ranking.reports
            return score_answer(call, ranking.scores, ranking.reports, body.use_activation is False)

        return await _answer(service, observe, request, wire.ScoreBody, answer)

    for path in ("/v1/score", "/score"):
        app.post(path, **takes(wire.ScoreBody, wire.ScoreAnswer, "Score pairs (vLLM)", OF_CALLS))(score)

    @app.get("/v1/models/", include_in_schema=False)
    @app.get(
        "/v1/models",
        summary="Names that `model` may have",
        responses={200: {"model": wire.ModelsAnswer}, **{s: ERRORS[s] for s in (401, 503)}},
    )
    async def models(request: Request) -> Response:
        service.keys.check(request.headers.get("authorization", ""))
        return _json(service.models())

    # A route's name may have slashes, as they are or percent-encoded.
    @app.get(
        "/v1/models/{name:path}",
        summary="One of them",
        responses={200: {"model": wire.ModelEntry}, **{s: ERRORS[s] for s in (401, 404, 503)}},
    )
    async def model(request: Request) -> Response:
        service.keys.check(request.headers.get("authorization", ""))
        name = request.path_params["name"]
        for entry in service.models()["data"]:
            if entry["id"] == name:
                return _json(entry)
        raise ApiError("model_not_found", f"there is no model {name[:80]!r}; see /v1/models")

    @app.get(
        "/info",
        summary="The default route, as TEI describes its model",
        responses={s: ERRORS[s] for s in (401, 503)},
    )
    async def info(request: Request) -> Response:
        service.keys.check(request.headers.get("authorization", ""))
        return _json(service.info())

    # Without this, Xinference's client sends no key.
    @app.get("/v1/cluster/auth", include_in_schema=False)
    async def cluster_auth(request: Request) -> Response:
        return _json({"auth": bool(service.keys.known)})

    async def health(request: Request) -> Response:
        return _json({"status": "ok"})

    # The second is what vLLM's and TEI's clients probe.
    for path in ("/healthz", "/health"):
        app.get(path, summary="The gateway is up")(health)
        app.head(path, include_in_schema=False)(health)

    @app.get("/readyz", summary="What the routes need is up", responses={503: {"description": "Not yet"}})
    async def readyz(request: Request) -> Response:
        ready, body = service.readiness()
        return _json(body, 200 if ready else 503)

    read_and_answer = partial(_answer, service, observe)
    add_control(app, service, read_and_answer)
    add_fleet(app, read_and_answer)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = "method_not_allowed" if error.status_code == 405 else "not_found"
        what = f"{request.method} {request.url.path[:200]}"
        message = f"there is no {what}; see /docs" if code == "not_found" else f"{what} is not allowed"
        return _error(ApiError(code, message), _request_id(request), dict(error.headers or {}))

    async def api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return _error(error, _request_id(request))

    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(ApiError, api_error)
    app.openapi = lambda: document(app, _BODIES)  # type: ignore[method-assign]
    return app


# ---- a call's way in and out


async def _answer(
    service: Service,
    observe: Observer,
    request: Request,
    model: type[B] | None,
    answer: Callable[[Any], Awaitable[Any]],
    kind: Kind = "calls",
    check: Callable[[Request], None] | None = None,
) -> Response:
    """Reads the body as `model` (None: there is none), answers with what `answer` makes of it; whatever goes wrong
    has the one body. `check` lets the caller in or raises ApiError; without it, an API key does."""
    request_id = _request_id(request)
    began = time.monotonic()
    response = Response(status_code=400)
    entered = False
    try:
        # Before anything is read of a stranger's body, or held for it.
        if model is not None:
            check_page(request)
        if check is None:
            request.state.key = service.keys.check(request.headers.get("authorization", ""))
        else:
            check(request)
        service.enter(kind)
        entered = True
        body = None if model is None else await read(request, model, service.settings)
        response = _json(await answer(body))
    except ApiError as error:
        response = _error(error, request_id)
    except ClientDisconnect:
        # Nobody reads this; it only ends the call.
        pass
    except Exception:
        logger.exception("request %s failed", request_id)
        fault = ApiError("internal_error", f"a fault in the gateway; its log names {request_id}")
        response = _error(fault, request_id)
    finally:
        if entered:
            service.leave(kind)
    call, reports = getattr(request.state, "ran", (None, ()))
    # For dialects whose answers have no room for it.
    if without := [
        f"{report.name} {report.failure.reason if report.failure else 'skipped'}"
        for report in reports
        if report.failure or report.skipped
    ]:
        response.headers["X-Degraded"] = ", ".join(without)
    observe(request.scope["route"].path, response.status_code, time.monotonic() - began, call, reports)
    return response


def _call(service: Service, request: Request, body: Any, scoring: bool = False) -> Call:
    settings = service.settings
    named_route = getattr(body, "route", None)
    user = body.user or _header_user(settings, request, named_route or body.model)
    plan = resolve(settings, body.model, named_route, user, service.rollouts.of, scoring)
    asked_ms = body.timeout_ms or _header_timeout_ms(request)
    template = getattr(body, "chat_template_kwargs", None)
    call = Call(
        request_id=_request_id(request),
        key=request.state.key,
        settings=settings,
        plan=plan,
        deadline=Deadline.after(timeout_ms(settings, plan, asked_ms) / 1e3),
        started=time.monotonic(),
        instruction=(template and template.instruction) or body.instruction,
        max_tokens_per_doc=getattr(body, "max_tokens_per_doc", None),
        fresh="no-cache" in re.split(r"[\s,]+", request.headers.get("cache-control", "").lower()),
    )
    # Whatever becomes of it, it was the route's.
    request.state.ran = call, ()
    return call


def _header_user(settings: GatewaySettings, request: Request, route: str | None) -> str | None:
    """The user by the header that the route names; None where it names none, or the caller sent none."""
    found = settings.routes.get(route or settings.default_route)
    if found is None or found.user_header is None:
        return None
    return request.headers.get(found.user_header) or None


def _header_timeout_ms(request: Request) -> int | None:
    value = request.headers.get("x-timeout-ms")
    if value is None:
        return None
    if not (value.isascii() and value.isdigit() and 0 < len(value) < 10 and int(value) > 0):
        raise ApiError(
            "invalid_request",
            f"X-Timeout-Ms is {value[:40]!r}; allowed: milliseconds from 1",
            param="X-Timeout-Ms",
        )
    return int(value)


def _request_id(request: Request) -> str:
    """The caller's X-Request-Id if it is one that a log can carry, else a new one; the same all call long. Serve
    makes one where the caller did not, and puts the header on the answer."""
    state = request.state
    if not hasattr(state, "request_id"):
        given = request.headers.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(given):
            given = uuid.uuid4().hex
            name_call(given)
        state.request_id = given
    request_id: str = state.request_id
    return request_id


def _json(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    # A catalogue's or caller's 1e400 is infinity, which JSON cannot say.
    return Response(to_json(body, inf_nan_mode="null"), status, headers, media_type="application/json")


def _error(error: ApiError, request_id: str, headers: dict[str, str] | None = None) -> Response:
    headers = dict(headers or {})
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    return _json(error.body(request_id), error.status, headers)


# ---- dialects


def _check_whole(call: Call, reports: Sequence[StageReport]) -> None:
    """Refuses texts that a stage of the call's plan had to cut. Raises ApiError."""
    cut, at = max(((report.truncated, i) for i, report in enumerate(reports)), default=(0, 0))
    if not cut:
        return
    what = "are longer than the model reads"
    cap = call.plan.stages[at].max_tokens_per_doc
    if cap is not None:
        name = f"pipelines.{call.plan.pipeline}.stages[{at}].max_tokens_per_doc"
        what = f"have more than {cap} tokens ({name}), or more than the model reads"
    raise ApiError("prompt_too_long", f"{cut} of texts {what}; truncate: true cuts them", param="texts")


def _check_rank_fields(documents: Sequence[str | wire.TextDocument], rank_fields: list[str]) -> list[str]:
    """Warnings of names that no object among the documents has: they may be typing errors. Raises ApiError where
    none of the names is there."""
    objects = [(i, document) for i, document in enumerate(documents) if not isinstance(document, str)]
    there = set().union(*(document.model_fields_set for _, document in objects))
    missing = [name for name in dict.fromkeys(rank_fields) if name not in there]
    if not objects or not missing:
        return []
    if there.isdisjoint(rank_fields):
        i, document = objects[0]
        wanted, has = (", ".join(names)[:200] for names in (rank_fields, sorted(document.model_fields_set)))
        message = f"documents[{i}] has none of rank_fields ({wanted}); it has: {has or 'nothing'}"
        raise ApiError("invalid_request", message, param="rank_fields")
    return [f"rank_fields: no document has {name[:80]!r}" for name in missing]


def _text(document: wire.TextDocument, rank_fields: list[str] | None, param: str) -> str:
    """The text to score of a document that is an object: its `text`, its `rank_fields` line by line, or what
    vLLM's parts in its `content` say."""
    if rank_fields:
        fields = {"text": document.text, **(document.model_extra or {})}
        present = [(name, fields[name]) for name in dict.fromkeys(rank_fields) if fields.get(name) is not None]
        return "\n".join(
            f"{name}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
            for name, value in present
        )
    if document.text is None:
        content = (document.model_extra or {}).get("content")
        if isinstance(content, list):
            try:
                return wire.joined(content)
            except ValueError as error:
                raise ApiError("invalid_request", f"{param} {error}", param=f"{param}.content") from None
        raise ApiError("invalid_request", f"{param} is an object without text", param=f"{param}.text")
    if not isinstance(document.text, str):
        message = f"{param}.text: Input should be a valid string{got(document.text)}"
        raise ApiError("invalid_request", message, param=f"{param}.text")
    return document.text


def _shown(document: str | wire.TextDocument, text: str, rank_fields: list[str] | None) -> dict[str, Any]:
    """The document as it was sent; clients that send content parts look for a `text`, too."""
    if isinstance(document, str):
        return {"text": document}
    sent = document.model_dump(exclude_unset=True)
    return sent if rank_fields else {**sent, "text": text}
