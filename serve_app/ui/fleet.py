"""What `/v1/fleet` said over time, and the Fleet tab's HTML of it. Pure."""

from collections import deque
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

from serve_app.ui import charts
from serve_app.ui.tables import table

Body = Mapping[str, Any]

SPAN_S = 300.0
# Ray's figures are renewed every ten seconds: a rate over less would jump between nothing and too much.
_RATE_S = 30.0
_LEAST_S = 2.0
_GOOD = ("RUNNING", "HEALTHY")


class History:
    """The last SPAN_S seconds of answers, at most one in _LEAST_S. One for all who look: they see the same."""

    def __init__(self) -> None:
        self._samples: deque[Body] = deque(maxlen=int(SPAN_S / _LEAST_S) + 1)

    def add(self, answer: Body) -> None:
        since_s = answer["at"] - self._samples[-1]["at"] if self._samples else _LEAST_S
        if since_s < -_RATE_S:
            # The clock was set back.
            self._samples.clear()
        elif since_s < _LEAST_S:
            return
        self._samples.append(answer)
        while answer["at"] - self._samples[0]["at"] > SPAN_S:
            self._samples.popleft()

    @property
    def samples(self) -> Sequence[Body]:
        return tuple(self._samples)


def per_s(samples: Sequence[Body], count: str) -> list[charts.Point]:
    """The rate of `calls[count]`, over the last _RATE_S at each sample; None where it can't be known."""
    points: list[charts.Point] = []
    start = 0
    for i, sample in enumerate(samples):
        while start < i and sample["at"] - samples[start]["at"] > _RATE_S:
            start += 1
        known = [(s["at"], s["calls"][count]) for s in samples[start : i + 1] if s["calls"]]
        if not sample["calls"] or len(known) < 2:
            points.append((sample["at"], None))
            continue
        # A node that left takes its counts along.
        grown = sum(max(0.0, later - earlier) for (_, earlier), (_, later) in pairwise(known))
        points.append((sample["at"], grown / (sample["at"] - known[0][0])))
    return points


def of_variant(samples: Sequence[Body], variant: str, name: str) -> list[charts.Point]:
    return [(s["at"], ((s["variants"] or {}).get(variant) or {}).get(name)) for s in samples]


def running(samples: Sequence[Body], application: str, deployment: str) -> list[charts.Point]:
    return [
        (
            s["at"],
            next(
                (
                    float(d["running"])
                    for app in s["applications"]
                    if app["name"] == application
                    for d in app["deployments"]
                    if d["name"] == deployment
                ),
                None,
            ),
        )
        for s in samples
    ]


def view(history: History) -> str:
    """The tab, of the newest answer and those before."""
    samples = history.samples
    newest = samples[-1]
    cards = [
        charts.card("Calls a second", per_s(samples, "answered"), "/s"),
        charts.card("Failed calls a second", per_s(samples, "failed"), "/s", "status 500 and above"),
        charts.card("Degraded stages a second", per_s(samples, "degraded"), "/s", "left out of an answer"),
    ]
    for app in newest["applications"]:
        if app["kind"] != "variant":
            continue
        name = app["name"]
        now = (newest["variants"] or {}).get(name) or {}
        target = now.get("target_drain_s")
        goal = "" if target is None else f"target {charts.number(target)} s"
        cards.append(charts.card(f"{name}: drain time", of_variant(samples, name, "drain_s"), "s", goal))
        cards.append(charts.card(f"{name}: replicas", running(samples, name, "Reranker")))
    missing = (
        '<p class="note">The metrics of a node could not be read: calls and drain times are not known.</p>'
        if newest["calls"] is None
        else ""
    )
    return (
        f'{missing}<div class="cards">{"".join(cards)}</div>{_shares(newest)}'
        f"<h3>What runs</h3>{_applications(newest)}"
    )


def _applications(answer: Body) -> str:
    rows = []
    for app in answer["applications"]:
        for deployment in app["deployments"]:
            status = app["status"] if app["status"] not in _GOOD else deployment["status"]
            good = "good" if status in _GOOD else "bad"
            others = ", ".join(
                f"{count} {state.lower()}" for state, count in deployment["states"].items() if state != "RUNNING"
            )
            share = (
                f"{deployment['num_gpus']:g} GPU" if deployment["num_gpus"] else f"{deployment['num_cpus']:g} CPU"
            )
            replicas = f"{deployment['running']} of {deployment['target']}" + (f" ({others})" if others else "")
            rows.append(
                f'<tr><th scope="row">{escape(app["name"])}</th><td>{escape(app["kind"])}</td>'
                f'<td><span class="state {good}">{escape(status)}</span></td>'
                f"<td>{escape(replicas)}</td><td>{share}</td></tr>"
            )
    return table(("application", "kind", "state", "replicas", "each"), rows)


def _shares(answer: Body) -> str:
    """A bar for each node with GPUs, a piece for each replica."""
    bars = []
    for node in answer["nodes"]:
        if not node["gpus"]:
            continue
        pieces, legend = [], []
        for i, (name, count, gpus) in enumerate(_on(answer, node["node"])):
            tone = f"tone{i % 6}"
            width = gpus / node["gpus"] * 100
            pieces += [f'<div class="{tone}" style="width:{width:.2f}%"></div>'] * count
            legend.append(f'<li><span class="dot {tone}"></span>{escape(name)} {count} × {gpus:g} GPU</li>')
        legend.append(f"<li>{node['gpus_used']:g} of {node['gpus']:g} GPUs in use</li>")
        bars.append(
            f'<div class="times"><p class="note">node {escape(node["node"])}</p>'
            f'<div class="stack" aria-hidden="true">{"".join(pieces)}</div>'
            f'<ul class="legend">{"".join(legend)}</ul></div>'
        )
    content = "".join(bars) or '<p class="note">No node has a GPU: replicas share CPUs.</p>'
    return f"<h3>GPU shares</h3>{content}"


def _on(answer: Body, node: str) -> list[tuple[str, int, float]]:
    """Applications with replicas on a GPU of the node: name, replicas, GPUs of each."""
    return [
        (app["name"], deployment["nodes"][node], deployment["num_gpus"])
        for app in answer["applications"]
        for deployment in app["deployments"]
        if deployment["num_gpus"] and node in deployment["nodes"]
    ]
