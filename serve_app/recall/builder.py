"""Builds an index folder from a catalogue: whole, or not at all (`manifest.py` shows the folder)."""

import hashlib
import json
import os
import re
import shutil
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from serve_app.recall import analysis, manifest
from serve_app.recall.errors import BuildError, InputError
from serve_app.recall.manifest import BM25, DOCUMENTS, MANIFEST, Manifest
from serve_app.recall.reader import Catalogue, Row
from serve_app.recall.tantivy_index import new_document, new_index

# Called about once a MiB of input with: bytes read, bytes in all, documents so far.
Progress = Callable[[int, int, int], None]

# Nothing else is ever removed.
_BUILD = re.compile(r"build-\d{8}T\d{6}-\d+-[0-9a-f]{6}")
_LOCK = ".lock"
_OWN = (MANIFEST, f".{MANIFEST}", _LOCK)
_HEAP_BYTES_PER_THREAD = 256 * 2**20
_MAX_FIELDS = 256


class _BusyError(BuildError):
    """Another build has the folder."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What a build made. `empty` of the documents have neither title nor text, so that no query finds them."""

    documents: int
    empty: int
    seconds: float
    index_bytes: int
    fields: tuple[str, ...]


def build_index(
    input: str | Path, index: str | Path, *, progress: Progress | None = None, threads: int = 2
) -> Summary:
    """Indexes `input` (JSON Lines, CSV or a BEIR folder) into the folder `index`, replacing what it holds.

    Readers of an older build keep serving it until they restart. `threads` are tantivy's, beside Python's own.
    Raises `InputError` for a bad catalogue and `BuildError` when the folder can't be written; either way the
    folder serves what it served before, or the new catalogue in full.
    """
    started = time.monotonic()
    catalogue = Catalogue(Path(input))
    index = Path(index)
    with _writing(index):
        is_new = not index.exists()
        _refuse_others(index)
    try:
        with _writing(index), _locked(index):
            _remove_builds(index, keep=_served(index))
            build = index / f"build-{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}-{os.urandom(3).hex()}"
            try:
                documents, empty, fields, sha256 = _write(catalogue, build, threads, progress)
                _let_others_read(build)
                _fsync_all(build)
                Manifest(
                    build=build.name,
                    documents=documents,
                    documents_bytes=(build / DOCUMENTS).stat().st_size,
                    documents_sha256=sha256,
                    analysis=analysis.VERSION,
                    built_at=datetime.now(UTC).isoformat(timespec="seconds"),
                    # Names of files are bytes, of any encoding.
                    source=os.fsencode(Path(input).name).decode(errors="replace"),
                    fields=fields,
                ).write(index)
            except BaseException:
                # Once the manifest names it, it is what is served.
                if _served(index) != build.name:
                    shutil.rmtree(build, ignore_errors=True)
                raise
            _remove_builds(index, keep=build.name)
    except BaseException as error:
        # Another build's, which came first, is not ours to unlock.
        if is_new and not isinstance(error, _BusyError):
            _remove_if_empty(index)
        raise
    size = sum(file.stat().st_size for file in build.rglob("*") if file.is_file())
    return Summary(documents, empty, time.monotonic() - started, size, fields)


def _write(
    catalogue: Catalogue, build: Path, threads: int, progress: Progress | None
) -> tuple[int, int, tuple[str, ...], str]:
    (build / BM25).mkdir(parents=True)
    index = new_index(build / BM25)
    writer = index.writer(_HEAP_BYTES_PER_THREAD * threads, threads)
    ids = _Ids(catalogue)
    fields: dict[str, Any] = {}
    offset = reported = empty = 0
    content = hashlib.sha256()
    try:
        with open(build / DOCUMENTS, "xb", buffering=2**20) as documents:
            for row in catalogue:
                ids.add(row)
                line = row.source + b"\n"
                documents.write(line)
                content.update(line)
                writer.add_document(new_document(row.title, row.text, offset))
                offset += len(line)
                empty += row.is_empty
                if len(fields) < _MAX_FIELDS:
                    fields.update(row.names)
                if progress and catalogue.read_bytes != reported:
                    reported = catalogue.read_bytes
                    progress(reported, catalogue.total_bytes, len(ids))
        ids.check()
        if not len(ids):
            raise InputError(f"{catalogue.path} holds no documents")
        writer.commit()
    except BaseException:
        # Not while tantivy's threads still write into the folder that is about to be removed.
        _stop(writer)
        raise
    writer.wait_merging_threads()
    if progress:
        progress(catalogue.total_bytes, catalogue.total_bytes, len(ids))
    return len(ids), empty, tuple(fields)[:_MAX_FIELDS], content.hexdigest()


class _Ids:
    """Finds duplicate ids with 8 bytes a document: hashes are compared whenever their number has doubled,
    and only a hash that occurs twice makes the catalogue be read again for the ids themselves."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._hashes = array("q")
        self._check_at = 2**16

    def __len__(self) -> int:
        return len(self._hashes)

    def add(self, row: Row) -> None:
        self._hashes.append(hash(row.id))
        if len(self._hashes) == self._check_at:
            self._check_at *= 2
            self.check()

    def check(self) -> None:
        hashes = np.sort(np.array(self._hashes, dtype=np.int64))
        twice = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
        if not twice:
            return
        lines: dict[str, int] = {}
        catalogue = Catalogue(self._catalogue.path)
        for _, row in zip(range(len(self)), catalogue, strict=False):
            if hash(row.id) in twice:
                first = lines.setdefault(row.id, row.line)
                if first != row.line:
                    raise catalogue.error(row.line, f"id {row.id!r} was already used in line {first}")


def _stop(writer: Any) -> None:
    try:
        writer.rollback()
        writer.wait_merging_threads()
    except (OSError, ValueError):
        pass  # a writer that has failed has stopped


@contextmanager
def _writing(index: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise BuildError(f"writing {index.absolute()} failed: {error}{_free(index)}") from error


def _free(index: Path) -> str:
    try:
        return f" ({shutil.disk_usage(index).free // 2**20:,} MiB are free there without the unfinished build)"
    except OSError:
        return ""


@contextmanager
def _locked(index: Path) -> Iterator[None]:
    if index.exists() and not index.is_dir():
        raise BuildError(f"{index.absolute()} is a file; an index is a folder")
    index.mkdir(parents=True, exist_ok=True)
    try:
        lock = filelock.FileLock(index / _LOCK, timeout=0)
        with lock:
            yield
    except filelock.Timeout:
        raise _BusyError(f"another build is writing into {index.absolute()}; wait for it or stop it") from None


def _refuse_others(index: Path) -> None:
    """A folder that holds anything but an index, of whatever version, is not ours to fill."""
    if not index.is_dir():
        return
    strange = [
        entry.name for entry in index.iterdir()
        if entry.name not in _OWN and not _BUILD.fullmatch(entry.name)
    ]  # fmt: skip
    if (index / MANIFEST).exists() and not _served(index):
        strange.append(MANIFEST)
    if strange:
        raise BuildError(
            f"{index.absolute()} holds other things ({', '.join(sorted(strange)[:3])}); "
            "name a new folder, or empty this one"
        )


def _served(index: Path) -> str | None:
    """The build that the manifest names, also when this version couldn't read it."""
    try:
        found = json.loads((index / MANIFEST).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    build = found.get("build") if isinstance(found, dict) and "analysis" in found else None
    return build if isinstance(build, str) else None


def _remove_builds(index: Path, keep: str | None) -> None:
    for entry in index.iterdir():
        if entry.name != keep and _BUILD.fullmatch(entry.name):
            shutil.rmtree(entry, ignore_errors=True)


def _let_others_read(build: Path) -> None:
    """Whoever may read the documents: tantivy makes some files for their owner alone."""
    mode = (build / DOCUMENTS).stat().st_mode & 0o777
    for file in (build / BM25).iterdir():
        file.chmod(mode)


def _fsync_all(build: Path) -> None:
    for path in [*build.rglob("*"), build]:
        manifest.fsync(path)


def _remove_if_empty(index: Path) -> None:
    try:
        (index / _LOCK).unlink(missing_ok=True)
        index.rmdir()
    except OSError:
        pass  # someone else's build is in it
