"""What a call may ask for. Every check raises ApiError, naming the field and the limit that it broke."""

from collections.abc import Sequence

from serve_app.config import GatewaySettings
from serve_app.gateway.errors import ApiError


def limit(settings: GatewaySettings, name: str, seen: int, param: str, unit: str = "") -> None:
    """Refuses `seen` of `param` when it is over `limits.<name>`."""
    allowed: int = getattr(settings.limits, name)
    if seen > allowed:
        what = f"has {seen} {unit}" if unit else f"is {seen}"
        raise ApiError("limit_exceeded", f"{param} {what}; limits.{name} is {allowed}", param=param)


def check_query(settings: GatewaySettings, query: str, param: str = "query") -> None:
    if is_blank(query):
        raise ApiError("invalid_request", f"{param} is empty", param=param)
    limit(settings, "max_query_chars", len(query), param, "characters")


def check_documents(settings: GatewaySettings, documents: Sequence[str], param: str = "documents") -> None:
    """Blank documents among others are let through: they are ranked last, and no model sees them."""
    if not documents:
        raise ApiError("invalid_request", f"{param} is empty", param=param)
    limit(settings, "max_documents", len(documents), param, "documents")
    if max(map(len, documents)) > settings.limits.max_document_chars:
        for i, document in enumerate(documents):
            limit(settings, "max_document_chars", len(document), f"{param}[{i}]", "characters")
    if all(map(is_blank, documents)):
        raise ApiError("invalid_request", f"{param} holds nothing but blank texts", param=param)


def is_blank(text: str) -> bool:
    return not text or text.isspace()
