"""The gateway as evaluation sees it: which names there are, and one query's answer."""

import math
from asyncio import sleep
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import httpx

from serve_app.access import API_KEY, bearer, is_elsewhere, shown, why_uncallable

ATTEMPTS = 6
# Of a 503, a Retry-After beyond this is not waited for in full.
MAX_WAIT_S = 10.0
# So long 429 may be the only answer; a key's rate lets some call through every few seconds.
MAX_REFUSED_S = 600.0
# A gateway is gone when so many queries in a row, for each that may be under way, found nobody: some 45 s, or four
# minutes where not even a refusal comes.
_GONE_QUERIES = 3
# The gateway's own deadline comes first, so that its answer says what happened.
_GRACE_S = 5.0
_CONNECT_S = 10.0
# What helps where a query asks for more than the gateway's limits allow, by the field that does.
_OPTIONS = {
    "top_n": "--top-n asks for fewer results",
    "recall_k": "--top-n asks for fewer results",
    "timeout_ms": "--timeout-s sets it",
}


class EvaluationError(RuntimeError):
    """The gateway cannot be evaluated: it is not there, refuses all calls, or does not know a name."""


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
        self.url = shown(url.rstrip("/"))
        self._timeout_ms = max(1, round(timeout_s * 1e3))
        # All queries are one client to the gateway, so one's 429 holds back the others.
        self._not_before = 0.0
        self._refused_since: float | None = None
        self._may_fail, self._failed_in_a_row = _GONE_QUERIES * concurrency, 0
        try:
            self._http = httpx.AsyncClient(
                base_url=url.rstrip("/"),
                # What is measured is the pipeline, not the score cache.
                headers={**bearer(API_KEY), "Cache-Control": "no-cache"},
                timeout=httpx.Timeout(timeout_s + _GRACE_S, connect=_CONNECT_S),
                limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
                transport=transport,
                trust_env=is_elsewhere(url),
            )
        # ImportError: a proxy of the environment for which httpx lacks something.
        except (httpx.InvalidURL, ValueError, ImportError) as error:
            raise EvaluationError(f"can't call {self.url!r}: {why_uncallable(url, error)}") from None

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
        """Asks until there is an answer: as late as a 429 says, and up to `ATTEMPTS` times where the gateway is
        overloaded (503), away behind a proxy or cannot be connected to. Raises `EvaluationError` not for one
        query's sake, but when there is nothing but 429 for `MAX_REFUSED_S`, or query after query finds nobody."""
        attempt, refused, error = 0, 0, ""
        while True:
            if (wait_s := self._not_before - perf_counter()) > 0:
                await sleep(wait_s)
                # Another query's 429 may have come meanwhile.
                continue
            started = perf_counter()
            try:
                response = await self._http.post(
                    "/v1/search", json={**body, "query": query, "timeout_ms": self._timeout_ms}
                )
            except (httpx.ConnectError, httpx.ConnectTimeout) as failure:
                error, wait_s = _reason(failure), 0.5 * 2**attempt
            except (httpx.HTTPError, ValueError) as failure:
                # A query of characters that no JSON in UTF-8 holds, too.
                return Answer([], retries=attempt + refused, error=_reason(failure))
            else:
                asked_s = _retry_after_s(response)
                if response.status_code == 429 and asked_s:
                    refused += 1
                    self._hold_back(asked_s, response)
                    continue
                self._refused_since = None
                if response.status_code not in (429, 503) and not _is_foreign(response):
                    self._failed_in_a_row = 0
                    return _answer(response, (perf_counter() - started) * 1e3, attempt + refused)
                error = _refusal(response)
                wait_s = 0.5 * 2**attempt if asked_s is None else asked_s
            attempt += 1
            if attempt == ATTEMPTS:
                break
            await sleep(min(wait_s, MAX_WAIT_S))
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= self._may_fail:
            raise EvaluationError(
                f"{self.url} left {self._failed_in_a_row} queries in a row without an answer, "
                f"the last with {error}"
            )
        return Answer([], retries=attempt - 1 + refused, error=error)

    def _hold_back(self, wait_s: float, response: httpx.Response) -> None:
        now = perf_counter()
        self._not_before = max(self._not_before, now + wait_s)
        if self._refused_since is None:
            self._refused_since = now
        refused_s = self._not_before - self._refused_since
        if refused_s > MAX_REFUSED_S:
            raise EvaluationError(
                f"{self.url} answers nothing but 429, with the wait that it asks for now for {refused_s:.0f} s; "
                f"allowed: {MAX_REFUSED_S:.0f} ({_refusal(response)})"
            )


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


def _is_foreign(response: httpx.Response) -> bool:
    """Whether a proxy answers in the gateway's place: HAProxy's 500 for a fleet without one, say."""
    if response.status_code < 500:
        return False
    try:
        return not isinstance(response.json()["error"]["message"], str)
    except (ValueError, KeyError, TypeError):
        return True


def _retry_after_s(response: httpx.Response) -> float | None:
    """None where it is no number of seconds; a date or nonsense is not worth more than our own guess."""
    try:
        asked = float(response.headers.get("retry-after", ""))
    except ValueError:
        return None
    return asked if 0 <= asked < math.inf else None


def _refusal(response: httpx.Response) -> str:
    try:
        error = response.json()["error"]
        message = error["message"]
        if error.get("code") == "limit_exceeded" and error.get("param") in _OPTIONS:
            message += f"; {_OPTIONS[error['param']]}"
    except (ValueError, KeyError, TypeError, AttributeError):
        message = response.text[:200] or response.reason_phrase
    return f"{response.status_code}: {message}"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
