"""Bar charts of the results, one PNG a question: medians, with the least and greatest run."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def draw(results: Path) -> Iterator[Path]:
    """Draws what `results` has JSON for; the paths of the pictures."""
    charts = {
        "peers": _peers,
        "engine": _engine,
        "gateway": _gateway,
        "cache": _cache,
        "chunks": _chunks,
        "startup": _startup,
        "cascade": _cascade,
    }
    for name, figures in charts.items():
        source = results / f"{name}.json"
        if source.is_file():
            for title, unit, groups in figures(json.loads(source.read_text())):
                path = results / f"{name}-{_slug(title)}.png"
                _bars(path, title, unit, groups)
                yield path


Groups = Mapping[str, Mapping[str, Any]]


def _peers(result: dict[str, Any]) -> Iterator[tuple[str, str, Groups]]:
    for shape in ("tiny", "25m"):
        if shape in result:
            title = {"tiny": "Overhead-bound model", "25m": "Compute-bound model, 25M parameters"}[shape]
            yield title, "pairs a second", result[shape]["pairs_per_s"]


def _engine(result: dict[str, Any]) -> Iterator[tuple[str, str, Groups]]:
    for shape, measured in result["pairs_per_s"].items():
        # Of older results, all shapes were one run's.
        ways = measured.get("ways", measured)
        bars = {way: dict(zip(("1 call", "8 calls"), found["rates"], strict=True)) for way, found in ways.items()}
        yield f"Ways to drive the engine, {shape} model", "pairs a second", bars


def _gateway(result: dict[str, Any]) -> Iterator[tuple[str, str, Groups]]:
    fleets = {
        name: figures for name, figures in result.items() if isinstance(figures, dict) and "p50_ms" in figures
    }
    yield "Latency over a no-op reranker", "ms, p50", {name: {"p50": f["p50_ms"]} for name, f in fleets.items()}
    rates = {name: {"16 clients": figures["calls_per_s"]} for name, figures in fleets.items()}
    yield "Calls over a no-op reranker", "calls a second", rates


def _cache(result: dict[str, Any]) -> Iterator[tuple[str, str, Groups]]:
    yield "Calls that were made before", "ms, p50", {name: {"p50": ms} for name, ms in result["p50_ms"].items()}


def _chunks(result: dict[str, Any]) -> Iterator[tuple[str, str, Groups]]:
    by_size: dict[str, dict[str, Any]] = {}
    for at_once, sizes in result["sizes"].items():
        for size, found in sizes.items():
            by_size.setdefault(f"{size} pairs", {})[f"{at_once} at once"] = found["p50_ms"]
    yield "Calls of 200 documents by size of chunk", "ms, p50", by_size
    tokens = {name: {"tokens": found["again_tokens"]} for name, found in result["routers"].items()}
    yield "A query that comes again, by router", "tokens computed a call", tokens


def _startup(result: dict[str, Any]) -> Iterator[tuple[str, str, Groups]]:
    started = {name: phases for name, phases in result.items() if name != "machine"}
    yield "Starting a replica", "seconds", started


def _cascade(result: dict[str, Any]) -> Iterator[tuple[str, str, Groups]]:
    def once(value: float) -> dict[str, float]:
        return {"median": value, "low": value, "high": value}

    pipelines = result["pipelines"]
    quality = {name: {"nDCG@10": once(found["ndcg@10"])} for name, found in pipelines.items()}
    yield f"Pipelines on {result['dataset']}", "nDCG@10", quality
    cost = {name: {"tokens": once(found["tokens_per_query"])} for name, found in pipelines.items()}
    yield f"What pipelines cost on {result['dataset']}", "tokens a query", cost


def _bars(path: Path, title: str, unit: str, groups: Groups) -> None:
    """`groups`: by name, by case, a spread."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys(case for spreads in groups.values() for case in spreads))
    height = 0.8 / len(cases)
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.6 * len(groups)), layout="constrained")
    for i, case in enumerate(cases):
        rows = [(row, spreads[case]) for row, spreads in enumerate(groups.values()) if case in spreads]
        medians = [spread["median"] for _, spread in rows]
        errors = [
            [spread["median"] - spread["low"] for _, spread in rows],
            [spread["high"] - spread["median"] for _, spread in rows],
        ]
        places = [row + (i - (len(cases) - 1) / 2) * height for row, _ in rows]
        bars = axes.barh(places, medians, height, xerr=errors, label=case, capsize=3)
        axes.bar_label(
            bars, [f"{median:,.3g}" if median < 1000 else f"{median:,.0f}" for median in medians], padding=4
        )
    axes.set_yticks(range(len(groups)), list(groups))
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.set_title(title, loc="left")
    axes.margins(x=0.15)
    if len(cases) > 1:
        axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _slug(title: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in title.lower()).split())
