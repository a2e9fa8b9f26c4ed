"""The gateway as evaluation sees it: which names there are, and one query's answer."""

import asyncio
import math
import time
from dataclasses import dataclass
from typing import Any

import httpx

from serve_app.access import API_KEY, bearer, is_elsewhere

ATTEMPTS = 6
# A Retry-After beyond this is not waited for in full.
MAX_WAIT_S = 10.0
# The gateway's own deadline comes first, so that its answer says what happened.
_GRACE_S = 5.0


class EvaluationError(RuntimeError):
    """The gateway cannot be evaluated: it is not there, or does not know a name."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One query's document ids, best first, or an `error`; `latency_ms` is the answered attempt's."""

    ids: list[str]
    latency_ms: float = 0.0
    is_degraded: bool = False
    retries: int = 0
    error: str = ""


class Gateway:
    def __init__(
        self,
        url: str,
        timeout_s: float,
        concurrency: int,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self._timeout_ms = max(1, round(timeout_s * 1e3))
        try:
            self._http = httpx.AsyncClient(
                base_url=self.url,
                # What is measured is the pipeline, not the score cache.
                headers={**bearer(API_KEY), "Cache-Control": "no-cache"},
                timeout=timeout_s + _GRACE_S,
                limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
                transport=transport,
                trust_env=is_elsewhere(url),
            )
        # ImportError: a proxy of the environment for which httpx lacks something.
        except (httpx.InvalidURL, ValueError, ImportError) as error:
            raise EvaluationError(f"can't call {url!r}: {error}") from None

    async def __aenter__(self) -> "Gateway":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def models(self) -> list[dict[str, Any]]:
        """The entries of `GET /v1/models`. Raises `EvaluationError`."""
        try:
            response = await self._http.get("/v1/models")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise EvaluationError(f"no gateway answers at {self.url}: {_reason(error)}") from None
        if response.status_code != 200:
            raise EvaluationError(f"{self.url}/v1/models: {_refusal(response)}")
        try:
            entries = response.json()["data"]
            return [entry for entry in entries if isinstance(entry["id"], str)]
        except (ValueError, KeyError, TypeError):
            raise EvaluationError(f"{self.url}/v1/models answers something else than a list of models") from None

    async def search(self, query: str, body: dict[str, Any]) -> Answer:
        """Asks once, and again while the gateway is overloaded (429, 503) or cannot be connected to. Never raises
        for one query's sake."""
        error = ""
        for attempt in range(ATTEMPTS):
            started = time.perf_counter()
            try:
                response = await self._http.post(
                    "/v1/search", json={**body, "query": query, "timeout_ms": self._timeout_ms}
                )
            except httpx.ConnectError as failure:
                error, wait_s = _reason(failure), 0.5 * 2**attempt
            except (httpx.HTTPError, ValueError) as failure:
                # A query of characters that no JSON in UTF-8 holds, too.
                return Answer([], retries=attempt, error=_reason(failure))
            else:
                if response.status_code not in (429, 503):
                    return _answer(response, (time.perf_counter() - started) * 1e3, attempt)
                error, wait_s = _refusal(response), _wait_s(response, attempt)
            if attempt + 1 < ATTEMPTS:
                await asyncio.sleep(min(wait_s, MAX_WAIT_S))
        return Answer([], retries=ATTEMPTS - 1, error=error)


def _answer(response: httpx.Response, latency_ms: float, retries: int) -> Answer:
    if response.status_code != 200:
        return Answer([], retries=retries, error=_refusal(response))
    try:
        body = response.json()
        ids = [str(result["id"]) for result in body["results"]]
        is_degraded = bool(body["meta"].get("degraded"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return Answer([], retries=retries, error="200, but the body is no search answer")
    return Answer(ids, latency_ms, is_degraded, retries)


def _wait_s(response: httpx.Response, attempt: int) -> float:
    """Retry-After where it is a number of seconds; a date or nonsense is not worth more than our own guess."""
    try:
        asked = float(response.headers.get("retry-after", ""))
    except ValueError:
        asked = math.nan
    return asked if asked >= 0 else 0.5 * 2**attempt


def _refusal(response: httpx.Response) -> str:
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text[:200] or response.reason_phrase
    return f"{response.status_code}: {message}"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
