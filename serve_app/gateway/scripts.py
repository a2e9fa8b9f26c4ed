"""Which writing systems a query uses, so that a model is not asked about a language it never saw."""

from collections.abc import Sequence
from functools import lru_cache

import regex

_PROPERTIES = {
    "CJK": r"\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\p{Bopomofo}",
}


def foreign_letter(text: str, scripts: Sequence[str]) -> str | None:
    """The first letter of `text` outside `scripts`; None if there is none or `scripts` is empty (all)."""
    if not scripts or (text.isascii() and "Latin" in scripts):
        return None
    match = _outside(tuple(scripts)).search(text)
    return match.group() if match else None


@lru_cache(maxsize=64)
def _outside(scripts: tuple[str, ...]) -> "regex.Pattern[str]":
    inside = "".join(_PROPERTIES.get(script, rf"\p{{{script}}}") for script in scripts)
    return regex.compile(rf"[\p{{L}}--[{inside}\p{{Common}}\p{{Inherited}}]]", regex.V1)
