"""Line charts as SVG, without scripts. Pure."""

from collections.abc import Sequence
from html import escape

Point = tuple[float, float | None]

_WIDTH, _HEIGHT = 300, 64
_LEAST_SPAN_S = 30.0


def card(title: str, points: Sequence[Point], unit: str = "", note: str = "") -> str:
    """A figure: what it is now, and a line of all `points`: seconds and values, None where there was none."""
    # A line that has just begun doesn't fill the width.
    span_s = max(_LEAST_SPAN_S, points[-1][0] - points[0][0]) if points else _LEAST_SPAN_S
    values = [value for _, value in points if value is not None]
    now = points[-1][1] if points else None
    shown = "–" if now is None else f"{number(now)}{f' {unit}' if unit else ''}"
    most = f"most {number(max(values))} in {_span(span_s)}" if values else "no figures yet"
    remark = " · ".join(filter(None, (most, note)))
    return (
        f'<figure class="card"><figcaption>{escape(title)}</figcaption><div class="now">{escape(shown)}</div>'
        f"{_line(points, span_s)}"
        f'<p class="note">{escape(remark)}</p></figure>'
    )


def _line(points: Sequence[Point], span_s: float) -> str:
    """Gaps stay gaps. The line ends at the right, however short it is."""
    if not points:
        return _svg("")
    end = points[-1][0]
    top = max([value for _, value in points if value is not None], default=0.0) or 1.0
    runs: list[list[str]] = [[]]
    for at, value in points:
        if value is None:
            runs.append([])
        else:
            x = _WIDTH * (1 - (end - at) / span_s)
            runs[-1].append(f"{x:.1f},{_HEIGHT - 2 - (_HEIGHT - 6) * max(0.0, value) / top:.1f}")
    # A single point would be invisible as a line.
    lines = [f'<polyline points="{" ".join(run if len(run) > 1 else run * 2)}"/>' for run in filter(None, runs)]
    return _svg("".join(lines))


def _svg(content: str) -> str:
    base = _HEIGHT - 1
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" aria-hidden="true">'
        f'<line x1="0" y1="{base}" x2="{_WIDTH}" y2="{base}"/>{content}</svg>'
    )


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}".rstrip("0").rstrip(".")
