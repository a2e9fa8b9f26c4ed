"""What operators see of a rollout: the gateway's answers as text and tables. Pure but for `out`."""

import re
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from serve_app.rollout.document import Step
from serve_app.rollout.guards import METRICS
from serve_app.rollout.machine import FINISHED

Body = dict[str, Any]

_COLOURS = {
    "promoted": "green",
    "rolled_back": "red",
    "aborted": "red",
    "inconclusive": "yellow",
    "paused": "yellow",
    "pass": "green",
    "fail": "red",
}
# Where one verdict of a reason ends and the next begins.
_NEXT_VERDICT = re.compile(rf"; (?=(?:{'|'.join(METRICS)}) (?:passes|fails|is inconclusive): )")


def out(console: Console, shown: RenderableType) -> None:
    """Without the blanks that fill tables up to the width."""
    if console.is_terminal:
        console.print(shown)
        return
    with console.capture() as capture:
        console.print(shown)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


def line(rollout: Body) -> Text:
    """A rollout in a line."""
    text = Text(f"{rollout['id']}: ")
    return text.append(rollout["state"], _COLOURS.get(rollout["status"], "bold"))


def started(rollout: Body) -> RenderableType:
    return Group(line(rollout), Text("watch it: serve-app rollout status --watch", "dim"))


def listed(rollouts: Sequence[Body]) -> RenderableType:
    if not rollouts:
        return Text("no rollouts")
    table = _table("id", "route", "stable", "canary", "state", "started")
    for rollout in rollouts:
        state = Text(rollout["state"], _COLOURS.get(rollout["status"], ""))
        begun = time.strftime("%Y-%m-%d %H:%M", time.localtime(rollout["created_at"]))
        table.add_row(rollout["id"], rollout["route"], rollout["stable"], rollout["canary"], state, begun)
    return table


def history(rollout: str, entries: Sequence[Body]) -> RenderableType:
    return Group(Text(rollout), *(transition(entry) for entry in entries))


def transition(entry: Body) -> RenderableType:
    """A change of state and why, every verdict on a line of its own."""
    why = [Padding(Text(part), (0, 0, 0, 10)) for part in _NEXT_VERDICT.split(entry["reason"])]
    return Group(Text(f"{clock(entry['at'])}  {entry['from_status']} → {entry['to_status']}"), *why)


def change(entry: Body) -> str:
    """A change of state in one line."""
    return f"{clock(entry['at'])}  {entry['to_status']}: {entry['reason']}"


def clock(at: float) -> str:
    """With the day where it isn't today."""
    then = time.localtime(at)
    return time.strftime("%H:%M:%S" if then[:3] == time.localtime()[:3] else "%Y-%m-%d %H:%M:%S", then)


def status(rollout: Body, entries: Sequence[Body], remark: str = "") -> RenderableType:
    """Everything about a rollout. `entries` is its history, `remark` a line below."""
    now = time.time()
    finished = rollout["status"] in FINISHED
    heading = Text(
        f"{rollout['id']}  {rollout['stable']} → {rollout['canary']} on route {rollout['route']}", "bold"
    )
    state = Text("state    ").append(rollout["state"], _COLOURS.get(rollout["status"], "bold"))
    state.append(f", for {_duration(now - rollout['since'])}")
    if rollout["until"] is not None:
        state.append(f", {_duration(rollout['until'] - now)} left")
    mirrored = f", {rollout['shadow']:.3g} of {rollout['stable']}'s calls mirrored" if rollout["shadow"] else ""
    weight = rollout["weight"]
    weights = Text(f"weights  {rollout['stable']} {100 - weight:g} %, {rollout['canary']} {weight:g} %")
    parts: list[RenderableType] = [heading, state, weights.append("" if finished else mirrored)]
    if entries:
        why = [Padding(Text(part), (0, 0, 0, 9)) for part in _NEXT_VERDICT.split(entries[-1]["reason"])[1:]]
        parts += [Text(f"because  {_NEXT_VERDICT.split(entries[-1]['reason'])[0]}"), *why]
    parts += [Text(), _steps(rollout)]
    if any(side["calls"] or side["mirrored"] for side in rollout["figures"].values()):
        parts += [Text(), _guards(rollout), Text(), _figures(rollout)]
    if remark:
        parts += [Text(), Text(remark, "yellow")]
    return Group(*parts)


def _steps(rollout: Body) -> RenderableType:
    table = _table("", "step", "")
    at, status, steps = rollout["step"], rollout["status"], rollout["document"]["steps"]
    for i, raw in enumerate(steps):
        # Left out, also the rest of a step that a promotion cut short.
        mark, style = ("–", "dim") if status in FINISHED else ("", "")
        if i < at or (i == at == len(steps) - 1 and status == "promoted"):
            mark, style = "✓", "dim"
        elif i == at and status != "promoted":
            mark, style = ("✗", "red") if status in FINISHED else ("▶", "bold")
        step = Step.model_validate(raw)
        what = ""
        if step.set_weight is not None:
            what = f"{step.set_weight:g} %"
        elif step.pause is not None:
            what = "until resumed" if step.pause.duration_s is None else f"for {_duration(step.pause.duration_s)}"
        elif step.analysis is not None:
            what = f"until all guards pass, {_duration(step.analysis.timeout_s)} at most"
        table.add_row(mark, f"{i + 1} {step.kind}", what, style=style)
    return table


def _guards(rollout: Body) -> RenderableType:
    table = _table("guard", "canary", "stable", "value", "allowed", "samples", "of", "outcome")
    for column in table.columns[1:7]:
        column.justify = "right"
    for verdict in rollout["guards"]:
        metric = verdict["metric"]
        sign = "≥" if METRICS[metric].source == "mirror" else "≤"
        outcome = Text(verdict["outcome"], _COLOURS.get(verdict["outcome"], "dim"))
        if in_a_row := rollout["streaks"].get(metric):
            outcome.append(f", {in_a_row} in a row")
        samples = f"{verdict['canary_samples']:,}"
        if METRICS[metric].source != "mirror":
            samples += f" / {verdict['stable_samples']:,}"
        side = _ms if metric.startswith("latency") else _share if metric.endswith("_rate") else _number
        value = _share if metric.endswith("_rate") else _number
        table.add_row(
            metric,
            side(verdict["canary"]),
            side(verdict["stable"]),
            value(verdict["value"]),
            f"{sign} {value(verdict['threshold'])}",
            samples,
            f"{verdict['min_samples']:,}",
            outcome,
        )
    return table


def _figures(rollout: Body) -> RenderableType:
    table = _table("", "calls", "errors", "degraded", "p50", "p95", "mirrored", "failed")
    for column in table.columns[1:]:
        column.justify = "right"
    for role in ("canary", "stable"):
        side = rollout["figures"][role]
        counts = [f"{side[name]:,}" for name in ("calls", "errors", "degraded")]
        failed = side["mirrored_errors"] + side["mirrored_degraded"]
        mirrored = [f"{n:,}" for n in (side["mirrored"], failed)] if role == "canary" else []
        table.add_row(rollout[role], *counts, _ms(side["p50_ms"]), _ms(side["p95_ms"]), *mirrored)
    return table


def _table(*heads: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim", show_header=any(heads))
    for head in heads:
        table.add_column(head, no_wrap=True)
    return table


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f} ms" if value >= 10 else f"{value:.2g} ms"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value * 100:.3g} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _duration(seconds: float) -> str:
    """`1 h 5 min`, `2 min 10 s`, `12 s`."""
    left = max(0, round(seconds))
    if left < 60:
        return f"{left} s"
    large, small, units = (
        (left // 3600, left % 3600 // 60, ("h", "min")) if left >= 3600 else (left // 60, left % 60, ("min", "s"))
    )
    return f"{large} {units[0]}" + (f" {small} {units[1]}" if small else "")
