"""The gateway over HTTP, with the key of whoever is at the page, and its errors in words."""

import asyncio
from typing import Any
from urllib.parse import quote

import httpx

Body = dict[str, Any]

# Longer than the longest deadline that a gateway allows by default (limits.max_timeout_ms).
_TIMEOUT = httpx.Timeout(65.0, connect=5.0)
_LIMITS = httpx.Limits(max_connections=64)


class Trouble(Exception):
    """Why there is no answer, in words for whoever asked. `needs_key`: an API key, or another one, would help."""

    def __init__(self, message: str, needs_key: bool = False) -> None:
        super().__init__(message)
        self.needs_key = needs_key


class Gateway:
    """The gateway at `url`. Every method raises Trouble."""

    def __init__(self, url: str, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.url = url.rstrip("/")
        # Keys come with each call and stay with it; nothing of the machine's environment goes along.
        self._http = httpx.AsyncClient(
            timeout=_TIMEOUT, limits=_LIMITS, transport=transport, trust_env=False, follow_redirects=False
        )

    async def models(self, key: str) -> list[Body]:
        """Routes, pipelines and variants."""
        models: list[Body] = (await self._ask("GET", "/v1/models", key))["data"]
        return models

    async def search(self, key: str, body: Body) -> Body:
        return await self._ask("POST", "/v1/search", key, body)

    async def rerank(self, key: str, body: Body) -> Body:
        return await self._ask("POST", "/v1/rerank", key, body)

    async def fleet(self, key: str) -> Body:
        return await self._ask("GET", "/v1/fleet", key)

    async def rollouts(self, admin_key: str) -> list[Body]:
        """The newest first."""
        rollouts: list[Body] = (await self._ask("GET", "/v1/rollouts", admin_key, admin=True))["rollouts"]
        return rollouts

    async def rollout(self, admin_key: str, identity: str) -> tuple[Body, list[Body]]:
        """A rollout, and its history, the oldest first."""
        path = f"/v1/rollouts/{quote(identity, safe='')}"
        shown, history = await asyncio.gather(
            self._ask("GET", path, admin_key, admin=True),
            self._ask("GET", f"{path}/history", admin_key, admin=True),
        )
        return shown, history["history"]

    async def act(self, admin_key: str, identity: str, action: str) -> Body:
        path = f"/v1/rollouts/{quote(identity, safe='')}/{action}"
        return await self._ask("POST", path, admin_key, admin=True)

    async def _ask(self, method: str, path: str, key: str, body: Body | None = None, admin: bool = False) -> Body:
        headers = {"X-Operator": "page"} if admin else {}
        if key := (key or "").strip():
            if not (key.isascii() and key.isprintable()):
                raise Trouble("The key has characters that no key has.", needs_key=not admin)
            headers["Authorization"] = f"Bearer {key}"
        try:
            response = await self._http.request(method, f"{self.url}{path}", json=body, headers=headers)
        except UnicodeEncodeError:
            raise Trouble("What was entered has half a surrogate pair, which is no character.") from None
        except httpx.TimeoutException:
            raise Trouble(f"The gateway at {self.url} did not answer in time. Try again in a moment.") from None
        except (httpx.HTTPError, httpx.InvalidURL):
            raise Trouble(
                f"The gateway at {self.url} is not there: it may be down or just starting. Try again in a moment."
            ) from None
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise Trouble(_unreadable(self.url, response.status_code))
        if response.is_error:
            raise _trouble(response, answer, key, admin)
        return answer


def _unreadable(url: str, status: int) -> str:
    if status in (502, 503, 504):
        return f"The gateway at {url} has no replica that could answer ({status}). Try again in a moment."
    return f"What answers at {url} ({status}) is not a gateway of ours."


def _trouble(response: httpx.Response, answer: Body, key: str, admin: bool) -> Trouble:
    said = str(answer.get("message") or "no reason given")[:2000]
    wait = response.headers.get("retry-after", "")
    again = f" Try again in {wait} s." if wait.isdigit() else ""
    match response.status_code:
        case 401 if admin:
            return Trouble(
                "The gateway does not know this admin key."
                if key
                else "Rollouts need the admin key: enter it here."
            )
        case 401:
            return Trouble(
                "The gateway does not know this API key." if key else "The gateway wants an API key: enter yours.",
                needs_key=True,
            )
        case 403:
            return Trouble(f"Not open here: {said}")
        case 429:
            return Trouble(f"Too many calls: {said}.{again}")
        case 503:
            return Trouble(f"Nothing that could answer is up: {said}.{again}")
        case 504:
            return Trouble(f"Too late: {said}.")
        case status if status >= 500:
            return Trouble(f"A fault in the gateway: {said}")
    return Trouble(f"The gateway refused: {said}")
