"""Which systems there are to compare, and asking each of them every query."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tqdm import tqdm

from serve_app.config import known_names
from serve_app.evaluation.client import Answer, EvaluationError, Gateway
from serve_app.evaluation.dataset import Dataset, Query
from serve_app.evaluation.metrics import means, percentile, quality
from serve_app.evaluation.report import Report, Result, Stopped

RECALL_ALONE = "recall alone"
# More different errors than this are noise.
_MAX_ERRORS = 3


@dataclass(frozen=True, slots=True)
class System:
    """`body` is what a search for it carries besides the query."""

    name: str
    body: dict[str, Any]


async def measure(
    dataset: Dataset,
    gateway: Gateway,
    route: str | None,
    models: Sequence[str] | None,
    concurrency: int,
    top_n: int,
    ignore_identical_ids: bool,
    progress: bool | None,
) -> Report:
    """See `evaluate`."""
    # One more, in the place of what is left out.
    systems = choose_systems(await gateway.models(), route, models, top_n, int(ignore_identical_ids))
    # tqdm's own rule for None: off where stderr is no terminal.
    hidden = None if progress is None else not progress
    results: list[Result] = []
    stopped = None
    answered: set[str] = set()
    own_first = 0
    with tqdm(total=len(systems) * len(dataset.queries), unit="query", disable=hidden) as bar:
        for system in systems:
            bar.set_description(system.name)
            try:
                answers = await _ask_all(gateway, dataset.queries, system, concurrency, bar.update)
            # Ctrl-C cancels; asyncio raises KeyboardInterrupt where nobody takes that.
            except (EvaluationError, asyncio.CancelledError) as error:
                if not results:
                    raise
                is_interrupt = isinstance(error, asyncio.CancelledError)
                stopped = Stopped(system.name, "interrupted" if is_interrupt else str(error), is_interrupt)
                break
            if ignore_identical_ids:
                answers = [
                    replace(answer, ids=[id for id in answer.ids if id != query.id][:top_n])
                    for query, answer in zip(dataset.queries, answers, strict=True)
                ]
            results.append(judge(dataset, system.name, answers))
            answered.update(id for answer in answers for id in answer.ids)
            own_first += sum(
                answer.ids[:1] == [query.id] and dataset.grades[query.id].get(query.id, 0) <= 0
                for query, answer in zip(dataset.queries, answers, strict=True)
            )
    return Report(
        dataset=str(dataset.path),
        url=gateway.url,
        route=route,
        top_n=top_n,
        queries=len(dataset.queries),
        unjudged_queries=dataset.unjudged,
        results=results,
        notes=_notes(dataset, answered, own_first > len(results) * len(dataset.queries) / 2, top_n),
        ignore_identical_ids=ignore_identical_ids,
        stopped=stopped,
    )


def choose_systems(
    entries: Sequence[dict[str, Any]],
    route: str | None,
    models: Sequence[str] | None,
    top_n: int,
    left_out: int = 0,
) -> list[System]:
    """Recall alone, then the pipelines (or `models`), each asked for as many results more as are `left_out` again.
    Raises `EvaluationError` for a name nobody has."""
    routes = {entry["id"]: entry for entry in entries if entry.get("kind") == "route"}
    pipelines = {entry["id"]: entry for entry in entries if entry.get("kind") == "pipeline"}
    if route is not None:
        _require(route, routes, "route")
    chosen = list(pipelines)
    if models:
        known = [entry["id"] for entry in entries if entry.get("kind") in ("pipeline", "variant")]
        for model in models:
            _require(model, known, "pipeline or variant")
        chosen = list(dict.fromkeys(models))
    elif route is not None:
        # The file's weights where an older gateway doesn't say what its rollouts make of them.
        weights = routes[route].get("effective_weights", routes[route]["weights"])
        chosen = [name for name, weight in weights.items() if weight > 0]
    # As deep as the deepest of them, so that recall@100 is of recall and not of a cut.
    depth = max([top_n, *(pipelines[name].get("recall_k", 0) for name in chosen if name in pipelines)])
    alone: dict[str, Any] = {"rerank": False, "top_n": top_n + left_out, "recall_k": depth + left_out}
    if route is not None:
        alone["route"] = route
    systems = [System(RECALL_ALONE, alone)]
    for name in chosen:
        # More than it recalls would make the gateway recall, and rerank, more than a search of users does.
        shown = min(top_n, pipelines.get(name, {}).get("recall_k", top_n))
        systems.append(System(name, {"model": name, "top_n": shown + left_out}))
    return systems


def judge(dataset: Dataset, name: str, answers: Sequence[Answer]) -> Result:
    """`answers` are in the order of the dataset's queries."""
    orders = {query.id: answer.ids for query, answer in zip(dataset.queries, answers, strict=True)}
    by_query = quality(dataset.grades, orders)
    ok = [answer for answer in answers if not answer.error]
    by_lang: dict[str, list[Query]] = {}
    for query in dataset.queries:
        if query.lang:
            by_lang.setdefault(query.lang, []).append(query)
    return Result(
        name=name,
        metrics=means(list(by_query.values())),
        ndcg_by_lang={
            lang: means([by_query[query.id] for query in queries])["ndcg@10"]
            for lang, queries in sorted(by_lang.items())
        },
        queries_by_lang={lang: len(queries) for lang, queries in sorted(by_lang.items())},
        latency_ms={f"p{p}": percentile([answer.latency_ms for answer in ok], p) for p in (50, 95, 99)},
        queries=len(answers),
        failures=len(answers) - len(ok),
        retries=sum(answer.retries for answer in answers),
        degraded_share=sum(answer.is_degraded for answer in ok) / len(ok) if ok else 0.0,
        errors=dict(Counter(answer.error for answer in answers if answer.error).most_common(_MAX_ERRORS)),
    )


async def _ask_all(
    gateway: Gateway,
    queries: Sequence[Query],
    system: System,
    concurrency: int,
    done: Callable[[], object],
) -> list[Answer]:
    """Answers in the order of the queries, `concurrency` at once. Raises `EvaluationError`."""
    answers: list[Answer | None] = [None] * len(queries)
    waiting = iter(enumerate(queries))

    async def work() -> None:
        for n, query in waiting:
            answers[n] = await gateway.search(query.text, system.body)
            done()

    try:
        async with asyncio.TaskGroup() as workers:
            for _ in range(min(concurrency, len(queries))):
                workers.create_task(work())
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    return [answer for answer in answers if answer is not None]


def _notes(dataset: Dataset, answered: set[str], is_own_first: bool, top_n: int) -> list[str]:
    notes: list[str] = []
    if answered and not any(answered.intersection(grades) for grades in dataset.grades.values()):
        notes.append("no answered document is judged for any query: is it this dataset's corpus that is served?")
    if is_own_first:
        notes.append(
            "most queries are answered with the document of their own id first: where queries are documents too, "
            "as in BEIR's ArguAna and Quora, --ignore-identical-ids leaves it out"
        )
    if top_n < 100:
        notes.append(f"{top_n} results were asked for, so recall@100 is recall@{top_n}")
    return notes


def _require(name: str, known: Iterable[str], what: str) -> None:
    names = list(known)
    if name not in names:
        raise EvaluationError(f"{name!r} is no {what} of this gateway; {known_names(name, names)}")
