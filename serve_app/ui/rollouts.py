"""The Rollouts tab's HTML, of the gateway's answers. Pure."""

import time
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from serve_app.ui.markup import milliseconds
from serve_app.ui.tables import table

Body = Mapping[str, Any]

ACTIONS = ("pause", "resume", "promote", "abort", "undo")
_FINISHED = ("promoted", "rolled_back", "aborted")
_KINDS = {
    "promoted": "good",
    "pass": "good",
    "rolled_back": "bad",
    "aborted": "bad",
    "fail": "bad",
    "inconclusive": "waits",
    "paused": "waits",
}


def choices(rollouts: Sequence[Body]) -> list[tuple[str, str]]:
    """For a list to choose from, the newest first: what it shows, and the id."""
    return [
        (
            f"{r['route']}: {r['stable']} → {r['canary']}, "
            # What goes on would be out of date in a list.
            f"{r['status'].replace('_', ' ') if r['status'] in _FINISHED else 'under way'} ({r['id']})",
            r["id"],
        )
        for r in rollouts
    ]


def view(rollout: Body, history: Sequence[Body], now: float) -> str:
    """A rollout: state, weights, steps, guards with their samples, figures and history."""
    status = rollout["status"]
    left = "" if rollout["until"] is None else f", {_duration(rollout['until'] - now)} left"
    head = (
        f'<p class="origin" role="status"><span class="state {_KINDS.get(status, "runs")}">'
        f"{escape(status.replace('_', ' '))}</span> {escape(rollout['state'])}, "
        f"for {_duration(now - rollout['since'])}{left}</p>"
    )
    reason = f'<p class="note">{escape(history[-1]["reason"])}</p>' if history else ""
    return (
        f"{head}{reason}{_weights(rollout)}<h3>Steps</h3>{_steps(rollout)}"
        f"<h3>Guards</h3>{_guards(rollout)}<h3>Since the weight was last changed</h3>{_figures(rollout)}"
        f"<h3>History (UTC)</h3>{_history(history, now)}"
    )


def _weights(rollout: Body) -> str:
    weight = float(rollout["weight"])
    stable, canary = escape(rollout["stable"]), escape(rollout["canary"])
    mirrored = ""
    if rollout["shadow"] and rollout["status"] not in _FINISHED:
        mirrored = f"<li>{rollout['shadow'] * 100:g} % of {stable}'s calls are mirrored to {canary}</li>"
    return (
        f'<div class="times"><div class="stack" aria-hidden="true">'
        f'<div class="tone0" style="width:{100 - weight:g}%"></div>'
        f'<div class="tone1" style="width:{weight:g}%"></div></div>'
        f'<ul class="legend"><li><span class="dot tone0"></span>{stable} {100 - weight:g} %</li>'
        f'<li><span class="dot tone1"></span>{canary} {weight:g} %</li>{mirrored}</ul></div>'
    )


def _steps(rollout: Body) -> str:
    at, status = rollout["step"], rollout["status"]
    steps = rollout["document"].get("steps") or ()
    items = []
    for i, step in enumerate(steps):
        if i < at or (i == at == len(steps) - 1 and status == "promoted"):
            mark, kind, words = "✓", "done", "done"
        elif i == at and status == "promoted":
            mark, kind, words = "–", "", "cut short by the promotion"
        elif i == at:
            mark, kind, words = ("✗", "bad", "ended here") if status in _FINISHED else ("▶", "now", "under way")
        else:
            mark, kind, words = ("–", "", "left out") if status in _FINISHED else ("", "", "to come")
        items.append(
            f'<li class="{kind}"><span aria-hidden="true">{mark}</span> {escape(_step(step))}'
            f'<span class="unseen"> ({words})</span></li>'
        )
    return f'<ol class="steps">{"".join(items)}</ol>'


def _step(step: Body) -> str:
    if step.get("set_weight") is not None:
        return f"{step['set_weight']:g} % for the canary"
    if step.get("pause") is not None:
        seconds = step["pause"].get("duration_s")
        return "pause until resumed" if seconds is None else f"pause for {_duration(seconds)}"
    if step.get("analysis") is not None:
        seconds = step["analysis"].get("timeout_s")
        return "analysis" + ("" if seconds is None else f", {_duration(seconds)} at most")
    return "step"


def _guards(rollout: Body) -> str:
    """Each with its verdict in a sentence, and a bar of the samples that it has of those that it needs."""
    items = []
    for verdict in rollout["guards"]:
        needs = max(1, verdict["min_samples"])
        has = verdict["canary_samples"]
        if verdict["stable_samples"]:
            has = min(has, verdict["stable_samples"])
        failures = rollout["streaks"].get(verdict["metric"])
        outcome = verdict["outcome"] + (f", {failures} in a row" if failures else "")
        items.append(
            f'<li><div class="head"><span class="title">{escape(verdict["metric"])}</span>'
            f'<span class="state {_KINDS.get(verdict["outcome"], "runs")}">{escape(outcome)}</span>'
            '</div><div class="score"><div class="track">'
            f'<div class="fill" style="width:{min(1, has / needs) * 100:.0f}%"></div></div>'
            f'<span class="value">{has:,} samples, {verdict["min_samples"]:,} needed</span></div>'
            f'<p class="text">{escape(verdict["text"])}</p></li>'
        )
    return f'<ul class="results guards">{"".join(items)}</ul>' if items else '<p class="note">There are none.</p>'


def _figures(rollout: Body) -> str:
    rows = []
    for role in ("stable", "canary"):
        side = rollout["figures"][role]
        cells = [f"{side[name]:,}" for name in ("calls", "errors", "degraded")]
        cells += ["–" if side[name] is None else milliseconds(side[name]) for name in ("p50_ms", "p95_ms")]
        cells.append(f"{side['mirrored']:,}" if role == "canary" else "")
        rows.append(
            f'<tr><th scope="row">{escape(rollout[role])}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        )
    return table(("", "calls", "errors", "degraded", "p50", "p95", "mirrored"), rows)


def _history(entries: Sequence[Body], now: float) -> str:
    """The newest first."""
    items = [
        f"<li><time>{_clock(entry['at'], now)}</time> "
        f"<b>{escape(entry['to_status'])}</b><div class='text'>{escape(entry['reason'])}</div></li>"
        for entry in reversed(entries)
    ]
    return f'<ol class="history">{"".join(items)}</ol>'


def _clock(at: float, now: float) -> str:
    """In UTC, with the day where it isn't today."""
    then = time.gmtime(at)
    return time.strftime("%H:%M:%S" if then[:3] == time.gmtime(now)[:3] else "%Y-%m-%d %H:%M:%S", then)


def _duration(seconds: float) -> str:
    left = max(0, round(seconds))
    if left < 60:
        return f"{left} s"
    if left < 3600:
        return f"{left // 60} min" + (f" {left % 60} s" if left % 60 else "")
    return f"{left // 3600} h" + (f" {left % 3600 // 60} min" if left % 3600 // 60 else "")
