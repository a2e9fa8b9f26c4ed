"""Tables as HTML. Pure."""

from collections.abc import Sequence
from html import escape


def table(heads: Sequence[str], rows: Sequence[str]) -> str:
    """Of rows that are HTML; it scrolls by itself where the screen is narrow."""
    cells = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{cells}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
