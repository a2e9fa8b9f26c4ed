"""What an index folder says about itself.

    <index>/manifest.json            names the build that is served; replaced in one step, so it is old or new
    <index>/<build>/documents.jsonl  the catalogue, one JSON object a line
    <index>/<build>/bm25/            the tantivy index; each document carries its line's offset in it
    <index>/.lock                    held while a build runs

A build that didn't finish is a folder that no manifest names; the next build removes it.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from serve_app.recall.errors import OpenError

FORMAT = 1
MANIFEST = "manifest.json"
DOCUMENTS = "documents.jsonl"
BM25 = "bm25"


@dataclass(frozen=True, slots=True)
class Manifest:
    """`build` is the sub-folder that is served, `documents_bytes` and `documents_sha256` are of its documents
    file, `source` is the file's or folder's name that was indexed, `fields` are the top-level names seen in its
    rows (the first 256), `built_at` is UTC in ISO 8601."""

    build: str
    documents: int
    documents_bytes: int
    documents_sha256: str
    analysis: int
    built_at: str
    source: str
    fields: tuple[str, ...]
    format: int = FORMAT

    def write(self, index: Path) -> None:
        """Makes `build` the one that is served, in one step that survives a crash."""
        fresh = index / f".{MANIFEST}"
        try:
            with open(fresh, "w", encoding="utf-8") as file:
                json.dump(asdict(self), file, ensure_ascii=False, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, index / MANIFEST)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise
        fsync(index)


def read(index: Path, analysis: int) -> Manifest:
    """The manifest of an index folder. Raises `OpenError` unless it was built with this format and analysis."""
    rebuild = f"build it: serve-app index build --input FILE --index {index}"
    if not index.is_dir():
        raise OpenError(f"no index at {index.absolute()}: there is no such folder; {rebuild}")
    try:
        found: dict[str, Any] = json.loads((index / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise OpenError(f"{index.absolute()} is not a search index: it has no {MANIFEST}; {rebuild}") from None
    except (OSError, ValueError) as error:
        raise OpenError(f"{index.absolute() / MANIFEST} can't be read ({error}); {rebuild}") from error
    if not isinstance(found, dict) or not {"format", "analysis"} <= found.keys():
        raise OpenError(f"{index.absolute()} is not a search index: {MANIFEST} is of something else; {rebuild}")
    if (found["format"], found["analysis"]) != (FORMAT, analysis):
        raise OpenError(
            f"{index.absolute()} was built with format {found['format']} and analysis {found['analysis']}, "
            f"but this version reads format {FORMAT} and analysis {analysis}; {rebuild}"
        )
    try:
        return Manifest(**{**found, "fields": tuple(found["fields"])})
    except (KeyError, TypeError) as error:
        raise OpenError(f"{index.absolute() / MANIFEST} is damaged ({error}); {rebuild}") from error


def fsync(path: Path) -> None:
    """Makes a file's bytes, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
