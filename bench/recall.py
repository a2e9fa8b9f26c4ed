"""Recall against other BM25 engines: build, memory, latency, throughput, and quality on Cranfield.

    python -m bench.recall [--documents N]... [--rounds N]

The catalogue is made: words by Zipf's law from 200,000 (that of rank r is 1/r as frequent as the first), 20 to 40
in a document, the first six as its title. A query is four different words of one document. All engines get the
same queries in the same round, one engine after another, and answer with their 200 best. Times are from a query's
text to ids; `serve_app` and `tantivy` also read the documents, which the others don't hold.

What was built for a run that was cut off stays in .run/bench/recall, and the next run goes on from there.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import Spread, machine, percentile, save, saved, show
from serve_app.evaluation.dataset import read_dataset
from serve_app.evaluation.metrics import means, quality

ROOT = Path(__file__).parents[1]
CRANFIELD = ROOT.parent / "shared" / "data" / "cranfield"
WORK = ROOT / ".run" / "bench" / "recall"

DEFAULT_SIZES = (25_000, 100_000, 1_000_000)
TOP = 200
ENGINES = ("serve_app", "tantivy", "bm25s", "bm25s-numpy", "rank-bm25")
# It looks into every document for every term of a query: two sizes show how that grows.
_RANK_BM25_SIZES = (25_000, 100_000)
_BUILDS, _MOST_REPEATED = 5, 100_000
_QUERIES_A_ROUND = 200
_SLOW, _SLOW_QUERIES_A_ROUND = ("bm25s-numpy", "rank-bm25"), 16
_VOCABULARY, _TITLE_WORDS, _CHUNK = 200_000, 6, 50_000
_LEAST_DOCUMENTS = min(_RANK_BM25_SIZES)
_BUILD_LIMIT_S = 1800
# The targets that recall was built for.
P50_MS, MEMORY_BYTES, NDCG_BELOW, TARGET_SIZE = 6.0, 10**9, 0.003, 1_000_000


class Served:
    """An engine's process over its index."""

    def __init__(self, engine: str, folder: Path) -> None:
        command = [sys.executable, "-m", "bench.recall_engines", "serve", engine, str(folder)]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def ask(self, what: str, **details: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(json.dumps({"what": what, **details}), file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self._process.args[1:])} ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def cranfield() -> dict[str, float]:
    """nDCG@10 by engine, over the 225 queries' best 100."""
    dataset = read_dataset(CRANFIELD)
    ids = [json.loads(line)["_id"] for line in (CRANFIELD / "corpus.jsonl").open(encoding="utf-8")]
    found = {}
    for engine in ENGINES:
        folder = WORK / "cranfield" / engine
        _build(engine, CRANFIELD / "corpus.jsonl", folder)
        with closing(Served(engine, folder)) as served:
            orders = served.ask("ids", queries=[query.text for query in dataset.queries], k=100)["ids"]
        named = [[ids[id] if isinstance(id, int) else id for id in order] for order in orders]
        judged = quality(dataset.grades, {q.id: order for q, order in zip(dataset.queries, named, strict=True)})
        found[engine] = means(list(judged.values()))["ndcg@10"]
    shutil.rmtree(WORK / "cranfield")
    return found


def measure(documents: int, rounds: int) -> dict[str, Any]:
    """Figures by engine for a catalogue of that many documents."""
    folder = WORK / str(documents)
    folder.mkdir(parents=True, exist_ok=True)
    queries = _made_catalogue(documents, folder, rounds)
    # The smallest size is there for the growth of the one engine that is measured on it.
    engines = [e for e in ENGINES if e == "rank-bm25" or documents > min(_RANK_BM25_SIZES)]
    engines = [e for e in engines if e != "rank-bm25" or documents in _RANK_BM25_SIZES]
    builds = _builds(engines, folder, _BUILDS if documents <= _MOST_REPEATED else 1)
    took: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
    with ExitStack() as stack:
        served = {e: stack.enter_context(closing(Served(e, folder / _built_as(e)))) for e in engines}
        # The last round's queries warm up: caches of the index, and numba's compiler.
        for engine in engines:
            for threads in (1, 2):
                served[engine].ask("time", queries=_part(queries[-1], engine), k=TOP, threads=threads)
        for i, asked in enumerate(queries[:-1]):
            for engine in _turned(engines, i):
                part = _part(asked, engine)
                one, two = (served[engine].ask("time", queries=part, k=TOP, threads=n) for n in (1, 2))
                took[engine].append(
                    {
                        "p50_ms": percentile(one["took_ms"], 0.5),
                        "p95_ms": percentile(one["took_ms"], 0.95),
                        "per_s_1": len(part) / one["seconds"],
                        "per_s_2": len(part) / two["seconds"],
                    }
                )
        memory = {engine: served[engine].ask("memory") for engine in engines}
    shutil.rmtree(folder)
    return {
        engine: {
            "builds": len(builds[_built_as(engine)]),
            "build_s": Spread.of(build["seconds"] for build in builds[_built_as(engine)]),
            "build_peak_bytes": max(build["peak_bytes"] for build in builds[_built_as(engine)]),
            "disk_bytes": builds[_built_as(engine)][-1]["disk_bytes"],
            "memory": memory[engine],
            **{name: Spread.of(figures[name] for figures in took[engine]) for name in took[engine][0]},
        }
        for engine in engines
    }


def catalogue(documents: int) -> Iterator[list[str]]:
    """Each document's words; the same on every run."""
    vocabulary = np.array(words(), dtype=object)
    mass = np.cumsum(1 / np.arange(1, _VOCABULARY + 1))
    for first in range(0, documents, _CHUNK):
        random = np.random.default_rng([5, first])
        lengths = random.integers(20, 41, min(_CHUNK, documents - first))
        drawn = vocabulary[np.searchsorted(mass, random.random(lengths.sum()) * mass[-1])].tolist()
        start = 0
        for length in lengths.tolist():
            yield drawn[start : start + length]
            start += length


def words() -> list[str]:
    """By rank. Of three syllables each, so that none is a stop word, and nearly all keep a stem of their own."""
    syllables = [consonant + vowel for consonant in "bcdfghjklmnpqrtvwxz" for vowel in "aiou"]
    base = len(syllables)
    # The first syllable changes fastest, or frequent words would all begin alike.
    places = ((rank % base, rank // base % base, rank // base**2) for rank in range(_VOCABULARY))
    return ["".join(syllables[place] for place in three) + "n" for three in places]


def _made_catalogue(documents: int, folder: Path, rounds: int) -> list[list[str]]:
    """Writes the catalogue, if it isn't there, and gives each round's queries, and another round's to warm up."""
    wanted = (rounds + 1) * _QUERIES_A_ROUND
    random = np.random.default_rng(6)
    asked = {int(i): None for i in random.choice(documents, wanted, replace=False)}
    draft, queries = folder / "catalogue.draft", {}
    with draft.open("w", encoding="utf-8") as file:
        for i, drawn in enumerate(catalogue(documents)):
            title, text = " ".join(drawn[:_TITLE_WORDS]), " ".join(drawn[_TITLE_WORDS:])
            file.write(f'{{"id":"p{i}","title":"{title}","text":"{text}"}}\n')
            if i in asked:
                different = list(dict.fromkeys(drawn))
                queries[i] = " ".join(random.choice(different, 4, replace=False))
    draft.rename(folder / "catalogue.jsonl")
    ordered = [queries[i] for i in asked]
    return [ordered[i : i + _QUERIES_A_ROUND] for i in range(0, wanted, _QUERIES_A_ROUND)]


def _builds(engines: Sequence[str], folder: Path, times: int) -> dict[str, list[dict[str, float]]]:
    """What each build took, also of a run that was cut off; the last one's index stays in `folder`."""
    notes = folder / "builds.json"
    builds: dict[str, list[dict[str, float]]] = json.loads(notes.read_text()) if notes.exists() else {}
    names = list(dict.fromkeys(_built_as(engine) for engine in engines))
    for i in range(times):
        for name in _turned(names, i):
            # The slowest by far at what matters is built once.
            if len(builds.setdefault(name, [])) <= i and (i == 0 or name not in _SLOW):
                builds[name].append(_build(name, folder / "catalogue.jsonl", folder / name))
                notes.write_text(json.dumps(builds))
    return builds


def _build(engine: str, corpus: Path, folder: Path) -> dict[str, float]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "bench.recall_engines", "build", engine, str(corpus), str(folder)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=_BUILD_LIMIT_S, check=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def _built_as(engine: str) -> str:
    return "bm25s" if engine == "bm25s-numpy" else engine


def _part(queries: list[str], engine: str) -> list[str]:
    return queries[:_SLOW_QUERIES_A_ROUND] if engine in _SLOW else queries


def _turned(names: Sequence[str], i: int) -> list[str]:
    """Another one first in each round."""
    return [*names[i % len(names) :], *names[: i % len(names)]]


def run(sizes: Iterable[int], rounds: int) -> dict[str, Any]:
    ndcg: dict[str, float] = {}
    if CRANFIELD.is_dir():
        ndcg = cranfield()
        show("nDCG@10 on Cranfield", ENGINES, [[f"{ndcg[engine]:.4f}" for engine in ENGINES]])
    else:
        print(f"Quality is not measured: the Cranfield collection is not at {CRANFIELD}\n")
    # Sizes of other runs stay, each with its own machine.
    before = saved("recall")
    result = {
        "top": TOP,
        "rounds": rounds,
        "cranfield_ndcg_10": ndcg or before.get("cranfield_ndcg_10", {}),
        "sizes": before.get("sizes", {}),
    }
    measured = {}
    for documents in sizes:
        figures = measure(documents, rounds)
        measured[str(documents)] = {"machine": machine(), "engines": figures}
        result["sizes"] = dict(sorted((result["sizes"] | measured).items(), key=lambda size: int(size[0])))
        save("recall", result)
        _show(documents, figures)
    _show_targets(measured, ndcg)
    return result


def _show(documents: int, figures: dict[str, Any]) -> None:
    show(
        f"{documents:,} documents: build and memory",
        ["", "build s", "most GB while building", "GB on disk", "GB while serving", "of it not files'"],
        [
            [
                engine,
                of["build_s"].text() if of["builds"] > 1 else f"{of['build_s'].median:.3g} (one build)",
                *(f"{size / 1e9:.2f}" for size in (of["build_peak_bytes"], of["disk_bytes"])),
                *(f"{of['memory'][kind] / 1e9:.2f}" for kind in ("bytes", "anonymous_bytes")),
            ]
            for engine, of in figures.items()
        ],
    )
    show(
        f"{documents:,} documents: top {TOP}, median (least to most) of the rounds",
        ["", "p50 ms", "p95 ms", "queries/s", "on two threads"],
        [
            [engine, *(of[name].text() for name in ("p50_ms", "p95_ms", "per_s_1", "per_s_2"))]
            for engine, of in figures.items()
        ],
    )


def _show_targets(measured: dict[str, Any], ndcg: dict[str, float]) -> None:
    rows = []
    if str(TARGET_SIZE) in measured:
        ours = measured[str(TARGET_SIZE)]["engines"]["serve_app"]
        p50, memory = ours["p50_ms"].median, ours["memory"]["bytes"]
        rows.append(
            [f"p50 of {TARGET_SIZE:,} documents, ms", f"<= {P50_MS:g}", f"{p50:.3g}", _held(p50 <= P50_MS)]
        )
        rows.append(
            ["memory, GB", f"<= {MEMORY_BYTES / 1e9:g}", f"{memory / 1e9:.2f}", _held(memory <= MEMORY_BYTES)]
        )
    if ndcg:
        least = ndcg["bm25s"] - NDCG_BELOW
        rows.append(
            [
                "nDCG@10 on Cranfield",
                f">= {least:.4f}",
                f"{ndcg['serve_app']:.4f}",
                _held(ndcg["serve_app"] >= least),
            ]
        )
    if rows:
        show("Targets", ["", "wanted", "measured", ""], rows)


def _held(held: bool) -> str:
    return "held" if held else "MISSED"


def draw(result: dict[str, Any], path: Path) -> None:
    """p50, queries/s on two threads and memory, over the number of documents."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {
        "p50, ms": lambda of: of["p50_ms"]["median"],
        "queries/s, two threads": lambda of: of["per_s_2"]["median"],
        "memory while serving, GB": lambda of: of["memory"]["bytes"] / 1e9,
    }
    figure, axes = pyplot.subplots(1, len(panels), figsize=(13, 4), layout="constrained")
    for axis, (title, value) in zip(axes, panels.items(), strict=True):
        for engine in ENGINES:
            points = [
                (int(size), value(of["engines"][engine]))
                for size, of in result["sizes"].items()
                if engine in of["engines"]
            ]
            axis.plot(*zip(*points, strict=True), marker="o", label=engine)
        axis.set(title=title, xlabel="documents", xscale="log")
        sizes = [int(size) for size in result["sizes"]]
        axis.set_xticks(sizes, [f"{size // 1000:,}k" for size in sizes], minor=False)
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    for axis in axes[:2]:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(ENGINES), frameon=False
    )
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description="Recall against other BM25 engines.")
    parser.add_argument("--documents", type=int, action="append", help="may be repeated")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    sizes = arguments.documents or DEFAULT_SIZES
    if min(sizes) < _LEAST_DOCUMENTS:
        parser.error(f"--documents is {min(sizes)}; allowed: {_LEAST_DOCUMENTS:,} or more")
    if absent := [name for name in ("bm25s", "rank_bm25") if find_spec(name) is None]:
        parser.error(f"not installed: {', '.join(absent)}; `scripts/setup.sh .venv cpu bench` installs them")
    print(json.dumps(machine()))
    path = save("recall", run(sizes, arguments.rounds))
    draw(json.loads(path.read_text()), path.with_suffix(".png"))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
