"""BM25 engines behind one interface, each run in a process of its own, so that its memory is its own.

    python -m bench.recall_engines build ENGINE CORPUS FOLDER
    python -m bench.recall_engines serve ENGINE FOLDER

`build` prints a line of JSON. `serve` says `{}` when it has opened the index, and then answers each line of JSON
on its standard input with one on its standard output.
"""

import asyncio
import json
import pickle
import re
import resource
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol


class Index(Protocol):
    """An open index. Ids are the catalogue's, or positions in it where the engine knows no others."""

    def search(self, query: str, k: int) -> list[Any]: ...


class Ours:
    """What a replica of the recall deployment does with a request, without Ray and HTTP. The answers hold the
    documents' rows; the index is on disk, and so safe, when the build ends."""

    @staticmethod
    def build(corpus: Path, folder: Path) -> None:
        from serve_app.recall.builder import build_index

        build_index(corpus, folder)

    def __init__(self, folder: Path) -> None:
        from serve_app.recall.tantivy_index import TantivyIndex

        self._index = TantivyIndex(folder)

    def search(self, query: str, k: int) -> list[Any]:
        return [candidate.id for candidate in self._index.search(query, k)]

    def timed(self, queries: list[str], k: int, threads: int) -> tuple[float, list[float]]:
        from serve_app.recall.messages import RecallRequest
        from serve_app.recall.searcher import Searcher

        searcher = Searcher(self._index, threads)
        left, took = iter(queries), []

        async def caller() -> None:
            for query in left:
                began = time.perf_counter()
                await searcher.search(RecallRequest(query, k))
                took.append((time.perf_counter() - began) * 1e3)

        async def all_callers() -> float:
            began = time.perf_counter()
            await asyncio.gather(*(caller() for _ in range(threads)))
            return time.perf_counter() - began

        return asyncio.run(all_callers()), took


class Tantivy:
    """As its documentation begins: one stored field with the English stemmer. The 200 documents are read from
    its store; `count=False` lets it skip what can't reach the top."""

    @staticmethod
    def build(corpus: Path, folder: Path) -> None:
        import tantivy

        schema = tantivy.SchemaBuilder()
        schema.add_text_field("id", stored=True, tokenizer_name="raw")
        schema.add_text_field("body", stored=True, tokenizer_name="en_stem")
        folder.mkdir()
        index = tantivy.Index(schema.build(), str(folder))
        writer = index.writer(512 * 2**20, 2)
        for id, text in _documents(corpus):
            writer.add_document(tantivy.Document(id=id, body=text))
        writer.commit()
        writer.wait_merging_threads()

    def __init__(self, folder: Path) -> None:
        import tantivy

        self._index = tantivy.Index.open(str(folder))
        self._searcher = self._index.searcher()

    def search(self, query: str, k: int) -> list[Any]:
        # Its query language knows punctuation; the words alone are searched.
        parsed = self._index.parse_query(" ".join(re.findall(r"\w+", query)).lower(), ["body"])
        hits = self._searcher.search(parsed, k, count=False).hits
        return [self._searcher.doc(address)["id"][0] for _, address in hits]


class Bm25s:
    """Lucene's formula with numba, English stop words and stemmer. Holds no texts; answers positions."""

    backend = "numba"

    @staticmethod
    def build(corpus: Path, folder: Path) -> None:
        import bm25s

        tokens = bm25s.tokenize(
            [text for _, text in _documents(corpus)], stopwords="en", stemmer=_stemmer(), show_progress=False
        )
        retriever = bm25s.BM25(method="lucene", backend="numba")
        retriever.index(tokens, show_progress=False)
        retriever.save(str(folder), show_progress=False)

    def __init__(self, folder: Path) -> None:
        import bm25s

        self._stemmer = _stemmer()
        self._retriever = bm25s.BM25.load(str(folder), backend=self.backend, show_progress=False)

    def search(self, query: str, k: int) -> list[Any]:
        import bm25s

        tokens = bm25s.tokenize(
            query, stopwords="en", stemmer=self._stemmer, return_ids=False, show_progress=False
        )
        k = min(k, self._retriever.scores["num_docs"])
        found, scores = self._retriever.retrieve(tokens, k=k, show_progress=False)
        return [int(id) for id, score in zip(found[0], scores[0], strict=True) if score > 0]


class Bm25sNumpy(Bm25s):
    """The same index, scored by numpy."""

    backend = "numpy"


class RankBm25:
    """BM25Okapi over the terms that bm25s's tokenizer gives. It has no form on disk but a pickle."""

    @staticmethod
    def build(corpus: Path, folder: Path) -> None:
        import bm25s
        from rank_bm25 import BM25Okapi

        texts = [text for _, text in _documents(corpus)]
        tokens = bm25s.tokenize(texts, stopwords="en", stemmer=_stemmer(), return_ids=False, show_progress=False)
        folder.mkdir()
        (folder / "bm25.pickle").write_bytes(pickle.dumps(BM25Okapi(tokens)))

    def __init__(self, folder: Path) -> None:
        self._bm25 = pickle.loads((folder / "bm25.pickle").read_bytes())
        self._stemmer = _stemmer()
        self._positions = range(self._bm25.corpus_size)

    def search(self, query: str, k: int) -> list[Any]:
        import bm25s

        tokens = bm25s.tokenize(
            query, stopwords="en", stemmer=self._stemmer, return_ids=False, show_progress=False
        )
        return list(self._bm25.get_top_n(tokens[0], self._positions, n=k))


ENGINES: dict[str, Any] = {
    "serve_app": Ours,
    "tantivy": Tantivy,
    "bm25s": Bm25s,
    "bm25s-numpy": Bm25sNumpy,
    "rank-bm25": RankBm25,
}


def timed(index: Index, queries: list[str], k: int, threads: int) -> tuple[float, list[float]]:
    """Seconds for all queries, handed one by one to `threads` threads, and the milliseconds of each."""

    def one(query: str) -> float:
        began = time.perf_counter()
        index.search(query, k)
        return (time.perf_counter() - began) * 1e3

    with ThreadPoolExecutor(threads) as pool:
        began = time.perf_counter()
        took = list(pool.map(one, queries))
        return time.perf_counter() - began, took


def memory() -> dict[str, int]:
    """Bytes of this process: its part of all pages in memory, and of them those that aren't a file's, which the
    system can't drop."""
    fields = dict(re.findall(r"^(\w+): +(\d+) kB$", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE))
    return {"bytes": int(fields["Pss"]) * 1024, "anonymous_bytes": int(fields["Pss_Anon"]) * 1024}


def _build(engine: str, corpus: Path, folder: Path) -> dict[str, float]:
    began = time.perf_counter()
    ENGINES[engine].build(corpus, folder)
    return {
        "seconds": time.perf_counter() - began,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "disk_bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
    }


def _serve(engine: str, folder: Path) -> Iterator[dict[str, Any]]:
    index = ENGINES[engine](folder)
    yield {}
    for line in sys.stdin:
        ask = json.loads(line)
        if ask["what"] == "ids":
            yield {"ids": [index.search(query, ask["k"]) for query in ask["queries"]]}
        elif ask["what"] == "time":
            by = index.timed if hasattr(index, "timed") else lambda *rest: timed(index, *rest)
            seconds, took_ms = by(ask["queries"], ask["k"], ask["threads"])
            yield {"seconds": seconds, "took_ms": took_ms}
        else:
            yield memory()


def _documents(corpus: Path) -> Iterator[tuple[str, str]]:
    """Id and text, title and text as one, of a JSON Lines file."""
    with corpus.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield row.get("_id") or row["id"], f"{row.get('title', '')} {row['text']}"


def _stemmer() -> Any:
    import Stemmer

    return Stemmer.Stemmer("english")


def main(what: str, engine: str, *paths: str) -> int:
    folders = [Path(path) for path in paths]
    for answer in [_build(engine, *folders)] if what == "build" else _serve(engine, *folders):
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
