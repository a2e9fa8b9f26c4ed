"""A comparison as a table, as JSON, and as a picture."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from serve_app.autoscaling.compare import Comparison, Row
from serve_app.autoscaling.traces import Floats

# Points of a curve in JSON and in pictures.
_MOST_POINTS = 600
# Shares of misses below this are not compared.
_LEAST_SHARE = 1e-3
_HEAD = (
    "policy",
    "SLO met",
    "missed",
    "expired",
    "p50 ms",
    "p95 ms",
    "p99 ms",
    "GPU-h",
    "node GPU-h",
    "peak",
    "busy",
)


def table(comparisons: Sequence[Comparison]) -> str:
    """A block a trace: policies by line, then how drain-time stands beside Serve's policy and beside what no
    reaction avoids, and Serve's settings."""
    blocks = []
    for comparison in comparisons:
        trace = comparison.trace
        lines = [_HEAD, *(_cells(row) for row in comparison.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(_HEAD))]
        block = [
            f"{trace.name}: {trace.seconds / 3600:.3g} h, {comparison.rows[0].mean('calls'):,.0f} calls, "
            f"SLO {comparison.slo_s * 1000:g} ms"
        ]
        for line in lines:
            cells = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
            block.append("  " + "  ".join(cells))
        blocks.append("\n".join([*block, *_remarks(comparison)]))
    return "\n\n".join(blocks)


def as_json(comparisons: Sequence[Comparison]) -> str:
    """All of the tables' numbers, the settings, and the curves of each policy's first draw."""
    return json.dumps([_comparison_json(comparison) for comparison in comparisons], indent=1)


def plot(comparison: Comparison, path: Path) -> None:
    """A PNG: tokens that arrive and replicas over time, and misses adding up. Raises ImportError without
    matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    trace = comparison.trace
    unit, name = (3600.0, "hours") if trace.seconds > 7200 else (60.0, "minutes")
    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    load, replicas, misses = figure.subplots(3, 1, sharex=True, height_ratios=(1, 2, 1))
    load.fill_between(trace.starts_s / unit, trace.tokens_per_s / 1e6, step="post", alpha=0.4, color="grey")
    load.set_ylabel("million tokens/s")
    load.set_title(f"{trace.name}: SLO {comparison.slo_s * 1000:g} ms")
    for row in comparison.rows:
        points, missed = _curves(row)
        label = f"{row.name}: {row.missed_share:.2%} missed, {row.mean('gpu_hours'):.1f} GPU-h"
        style = ":" if row.name.startswith(("fixed", "instant")) else "-"
        replicas.step(points["seconds"] / unit, points["running"], style, where="post", label=label, linewidth=1.3)
        misses.plot(points["seconds"] / unit, missed * 100, style, linewidth=1.3)
    replicas.set_ylabel("running replicas")
    misses.set_ylabel("missed so far, %\nof all calls")
    misses.set_xlabel(name)
    figure.legend(*replicas.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=80)


def _cells(row: Row) -> tuple[str, ...]:
    def ms(name: str) -> str:
        return f"{row.mean(name) * 1000:,.0f}"

    return (
        row.name,
        f"{1 - row.missed_share:.2%}",
        f"{row.missed_share:.2%}",
        f"{row.mean('expired') / max(row.mean('calls'), 1):.2%}",
        ms("p50_s"),
        ms("p95_s"),
        ms("p99_s"),
        f"{row.mean('gpu_hours'):,.2f}",
        f"{row.mean('node_gpu_hours'):,.2f}",
        f"{row.mean('peak_replicas'):.0f}",
        f"{row.mean('utilization'):.0%}",
    )


def _remarks(comparison: Comparison) -> list[str]:
    ours, instant = comparison.row("drain-time"), comparison.row("instant")
    remarks = []
    for row in comparison.rows:
        if not row.name.startswith("Serve, tuned"):
            continue
        settings = ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
                             for name, value in row.settings.items())  # fmt: skip
        remarks.append(f"  {row.name}: {settings}")
        if ours is not None and row.missed_share > _LEAST_SHARE:
            remarks.append(
                f"  drain-time misses {ours.missed_share / row.missed_share:.2f} times as much as that, "
                f"at {ours.mean('gpu_hours') / row.mean('gpu_hours'):.2f} times the GPU-hours "
                f"({ours.mean('node_gpu_hours') / row.mean('node_gpu_hours'):.2f} times the nodes')"
            )
    if ours is not None and instant is not None and ours.missed_share > _LEAST_SHARE:
        remarks.append(
            f"  instant reaction misses {instant.missed_share / ours.missed_share:.0%} of what drain-time misses, "
            f"at {instant.mean('gpu_hours') / ours.mean('gpu_hours'):.2f} times the GPU-hours"
        )
    return remarks


def _comparison_json(comparison: Comparison) -> dict[str, Any]:
    numbers = (
        "calls", "missed_share", "expired", "still_open", "p50_s", "p95_s", "p99_s",
        "gpu_hours", "node_gpu_hours", "peak_replicas", "utilization",
    )  # fmt: skip
    policies = []
    for row in comparison.rows:
        points, missed = _curves(row)
        curves = {name: np.round(values, 2).tolist() for name, values in points.items()}
        policies.append(
            {
                "policy": row.name,
                "settings": row.settings,
                **{name: row.mean(name) for name in numbers},
                "timeline": {**curves, "missed_share_so_far": np.round(missed, 6).tolist()},
            }
        )
    return {"trace": comparison.trace.name, "slo_s": comparison.slo_s, "policies": policies}


def _curves(row: Row) -> tuple[dict[str, Floats], Floats]:
    """The first draw's timeline, thinned, and the share of all calls that were missed by each of its moments."""
    result = row.results[0]
    timeline, missed = result.timeline, result.answers.missed
    chosen = np.unique(np.linspace(0, len(timeline.seconds) - 1, _MOST_POINTS).astype(int))
    points = {name: getattr(timeline, name)[chosen] for name in timeline.__slots__}
    tick_s = timeline.seconds[-1] / len(missed)
    ticks = np.clip((points["seconds"] / tick_s).astype(int), 0, len(missed)) - 1
    so_far = np.where(ticks >= 0, missed.cumsum()[np.maximum(ticks, 0)], 0.0)
    return points, np.asarray(so_far / max(result.calls, 1))
