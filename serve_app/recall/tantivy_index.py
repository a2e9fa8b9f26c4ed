"""The catalogue in a tantivy index on this machine's disk, memory-mapped."""

import hashlib
import json
import mmap
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pydantic_core
import tantivy

from serve_app import __version__
from serve_app.recall import analysis, manifest
from serve_app.recall.errors import OpenError
from serve_app.recall.manifest import BM25, DOCUMENTS
from serve_app.recall.messages import Candidate

# Of a longer query the rarest terms are searched: they decide the ranking, the others the time.
MAX_TERMS = 64


class TantivyIndex:
    """A `Backend` over a folder written by `build_index`.

    It serves the build it opened: when the folder is rebuilt, it goes on with the old files (which the system
    keeps while they are mapped) until the replica is restarted.
    """

    def __init__(self, index: str | Path, *, title_boost: float = 1.0, text_boost: float = 1.0) -> None:
        """Raises `OpenError` when there is no index in the folder, or one of another version."""
        self._folder = Path(index).expanduser()
        self._boosts = {"title": title_boost, "text": text_boost}
        self._analyzer = analysis.QueryAnalyzer()
        try:
            self._open()
        except FileNotFoundError:
            # A rebuild removed the build between the manifest and its files; the new manifest is there.
            try:
                self._open()
            except FileNotFoundError as error:
                raise OpenError(f"{self._folder.absolute()} lacks {error}; build the index again") from error

    def search(self, query: str, k: int) -> list[Candidate]:
        weights = self._analyzer.terms(query)
        k = min(k, self._searcher.num_docs)
        if not weights or k < 1:
            return []
        hits = self._searcher.search(self._query(weights), k, count=False).hits
        offsets = self._searcher.fast_field_values("offset", [address for _, address in hits])
        # tantivy orders equal scores by segment; the catalogue's order doesn't depend on how segments were merged.
        # Which of those that tie at the cut are found does: to look at more of them takes twice as long.
        ranked = sorted((-score, offset) for (score, _), offset in zip(hits, offsets, strict=True))
        return [self._candidate(-score, offset) for score, offset in ranked]

    def stats(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint,
            "documents": self._searcher.num_docs,
            "bytes": self._bytes,
            "segments": self._searcher.num_segments,
            "analysis": self._manifest.analysis,
            "built_at": self._manifest.built_at,
            "source": self._manifest.source,
            "fields": list(self._manifest.fields),
        }

    def _open(self) -> None:
        self._manifest = manifest.read(self._folder, analysis.VERSION)
        build = self._folder / self._manifest.build
        try:
            with open(build / DOCUMENTS, "rb") as documents:
                self._documents = mmap.mmap(documents.fileno(), 0, access=mmap.ACCESS_READ)
            index = _open_linked(build / BM25)
        except (OSError, ValueError) as error:
            if not build.exists():
                raise FileNotFoundError(build) from error
            raise OpenError(
                f"{build.absolute()} can't be read ({error}); let the replicas' user read its files, "
                "or build the index again"
            ) from error
        self._schema = index.schema
        self._searcher = index.searcher()
        decides = [
            # The same on every machine that built it by itself, and after a build of the same catalogue.
            self._manifest.documents_sha256,
            self._manifest.analysis,
            self._boosts,
            __version__,
            tantivy.__version__,
        ]
        self.fingerprint = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:32]
        self._bytes = sum(file.stat().st_size for file in build.rglob("*") if file.is_file())
        for found, expected, what in (
            (self._searcher.num_docs, self._manifest.documents, "documents"),
            (len(self._documents), self._manifest.documents_bytes, f"bytes of {DOCUMENTS}"),
        ):
            if found != expected:
                raise OpenError(
                    f"{build.absolute()} is damaged: it has {found:,} {what}, but the manifest says "
                    f"{expected:,}; build or copy the index again"
                )

    def _query(self, weights: dict[str, float]) -> tantivy.Query:
        """One flat OR of term queries: tantivy skips documents that can't reach the top only in this form."""
        kept = weights if len(weights) <= MAX_TERMS else self._rarest(weights)
        return tantivy.Query.boolean_query(
            [
                (tantivy.Occur.Should, self._term(field, term, weights[term] * boost))
                for term in kept
                for field, boost in self._boosts.items()
            ]
        )

    def _term(self, field: str, term: str, boost: float) -> tantivy.Query:
        query = tantivy.Query.term_query(self._schema, field, term, "freq")
        return query if boost == 1 else tantivy.Query.boost_query(query, boost)

    def _rarest(self, weights: Iterable[str]) -> list[str]:
        frequency = {term: sum(self._searcher.doc_freq(field, term) for field in self._boosts) for term in weights}
        return sorted(filter(frequency.__getitem__, frequency), key=frequency.__getitem__)[:MAX_TERMS]

    def _candidate(self, score: float, offset: int) -> Candidate:
        source = self._documents[offset : self._documents.find(b"\n", offset)]
        found = pydantic_core.from_json(source)
        id = found.get("id")
        return Candidate(
            id=str(found["_id"] if id is None else id),
            score=score,
            title=found.get("title") or "",
            text=found.get("text") or "",
            source=source.decode(),
        )


def new_index(folder: Path) -> tantivy.Index:
    """An empty index. The text itself isn't stored in it: it is read from the documents file by offset,
    which is ten times as fast as tantivy's compressed store."""
    schema = tantivy.SchemaBuilder()
    schema.add_text_field("title", tokenizer_name="title", index_option="freq")
    schema.add_text_field("text", tokenizer_name="text", index_option="freq")
    schema.add_integer_field("offset", fast=True)
    index = tantivy.Index(schema.build(), str(folder), reuse=False)
    _register(index)
    return index


def _open_linked(folder: Path) -> tantivy.Index:
    """tantivy writes a lock beside the files of an index that it reads, and the folder may be another user's or on
    a volume that is mounted read-only; so it gets a folder of its own, with links. What is open stays open."""
    own = Path(tempfile.mkdtemp(prefix="serve-app-index-"))
    try:
        for file in folder.absolute().iterdir():
            if file.suffix != ".lock":
                (own / file.name).symlink_to(file)
        index = tantivy.Index.open(str(own))
        _register(index)
        index.config_reader("manual")
        index.reload()
    finally:
        _remove(own)
    return index


def _remove(folder: Path) -> None:
    """The reader that an index is opened with looks at the folder once more on a thread of its own, and may put
    its lock there while it is being emptied."""
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.01)


def new_document(title: str, text: str, offset: int) -> tantivy.Document:
    document = tantivy.Document()
    document.add_text("title", analysis.document_text(title))
    document.add_text("text", analysis.document_text(text))
    document.add_integer("offset", offset)
    return document


def _register(index: tantivy.Index) -> None:
    index.register_tokenizer("title", analysis.title_analyzer())
    index.register_tokenizer("text", analysis.text_analyzer())
