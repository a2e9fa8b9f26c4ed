"""Queries and documents from what somebody pastes or reads from a file, and ranked ones as CSV. Pure."""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_QUERIES = 64
# Characters of one CSV field; a page's event holds no more (doors.py).
_MAX_FIELD = 16 * 2**20
_END_OF_LINE = re.compile(r"\r\n|\r|\n")
# One by itself is no character, and UTF-8 has no bytes for it.
_HALF_PAIR = re.compile("[\ud800-\udfff]")
_TEXT = ("text", "document", "passage", "content")
_ID = ("id", "_id", "doc_id")


@dataclass(frozen=True, slots=True)
class Document:
    id: str
    text: str


@dataclass(slots=True)
class Batch:
    """One query, or None for that of the page, and the documents to rerank for it."""

    query: str | None
    documents: list[Document] = field(default_factory=list)

    def add(self, text: str, identity: str = "") -> None:
        self.documents.append(Document(identity or str(len(self.documents) + 1), text))


class DocumentsError(ValueError):
    """What can't be read, with its line."""


def read(text: str) -> list[Batch]:
    """Batches of `text`, in the order in which queries appear. It may be

    - JSON Lines: strings, objects with `text` (and `id`, `query`), or objects with `query` and `documents`;
    - a JSON array of the same;
    - CSV whose first line names a column `text` or `document` (and `id`, `query`);
    - anything else: one document a line.

    Raises DocumentsError.
    """
    csv.field_size_limit(_MAX_FIELD)
    text = text.removeprefix("\ufeff")
    # Not what else `splitlines` takes for an end of line: JSON and scraped texts hold such characters.
    lines = [(number, line) for number, line in enumerate(_END_OF_LINE.split(text), 1) if line.strip()]
    items = _array(text)
    if not lines or items == []:
        raise DocumentsError("there are no documents; give one a line, or JSON Lines, or CSV")
    for number, line in lines:
        _check(f"line {number}", line)
    if items is not None:
        batches = _from_json((f"item {number}", item) for number, item in enumerate(items, 1))
    elif lines[0][1].lstrip()[0] in '{"' and _is_json(lines[0][1]):
        batches = _from_json(_rows(lines))
    elif (header := _header(lines[0][1])) is not None:
        batches = _from_csv(text, header)
    else:
        batch = Batch(None)
        for _, line in lines:
            batch.add(line.strip())
        batches = [batch]
    if len(batches) > MAX_QUERIES:
        raise DocumentsError(f"{len(batches)} queries are too many at once; allowed: {MAX_QUERIES}")
    return batches


def _is_json(line: str) -> bool:
    try:
        return isinstance(json.loads(line), str | dict)
    except (ValueError, RecursionError):
        # A mistake in the first line should be named, not taken for a document.
        return line.lstrip().startswith("{")


def _array(text: str) -> list[Any] | None:
    """Items of a JSON array of objects and strings; None where the text is none."""
    if not text.lstrip().startswith("["):
        return None
    try:
        items = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return items if all(isinstance(item, str | dict) for item in items) else None


def _check(place: str, text: str) -> None:
    """Raises DocumentsError for what can't be sent."""
    if _HALF_PAIR.search(text):
        raise DocumentsError(f"{place}: has half a surrogate pair, which is no character")


def _rows(lines: Iterable[tuple[int, str]]) -> Iterator[tuple[str, Any]]:
    for number, line in lines:
        try:
            yield f"line {number}", json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DocumentsError(f"line {number}: is not valid JSON: {error}") from None


def _from_json(rows: Iterable[tuple[str, Any]]) -> list[Batch]:
    """Of rows, each with its place in words."""
    batches: dict[str | None, Batch] = {}
    for place, row in rows:
        if isinstance(row, str):
            row = {"text": row}
        if not isinstance(row, dict):
            raise DocumentsError(f"{place}: is neither an object nor a string")
        query = row.get("query")
        if query is not None and not isinstance(query, str):
            raise DocumentsError(f"{place}: query is no text")
        _check(place, query or "")
        batch = batches.setdefault(query, Batch(query))
        documents = row.get("documents")
        if documents is None:
            documents = [row]
        elif not isinstance(documents, list):
            raise DocumentsError(f"{place}: documents is no list")
        for document in documents:
            found = {"text": document} if isinstance(document, str) else document
            text = _first(found, _TEXT) if isinstance(found, dict) else None
            if text is None:
                raise DocumentsError(f"{place}: a document without text (allowed: {', '.join(_TEXT)})")
            identity = _first(found, _ID) or ""
            _check(place, identity + text)
            batch.add(text, identity)
    return list(batches.values())


def _first(row: dict[str, Any], names: Sequence[str]) -> str | None:
    return next((str(row[name]) for name in names if isinstance(row.get(name), str | int)), None)


@dataclass(frozen=True, slots=True)
class _Header:
    """Columns of a CSV by what they are, and how many there are."""

    columns: dict[str, int]
    width: int


def _header(line: str) -> _Header | None:
    """None where the line is none: names have a word or two, where a document may have more."""
    try:
        names = [name.strip().lower() for name in next(csv.reader([line]))]
    except csv.Error:
        return None
    found: dict[str, int] = {}
    for what, known in (("text", _TEXT), ("id", _ID), ("query", ("query",))):
        index = next((names.index(name) for name in known if name in names), None)
        if index is not None:
            found[what] = index
    if "text" not in found or any(len(name.split()) > 2 for name in names):
        return None
    # One word alone may be a document.
    return _Header(found, len(names)) if len(names) > 1 or line.strip().lower() in _TEXT else None


def _from_csv(text: str, header: _Header) -> list[Batch]:
    columns = header.columns
    batches: dict[str | None, Batch] = {}
    # Else a quote that is missing would make one document of all rows after it.
    rows = csv.reader(io.StringIO(text), strict=True)
    began = 1
    try:
        for row in rows:
            # The header, after blank lines.
            began = rows.line_num + 1
            if any(map(str.strip, row)):
                break
        for row in rows:
            began = rows.line_num + 1
            if not row:
                continue
            if len(row) <= max(columns.values()):
                raise DocumentsError(f"line {rows.line_num}: has {len(row)} columns, fewer than the first line")
            if any(cell.strip() for cell in row[header.width :]):
                raise DocumentsError(
                    f"line {rows.line_num}: has {len(row)} columns, the first line {header.width}; a text with "
                    "commas stands in double quotes"
                )
            query = row[columns["query"]] if "query" in columns else None
            batch = batches.setdefault(query, Batch(query))
            batch.add(row[columns["text"]], row[columns["id"]] if "id" in columns else "")
    except csv.Error as error:
        raise DocumentsError(f"line {began}: is not valid CSV: {error}") from None
    if not batches:
        raise DocumentsError("the CSV has a first line and no documents")
    return list(batches.values())


@dataclass(frozen=True, slots=True)
class Ranked:
    query: str
    rank: int
    score: float
    document: Document


def to_csv(rows: Iterable[Ranked]) -> str:
    """With a first line of names, and a byte order mark, by which spreadsheets know UTF-8."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(["query", "rank", "score", "id", "text"])
    for row in rows:
        writer.writerow(
            [_plain(row.query), row.rank, f"{row.score:.6f}", _plain(row.document.id), _plain(row.document.text)]
        )
    return "\ufeff" + out.getvalue()


def _plain(text: str) -> str:
    """As text, also in a spreadsheet, which would run what begins like a formula."""
    return f"'{text}" if text.lstrip()[:1] in ("=", "+", "-", "@") and not _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
