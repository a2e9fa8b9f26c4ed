"""Reads catalogues: JSON Lines, CSV and the BEIR layout.

A row has an `id` (or `_id`; text or a whole number), a `title` or a `text` or both, and any further fields. A
row that is wrong is an `InputError` that names the file and the line. Titles and texts that are empty or null are
not wrong (collections such as Cranfield have them); such documents are counted, but no query finds them.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pydantic_core

from serve_app.recall.errors import InputError

MAX_ROW_BYTES = 16 * 2**20
MAX_ID_BYTES = 512

_BLOCK_BYTES = 2**20
_SUFFIXES = {".jsonl": "JSON Lines", ".ndjson": "JSON Lines", ".json": "JSON Lines", ".csv": "CSV"}


class Row(NamedTuple):
    """One document. `source` is its JSON object on one line; `names` are the object's own."""

    line: int
    id: str
    title: str
    text: str
    source: bytes
    names: dict[str, Any]

    @property
    def is_empty(self) -> bool:
        return not (self.title.strip() or self.text.strip())


class Catalogue:
    """The rows of a file or BEIR folder. Iterating reads it from the start; `read_bytes` says how far it is."""

    def __init__(self, path: Path) -> None:
        try:
            self.path = _file(path)
            self.total_bytes = self.path.stat().st_size
        except OSError as error:
            raise InputError(f"{path} can't be read: {error.strerror}") from None
        self.read_bytes = 0

    def __iter__(self) -> Iterator[Row]:
        return self._csv_rows() if self.path.suffix.lower() == ".csv" else self._json_rows()

    def error(self, line: int, message: str) -> InputError:
        return InputError(f"{self.path}, line {line}: {message}")

    def _json_rows(self) -> Iterator[Row]:
        from_json = pydantic_core.from_json
        for number, line in self._lines():
            line = line.strip()
            if not line:
                continue
            try:
                found = from_json(line, allow_inf_nan=False, cache_strings="keys")
            except ValueError as error:
                raise self.error(number, _json_problem(line, str(error))) from None
            if type(found) is not dict:
                raise self.error(number, f"not a JSON object but {_kind(found)}{_hint(line)}")
            yield self._row(number, found, line)

    def _csv_rows(self) -> Iterator[Row]:
        last = 0

        def text_lines() -> Iterator[str]:
            for number, line in self._lines():
                try:
                    yield line.decode() + "\n"
                except UnicodeDecodeError as error:
                    raise self.error(number, f"not UTF-8: {error.reason} at byte {error.start + 1}") from None

        csv.field_size_limit(MAX_ROW_BYTES)
        rows = csv.reader(text_lines(), strict=True)
        header: list[str] | None = None
        try:
            for cells in rows:
                first, last = last + 1, rows.line_num
                if not cells:
                    continue
                if header is None:
                    header = self._header(first, cells)
                    continue
                if len(cells) != len(header):
                    raise self.error(first, f"{len(cells)} cells, but the header has {len(header)}")
                found = dict(zip(header, cells, strict=True))
                source = json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode()
                yield self._row(first, found, source)
        except csv.Error as error:
            raise self.error(last + 1, f"not CSV: {error}") from None

    def _header(self, line: int, cells: list[str]) -> list[str]:
        header = [cell.strip() for cell in cells]
        if len(set(header)) != len(header):
            raise self.error(line, f"a column name appears twice in the header: {', '.join(header)}")
        if not {"id", "_id"} & set(header) or not {"title", "text"} & set(header):
            raise self.error(line, f"the header must name id, and title or text or both; {_found(header)}")
        return header

    def _row(self, line: int, found: dict[str, Any], source: bytes) -> Row:
        if len(source) > MAX_ROW_BYTES:
            raise self.error(line, f"more than {MAX_ROW_BYTES:,} bytes in one row")
        id = found.get("id")
        if id is None:
            id = found.get("_id")
        if type(id) is not str:
            if id is None:
                raise self.error(line, f"no id; {_found(found)}")
            if type(id) is not int:
                raise self.error(line, f"id is {_kind(id)}; text or a whole number is needed")
            id = str(id)
        if not id or len(id) > MAX_ID_BYTES or len(id.encode()) > MAX_ID_BYTES:
            raise self.error(line, f"id has {len(id.encode())} bytes; allowed: 1 to {MAX_ID_BYTES}")
        title, text = found.get("title"), found.get("text")
        if type(title) is not str:
            if title is not None:
                raise self.error(line, f"title is {_kind(title)}; text is needed")
            title = ""
        if type(text) is not str:
            if text is not None:
                raise self.error(line, f"text is {_kind(text)}; text is needed")
            text = ""
        if "title" not in found and "text" not in found:
            raise self.error(line, f"neither title nor text; {_found(found)}")
        return Row(line, id, title, text, source, found)

    def _opened(self) -> BinaryIO:
        try:
            return open(self.path, "rb")
        except OSError as error:
            raise InputError(f"{self.path} can't be read: {error.strerror}") from None

    def _block(self, file: BinaryIO) -> bytes:
        try:
            return file.read(_BLOCK_BYTES)
        except OSError as error:
            raise InputError(f"{self.path} can't be read: {error.strerror}") from None

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Lines with their numbers, read in blocks, so that a file without line ends doesn't fill the memory."""
        number, rest = 0, b""
        self.read_bytes = 0
        with self._opened() as file:
            while block := self._block(file):
                if not self.read_bytes:
                    block = block.removeprefix(b"\xef\xbb\xbf")
                self.read_bytes += len(block)
                *lines, rest = (rest + block).split(b"\n")
                for line in lines:
                    number += 1
                    yield number, line
                if len(rest) > MAX_ROW_BYTES:
                    raise self.error(number + 1, f"more than {MAX_ROW_BYTES:,} bytes in one row{_hint(rest)}")
        if rest:
            yield number + 1, rest
        self.read_bytes = self.total_bytes


def _file(path: Path) -> Path:
    if path.is_dir():
        corpus = path / "corpus.jsonl"
        if not corpus.is_file():
            raise InputError(f"{path} is a folder without corpus.jsonl, so it isn't in the BEIR layout")
        return corpus
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no regular file: it is read twice; write it to a file first")
    if not path.is_file():
        raise InputError(f"{path}: there is no such file")
    if path.suffix.lower() not in _SUFFIXES:
        raise InputError(f"{path}: unknown kind of file; allowed: {', '.join(_SUFFIXES)}, or a BEIR folder")
    return path


def _json_problem(line: bytes, message: str) -> str:
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return f"not UTF-8: {error.reason} at byte {error.start + 1}"
    return f"not JSON: {message.replace(' at line 1 column ', ' at column ')}{_hint(line)}"


def _hint(line: bytes) -> str:
    """What is wrong with a catalogue that is one array, or objects over several lines."""
    if line.lstrip().startswith(b"["):
        return "; one object a line is needed, not one array"
    return "; one object a line is needed, not one over several lines" if line.strip() == b"{" else ""


def _found(names: "dict[str, Any] | list[str]") -> str:
    shown = [name[:40] for name in list(names)[:20]]
    return f"found: {', '.join(shown) or 'no fields'}{', …' if len(names) > 20 else ''}"


def _kind(value: object) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")
