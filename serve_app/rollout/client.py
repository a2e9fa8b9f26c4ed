"""An operator's side of `/v1/rollouts`, over HTTP."""

import getpass
from typing import Any
from urllib.parse import quote

import httpx

from serve_app.access import ADMIN_KEY, bearer, is_elsewhere, shown, why_uncallable

# Longer than the gateway waits for a controller.
_TIMEOUT_S = 20.0
# Answers of the gateway's own that asking again does not change.
_FINAL = ("unauthorized", "forbidden", "not_found", "conflict", "invalid_request", "limit_exceeded")

Body = dict[str, Any]


class CommandError(Exception):
    """Why a command could not be done, and what to do. `code` is the exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


class AwayError(CommandError):
    """Nobody could answer, which may pass."""


class Control:
    """`/v1/rollouts` of the gateway at `url`. Every method raises CommandError."""

    def __init__(self, url: str, transport: httpx.BaseTransport | None = None) -> None:
        try:
            key = bearer(ADMIN_KEY)
        except ValueError as error:
            raise CommandError(str(error)) from None
        if not key:
            raise CommandError(
                f"{ADMIN_KEY} is not set; rollouts need the admin key that the gateway was started with"
            )
        self.url, self._base = shown(url.rstrip("/")), url.rstrip("/")
        headers = {**key, "X-Operator": _login()}
        try:
            self._http = httpx.Client(
                headers=headers, timeout=_TIMEOUT_S, transport=transport, trust_env=is_elsewhere(url)
            )
        # ImportError: a proxy of the environment for which httpx lacks something.
        except (ValueError, ImportError) as error:
            raise CommandError(f"can't call {self.url!r}: {error}") from None

    def start(self, document: Body) -> Body:
        return self._ask("state", "POST", "", document)

    def recent(self, route: str | None = None) -> list[Body]:
        """The newest first."""
        params = {"route": route} if route else None
        rollouts: list[Body] = self._ask("rollouts", "GET", "", params=params)["rollouts"]
        return rollouts

    def show(self, rollout: str) -> Body:
        return self._ask("state", "GET", f"/{_quoted(rollout)}")

    def history(self, rollout: str) -> list[Body]:
        """The oldest first."""
        entries: list[Body] = self._ask("history", "GET", f"/{_quoted(rollout)}/history")["history"]
        return entries

    def act(self, rollout: str, action: str) -> Body:
        return self._ask("state", "POST", f"/{_quoted(rollout)}/{action}")

    def _ask(
        self, field: str, method: str, path: str, body: Body | None = None, params: dict[str, str] | None = None
    ) -> Body:
        """An answer that has `field`."""
        try:
            response = self._http.request(method, f"{self._base}/v1/rollouts{path}", json=body, params=params)
        except (httpx.InvalidURL, httpx.UnsupportedProtocol, UnicodeError) as error:
            why = why_uncallable(self._base, error)
            raise CommandError(f"--url is {self.url!r}: {why}; allowed: http://HOST:PORT", 2) from None
        except httpx.HTTPError as error:
            raise AwayError(f"no answer from {self.url}: {error}; is it up? (serve-app up CONFIG)") from None
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict) or (response.is_success and field not in answer):
            what = f"{self.url}/v1/rollouts{path} answered {response.status_code}"
            raise AwayError(f"{what} with something that is no JSON object of ours; is a gateway of ours there?")
        if response.is_error:
            fault = answer.get("error")
            final = isinstance(fault, dict) and fault.get("code") in _FINAL
            message = f"{response.status_code}: {answer.get('message', answer)}"
            if response.status_code == 401:
                message += f"; {ADMIN_KEY} is not the key that the gateway was started with"
            raise (CommandError if final else AwayError)(message)
        return answer


def _login() -> str:
    try:
        return getpass.getuser().encode("ascii", "replace").decode()
    except (OSError, KeyError):
        return ""


def _quoted(rollout: str) -> str:
    return quote(rollout, safe="")
