"""What the page does when somebody asks: calls to the gateway with their key, and HTML of the answers.

Knows no Gradio. Values come from browsers, which may send anything.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from serve_app.ui import fleet, markup, rollouts
from serve_app.ui.client import Body, Gateway, Trouble
from serve_app.ui.documents import Batch, DocumentsError, Ranked, read, to_csv

MAX_SHOWN = 50
MAX_COMPARED = 4
# Of a batch, what is shown; the CSV has all.
_SHOWN_QUERIES, _SHOWN_DOCUMENTS = 10, 20
_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class Names:
    """What `model` may be, with the routes first."""

    all: tuple[str, ...]
    rerankers: tuple[str, ...]


class Actions:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._history = fleet.History()

    async def names(self, key: str) -> Names:
        """Raises Trouble."""
        models = await self._gateway.models(key)
        by_kind: dict[str, list[str]] = {"route": [], "pipeline": [], "variant": []}
        for model in models:
            by_kind.setdefault(str(model["kind"]), []).append(str(model["id"]))
        routes = sorted(by_kind["route"], key=lambda name: name != "default")
        pipelines = [model for model in models if model["kind"] == "pipeline"]
        ranking = [str(model["id"]) for model in pipelines if model.get("stages")]
        return Names(
            all=(*routes, *by_kind["pipeline"], *by_kind["variant"]),
            rerankers=(*routes, *ranking, *by_kind["variant"]),
        )

    async def search(
        self, key: str, query: str, model: str | None, instruction: str | None, top_n: float | None
    ) -> str:
        if not (query or "").strip():
            return markup.empty("Enter a query.")
        body = _body(query, model, instruction) | {"top_n": _top(top_n)}
        try:
            found, recalled = await asyncio.gather(
                self._gateway.search(key, body | {"explain": True}),
                self._gateway.search(key, body | {"rerank": False}),
            )
        except Trouble as trouble:
            return markup.notice(str(trouble))
        return markup.search(recalled, found)

    async def compare(
        self, key: str, query: str, models: list[str], instruction: str | None, top_n: float | None
    ) -> str:
        if not (query or "").strip():
            return markup.empty("Enter a query.")
        models = list(dict.fromkeys(models))
        if not 2 <= len(models) <= MAX_COMPARED:
            return markup.empty(f"Choose two to {MAX_COMPARED} pipelines, routes or variants.")

        async def ask(model: str) -> Body | str:
            try:
                return await self._gateway.search(key, _body(query, model, instruction) | {"top_n": _top(top_n)})
            except Trouble as trouble:
                return str(trouble)

        return markup.compare(models, await asyncio.gather(*map(ask, models)))

    async def rerank(
        self, key: str, query: str, text: str, model: str | None, instruction: str | None
    ) -> AsyncIterator[tuple[str, str]]:
        """HTML and CSV of what is done so far, again and again until all is."""
        try:
            batches = read(text or "")
        except DocumentsError as error:
            yield markup.notice(f"The documents can't be read: {error}."), ""
            return
        query = query or ""
        if not query.strip() and any(batch.query is None for batch in batches):
            yield markup.empty("Enter a query, or give each document one."), ""
            return
        shown: list[str] = []
        rows: list[Ranked] = []
        for done in range(0, len(batches), _AT_ONCE):
            part = batches[done : done + _AT_ONCE]
            for html, ranked in await asyncio.gather(
                *(self._rerank(key, batch.query or query, batch, model, instruction) for batch in part)
            ):
                shown.append(html)
                rows += ranked
            yield _progress(shown, len(batches)), to_csv(rows) if rows else ""

    async def _rerank(
        self, key: str, query: str, batch: Batch, model: str | None, instruction: str | None
    ) -> tuple[str, list[Ranked]]:
        documents = batch.documents
        body = _body(query, model, instruction) | {"documents": [document.text for document in documents]}
        try:
            answer = await self._gateway.rerank(key, body)
        except Trouble as trouble:
            # It may be the query that can't be sent; then it can't be shown, either.
            shown = query.encode(errors="replace").decode()
            return markup.column(shown, markup.notice(str(trouble))), []
        results = answer["results"]
        ranked = [
            Ranked(query, rank, float(result["relevance_score"]), documents[result["index"]])
            for rank, result in enumerate(results, 1)
        ]
        more = len(results) - _SHOWN_DOCUMENTS
        texts = [(document.id, document.text) for document in documents]
        html = markup.reranked(query, texts, {**answer, "results": results[:_SHOWN_DOCUMENTS]})
        return html + (markup.empty(f"{more} more are in the CSV.") if more > 0 else ""), ranked

    async def fleet(self, key: str) -> str:
        try:
            self._history.add(await self._gateway.fleet(key))
        except Trouble as trouble:
            return markup.notice(str(trouble))
        return fleet.view(self._history)

    async def rollouts(self, admin_key: str) -> list[tuple[str, str]]:
        """To choose from, what is under way first. Raises Trouble."""
        return rollouts.choices(await self._gateway.rollouts(admin_key))

    async def rollout(self, admin_key: str, chosen: str | None) -> str:
        if not chosen:
            return markup.empty("There are no rollouts. Start one: serve-app rollout start FILE")
        try:
            shown, history = await self._gateway.rollout(admin_key, chosen)
        except Trouble as trouble:
            return markup.notice(str(trouble))
        return rollouts.view(shown, history, time.time())

    async def act(self, admin_key: str, chosen: str | None, action: str) -> str:
        """What came of it, in a line."""
        if not chosen:
            return markup.notice("Choose a rollout first.", "note")
        try:
            done = await self._gateway.act(admin_key, chosen, action)
        except Trouble as trouble:
            return markup.notice(str(trouble))
        return markup.notice(f"{action}: now {done['state']}.", "note")


def _body(query: str, model: str | None, instruction: str | None) -> dict[str, Any]:
    body = {"query": query}
    if model:
        body["model"] = model
    # None from a field that was never unfolded.
    if instruction and instruction.strip():
        body["instruction"] = instruction.strip()
    return body


def _top(top_n: float | None) -> int:
    return max(1, min(MAX_SHOWN, int(top_n or 10)))


def _progress(shown: list[str], total: int) -> str:
    parts = []
    if len(shown) < total:
        parts.append(markup.notice(f"{len(shown)} of {total} queries are done …", "note"))
    elif total > 1:
        parts.append(markup.notice(f"All {total} queries are done.", "note"))
    if len(shown) > _SHOWN_QUERIES:
        parts.append(markup.empty(f"The first {_SHOWN_QUERIES} are shown; the CSV has all."))
    return "".join([*parts, '<div class="columns">', *shown[:_SHOWN_QUERIES], "</div>"])
