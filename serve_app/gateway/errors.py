"""Every error a client can see, with one body for all.

The body carries `message` where Cohere's client looks, `error.{message,type,param,code}` where OpenAI's does, and
`detail` where those of Jina and Xinference do.
"""

from typing import Any

# (status, OpenAI `type`) by code. The table in the README is this one; a test compares them.
CODES: dict[str, tuple[int, str]] = {
    "invalid_json": (400, "invalid_request_error"),
    "invalid_request": (400, "invalid_request_error"),
    "limit_exceeded": (400, "invalid_request_error"),
    "prompt_too_long": (400, "invalid_request_error"),
    "unauthorized": (401, "authentication_error"),
    "forbidden": (403, "permission_error"),
    "model_not_found": (404, "not_found_error"),
    "not_found": (404, "not_found_error"),
    "conflict": (409, "invalid_request_error"),
    "method_not_allowed": (405, "invalid_request_error"),
    "body_too_slow": (408, "timeout_error"),
    "body_too_large": (413, "invalid_request_error"),
    "unsupported_encoding": (415, "invalid_request_error"),
    "too_many_requests": (429, "rate_limit_error"),
    "rate_limited": (429, "rate_limit_error"),
    "internal_error": (500, "api_error"),
    "unavailable": (503, "overloaded_error"),
    "overloaded": (503, "overloaded_error"),
    "deadline_exceeded": (504, "timeout_error"),
}


class ApiError(Exception):
    """An answer that is not a result. `param` is the path of the field at fault, such as `documents[3]`."""

    def __init__(
        self, code: str, message: str, *, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.status, self.type = CODES[code]

    def body(self, request_id: str) -> dict[str, Any]:
        return {
            "message": self.message,
            "detail": self.message,
            "error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code},
            "id": request_id,
        }
