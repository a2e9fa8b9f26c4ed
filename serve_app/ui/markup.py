"""The page's results as HTML. Pure; whatever comes from outside is escaped here."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from serve_app.ui.orders import Move, agreement, came, ranks, shares, went

Body = Mapping[str, Any]

_TEXT_CHARS = 160
# Colours of stages, in turn (style.css).
_TONES = 6


def notice(message: str, kind: str = "error") -> str:
    """A line that is read out when it appears. `kind`: error, warning or note."""
    role = "alert" if kind == "error" else "status"
    return f'<div class="notice {kind}" role="{role}">{escape(message)}</div>'


def empty(message: str) -> str:
    return f'<p class="empty">{escape(message)}</p>'


# ---- search


def search(recalled: Body, found: Body) -> str:
    """BM25's order beside the answer's, with what moved. Both are answers to /v1/search, the second with
    `explain`."""
    before = {result["id"]: rank for rank, result in enumerate(recalled["results"], 1)}
    after = {result["id"]: rank for rank, result in enumerate(found["results"], 1)}
    left = results(
        recalled["results"],
        [result["score"] for result in recalled["results"]],
        [went(rank, after.get(result["id"])) for rank, result in enumerate(recalled["results"], 1)],
        leaving=True,
    )
    moves = []
    for rank, result in enumerate(found["results"], 1):
        moves.append(came(rank, before.get(result["id"]) or _recall_rank(result)))
    right = results(found["results"], [result["score"] for result in found["results"]], moves)
    failed = {entry["stage"] for entry in found["meta"].get("degraded") or ()}
    stages = [stage for stage in found["meta"]["stages"][1:] if not stage.get("skipped")]
    reranked = [stage for stage in stages if stage["name"] not in failed]
    title = "Reranked" if reranked else "Answer (nothing reranked it)"
    return (
        f"{degraded(found['meta'])}{origin(found['meta'])}{stage_times(found['meta'])}"
        f'<div class="columns">{column("BM25", left)}{column(title, right)}</div>'
    )


def _recall_rank(result: Body) -> int | None:
    return next((stage["rank"] for stage in result.get("stages") or () if stage["stage"] == "recall"), None)


def column(title: str, content: str, note: str = "") -> str:
    noted = f'<p class="note">{note}</p>' if note else ""
    return f'<section class="column"><h3>{escape(title)}</h3>{noted}{content}</section>'


def results(
    found: Sequence[Body], scores: Sequence[float], moves: Sequence[Move | None], leaving: bool = False
) -> str:
    """An ordered list; `leaving`: the moves say where the documents went, not where they came from."""
    if not found:
        return empty("No documents match.")
    rows = [
        _result(result, score, share, move, leaving)
        for result, score, share, move in zip(found, scores, shares(scores), moves, strict=True)
    ]
    return f'<ol class="results">{"".join(rows)}</ol>'


def _result(result: Body, score: float, share: float, move: Move | None, leaving: bool) -> str:
    text = str(result.get("text") or "")
    title = str(result.get("title") or "") or _cut(text)
    body = f'<p class="text">{escape(_cut(text))}</p>' if result.get("title") and text else ""
    scored = [
        f"{name} {_number(result[key])}"
        for name, key in (("BM25", "recall_score"), ("rerank", "rerank_score"))
        if result.get(key) is not None
    ]
    identity = escape(str(result.get("id", "")))
    moved = arrow(move, leaving) if move else ""
    return (
        f'<li><div class="head"><span class="title">{escape(title)}</span>{moved}</div>'
        f"{body}{bar(score, share)}"
        f'<p class="facts"><span class="id">{identity}</span> {escape(" · ".join(scored))}</p></li>'
    )


def arrow(move: Move, leaving: bool = False) -> str:
    """The move as a sign, and in words for those who don't see it."""
    match move.direction:
        case "same":
            sign, words = "=", "in the same place"
        case "new":
            sign, words = "new", "not in the other order"
        case "gone":
            sign, words = "▼ out", "not in the other order's first places"
        case direction:
            sign = f"{'▲' if direction == 'up' else '▼'} {move.places}"
            words = f"{direction} {move.places}, {'to' if leaving else 'from'} place {move.other}"
    return (
        f'<span class="move {move.direction}" title="{words}"><span aria-hidden="true">{sign}</span>'
        f'<span class="unseen">{words}</span></span>'
    )


def bar(score: float, share: float) -> str:
    return (
        f'<div class="score"><div class="track"><div class="fill" style="width:{share * 100:.1f}%"></div></div>'
        f'<span class="value">{_number(score)}</span></div>'
    )


def degraded(meta: Body) -> str:
    """What the answer goes without, and what was left out on purpose; nothing where it is whole."""
    lines = [
        notice(f"Not the full answer: {entry['stage']} did not contribute ({entry['detail']}).", "warning")
        for entry in meta.get("degraded") or ()
    ]
    lines += [
        notice(f"{stage['name']} was left out on purpose: {stage['skipped']}.", "note")
        for stage in meta["stages"]
        if stage.get("skipped")
    ]
    return "".join(lines)


def origin(meta: Body) -> str:
    """Who answered, and why this one."""
    parts = [
        f"route <b>{escape(str(meta['route']))}</b>" if meta.get("route") else "",
        f"pipeline <b>{escape(str(meta['pipeline']))}</b>" if meta.get("pipeline") else "",
        {"forced": "as asked for", "fallback": "stable, in place of a canary that failed"}.get(
            str(meta.get("why")), ""
        ),
    ]
    rollout = meta.get("rollout")
    if rollout:
        parts.append(f"{escape(str(rollout['role']))} of rollout {escape(str(rollout['id']))}")
    return f'<p class="origin">{" · ".join(filter(None, parts))}</p>'


def stage_times(meta: Body) -> str:
    """How long each stage took, as one bar over the whole call."""
    stages = [(str(stage["name"]), float(stage["took_ms"]), stage) for stage in meta["stages"]]
    total = max(float(meta["took_ms"]), sum(took for _, took, _ in stages), 1e-6)
    parts, legend = [], []
    for i, (name, took, stage) in enumerate(stages):
        tone = f"tone{i % _TONES}"
        parts.append(f'<div class="{tone}" style="width:{took / total * 100:.2f}%"></div>')
        hits = stage.get("cache_hits") or 0
        pairs = f", {stage['pairs']} pairs" if stage.get("pairs") else ""
        pairs += f" ({hits} from the cache)" if hits else ""
        pairs += " from the cache" if stage.get("cached") else ""
        legend.append(f'<li><span class="dot {tone}"></span>{escape(name)} {milliseconds(took)}{pairs}</li>')
    legend.append(f"<li>in all {milliseconds(float(meta['took_ms']))}</li>")
    return (
        f'<div class="times"><div class="stack" aria-hidden="true">{"".join(parts)}</div>'
        f'<ul class="legend">{"".join(legend)}</ul></div>'
    )


# ---- compare


def compare(names: Sequence[str], answers: Sequence[Body | str]) -> str:
    """A column each; an answer that is a string says why there is none. Differences are to the first that
    answered."""
    base = next((answer for answer in answers if not isinstance(answer, str)), None)
    base_order = [result["id"] for result in base["results"]] if base else []
    base_ranks = ranks(base_order)
    columns = []
    for name, answer in zip(names, answers, strict=True):
        if isinstance(answer, str):
            columns.append(column(name, notice(answer)))
            continue
        order = [result["id"] for result in answer["results"]]
        moves: list[Move | None]
        if answer is base:
            elsewhere = [
                {r["id"] for r in other["results"]}
                for other in answers
                if not isinstance(other, str) and other is not base
            ]
            moves = [
                Move("gone") if elsewhere and not any(document in ids for ids in elsewhere) else None
                for document in order
            ]
            note = f"the others are compared with this one · {milliseconds(float(answer['meta']['took_ms']))}"
        else:
            moves = [came(rank, base_ranks.get(document)) for rank, document in enumerate(order, 1)]
            agreed = agreement(base_order, order)
            first = "same first" if agreed.same_first else "another first"
            note = (
                f"{agreed.shared} of {agreed.of} in both · {first} · "
                f"{milliseconds(float(answer['meta']['took_ms']))}"
            )
        listed = results(answer["results"], [result["score"] for result in answer["results"]], moves)
        columns.append(column(name, degraded(answer["meta"]) + listed, escape(note)))
    return f'<div class="columns many">{"".join(columns)}</div>'


# ---- rerank


def reranked(query: str, texts: Sequence[tuple[str, str]], answer: Body) -> str:
    """`texts`: id and text of the documents that were sent, in their order."""
    found = [{"id": texts[result["index"]][0], "text": texts[result["index"]][1]} for result in answer["results"]]
    scores = [float(result["relevance_score"]) for result in answer["results"]]
    moves: list[Move | None] = [came(rank, r["index"] + 1) for rank, r in enumerate(answer["results"], 1)]
    content = degraded(answer["meta"]) + stage_times(answer["meta"]) + results(found, scores, moves)
    return column(query, content)


# ---- words and numbers


def milliseconds(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 10 else f"{value:.2g} ms"


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"


def _cut(text: str) -> str:
    return text if len(text) <= _TEXT_CHARS else text[: _TEXT_CHARS - 1].rstrip() + "…"
