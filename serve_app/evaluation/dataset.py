"""Reading a test collection in the BEIR layout: queries.jsonl and qrels/test.tsv. The corpus is in the index."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

Grades = dict[str, dict[str, int]]


class DatasetError(ValueError):
    """The folder cannot be used; the message names file and line."""


# What trec_eval's C reckons with.
MAX_GRADE = 1_000_000


@dataclass(frozen=True, slots=True)
class Query:
    """`lang` is empty where the file says none."""

    id: str
    text: str
    lang: str = ""


@dataclass(frozen=True, slots=True)
class Dataset:
    """`queries` have at least one relevant document each, in the file's order; `unjudged` others were left out.
    `grades` are by query, then by document; 0 and less is not relevant."""

    path: Path
    queries: list[Query]
    grades: Grades
    unjudged: int


def read_dataset(path: Path, limit: int | None = None) -> Dataset:
    """The judged queries of a BEIR-layout folder, the first `limit` of them. Raises `DatasetError`."""
    if not path.is_dir():
        raise DatasetError(f"{path}: no such folder; a dataset is one with queries.jsonl and qrels/test.tsv")
    queries = read_queries(path / "queries.jsonl")
    grades = read_grades(path / "qrels" / "test.tsv", {query.id for query in queries})
    judged = [query for query in queries if any(grade > 0 for grade in grades.get(query.id, {}).values())]
    if not judged:
        raise DatasetError(f"{path}: no query has a relevant document in qrels/test.tsv")
    kept = judged[:limit]
    return Dataset(path, kept, {query.id: grades[query.id] for query in kept}, len(queries) - len(judged))


def read_queries(path: Path) -> list[Query]:
    """Rows `{"_id": …, "text": …, "lang"?: …}`."""
    queries: dict[str, Query] = {}
    for where, line in _lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DatasetError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
        if not isinstance(row, dict):
            raise DatasetError(f"{where}: expected an object with _id and text, got {_kind(row)}")
        id, text, lang = row.get("_id"), row.get("text"), row.get("lang")
        if isinstance(id, int) and not isinstance(id, bool):
            id = str(id)
        if not isinstance(id, str) or not id:
            raise DatasetError(f"{where}: _id must be a string or a whole number, got {_kind(id)}")
        if not isinstance(text, str) or not text.strip():
            raise DatasetError(f"{where}: text must be a string that is not empty, got {_kind(text)}")
        if lang is None:
            lang = ""
        if not isinstance(lang, str):
            raise DatasetError(f"{where}: lang must be a string, got {_kind(lang)}")
        if id in queries:
            raise DatasetError(f"{where}: the _id {id!r} is there twice")
        queries[id] = Query(id, text, lang)
    if not queries:
        raise DatasetError(f"{path}: no queries")
    return list(queries.values())


def read_grades(path: Path, known: set[str]) -> Grades:
    """Rows of query id, document id and grade between tabs. The header is optional."""
    grades: Grades = {}
    for n, (where, line) in enumerate(_lines(path)):
        cells = [cell.strip() for cell in line.split("\t")]
        if len(cells) != 3:
            raise DatasetError(
                f"{where}: expected query id, document id and grade between tabs, got {len(cells)} columns"
            )
        query, document, grade = cells
        try:
            value = int(grade)
        except ValueError:
            if n == 0 and query not in known:
                continue
            raise DatasetError(f"{where}: the grade must be a whole number, got {grade!r}") from None
        if abs(value) > MAX_GRADE:
            raise DatasetError(f"{where}: the grade is {value}; allowed: {-MAX_GRADE:,} to {MAX_GRADE:,}")
        if query not in known:
            raise DatasetError(f"{where}: the query {query!r} is not in queries.jsonl")
        if not document:
            raise DatasetError(f"{where}: the document id is empty")
        if grades.setdefault(query, {}).setdefault(document, value) != value:
            raise DatasetError(
                f"{where}: the document {document!r} has the grades {grades[query][document]} and {value} "
                f"for the query {query!r}"
            )
    return grades


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Lines that are not blank, each with the `file:line` that an error names."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such file") from None
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror}") from None
    for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DatasetError(f"{path}:{number}: not UTF-8 (byte {error.start + 1} of the line)") from None
        if line.strip():
            yield f"{path}:{number}", line.rstrip("\r")


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", bool: "a boolean", type(None): "nothing"}
    return names.get(type(value)) or repr(value)
