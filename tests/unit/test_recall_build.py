import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import filelock
import pytest

from serve_app.recall import builder, reader
from serve_app.recall.builder import build_index
from serve_app.recall.errors import BuildError, InputError
from serve_app.recall.tantivy_index import TantivyIndex

GOOD = '{"id": "a", "title": "desk lamp"}\n'


def ids(index: Path, query: str) -> list[str]:
    return [candidate.id for candidate in TantivyIndex(index).search(query, 10)]


@pytest.fixture
def index(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "index"


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    def file(content: str | bytes, name: str = "catalogue.jsonl") -> Path:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path / name

    return file


def test_json_lines_with_blank_lines_and_a_byte_order_mark(file: Callable[..., Path], index: Path) -> None:
    summary = build_index(
        file(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n\n" + b'{"_id": 2, "text": "chair"}'), index
    )
    assert (summary.documents, summary.empty, summary.fields) == (2, 0, ("id", "title", "_id", "text"))
    assert set(ids(index, "chair lamp")) == {"2", "a"}


def test_csv_with_quotes_line_breaks_and_further_columns(file: Callable[..., Path], index: Path) -> None:
    table = 'id,title,text,price\n1,"Desk, ""oak""","two\nlines",9.5\n\n2,Stuhl,für draußen,\n'
    assert build_index(file(table, "catalogue.csv"), index).documents == 2
    [desk] = TantivyIndex(index).search("oak", 5)
    assert (desk.title, desk.text) == ('Desk, "oak"', "two\nlines")
    assert json.loads(desk.source)["price"] == "9.5"
    assert ids(index, "DRAUSSEN") == ["2"]


def test_beir_folder(tmp_path: Path, index: Path) -> None:
    (tmp_path / "beir").mkdir()
    (tmp_path / "beir" / "corpus.jsonl").write_text('{"_id": "d1", "title": "", "text": "wing in a slipstream"}\n')
    build_index(tmp_path / "beir", index)
    assert ids(index, "wings") == ["d1"]
    assert TantivyIndex(index).stats()["source"] == "beir"


def test_empty_documents_are_counted(file: Callable[..., Path], index: Path) -> None:
    empty = [
        '{"id": "b", "title": "", "text": " "}',
        '{"id": "c", "title": null, "text": null}',
        '{"id": 4, "text": null}',
    ]
    summary = build_index(file(GOOD + "\n".join(empty)), index)
    assert (summary.documents, summary.empty) == (4, 3)


def test_progress_ends_with_everything_read(file: Callable[..., Path], index: Path) -> None:
    seen: list[tuple[int, int, int]] = []
    path = file("".join(f'{{"id": {i}, "title": "{"word " * 20}"}}\n' for i in range(30_000)))
    build_index(path, index, progress=lambda *step: seen.append(step))
    size = path.stat().st_size
    assert len(seen) >= 3
    assert seen == sorted(seen)
    assert seen[-1] == (size, size, 30_000)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ('{"id": "b", "title": ', "not JSON: EOF while parsing a value at column 20"),
        ('{"id": "b", "title": NaN}', "not JSON: "),
        (b'{"id": "b", "title": "caf\xe9"}', "not UTF-8: invalid continuation byte at byte 26"),
        ('{"title": "chair", "sku": 1}', "no id; found: title, sku"),
        ('{"id": 1.5, "title": "chair"}', "id is a number; text or a whole number is needed"),
        ('{"id": true, "title": "chair"}', "id is true or false"),
        ('{"id": "", "title": "chair"}', "id has 0 bytes; allowed: 1 to 512"),
        ('{"id": "b", "title": ["chair"]}', "title is a list; text is needed"),
        ('{"id": "b", "text": 5}', "text is a number; text is needed"),
        ('{"id": "b", "name": "chair"}', "neither title nor text; found: id, name"),
        ('{"id": "a", "title": "chair"}', "id 'a' was already used in line 1"),
        ('[{"id": "b"}]', "not a JSON object but a list; one object a line is needed"),
        (
            '[\n {"id": "b"}',
            "not JSON: EOF while parsing a list at column 1; one object a line is needed, not one array",
        ),
        (
            '{\n "id": "b"',
            "not JSON: EOF while parsing an object at column 1; one object a line is needed, not one over",
        ),
        ("5", "not a JSON object but a number"),
    ],
)
def test_bad_row_names_file_and_line_and_leaves_nothing(
    file: Callable[..., Path], index: Path, row: str | bytes, problem: str
) -> None:
    path = file(GOOD.encode() + b"\n" + (row if isinstance(row, bytes) else row.encode()) + b"\n")
    with pytest.raises(InputError) as error:
        build_index(path, index)
    assert str(error.value).startswith(f"{path}, line 3: {problem}")
    assert not index.exists()


@pytest.mark.parametrize(
    ("table", "line", "problem"),
    [
        ("sku,title\n1,lamp\n", 1, "the header must name id, and title or text or both; found: sku, title"),
        ("id,title,id\n1,lamp,2\n", 1, "a column name appears twice"),
        ('id,title\n1,"two\nlines"\n2,lamp,extra\n', 4, "3 cells, but the header has 2"),
        ('id,title\n1,lamp\n2,"no end\n', 3, "not CSV: unexpected end of data"),
        (b"id,title\n1,caf\xe9\n", 2, "not UTF-8: "),
        ("id,title\n1,lamp\n1,chair\n", 3, "id '1' was already used in line 2"),
    ],
)
def test_bad_table_names_file_and_line(
    file: Callable[..., Path], index: Path, table: str | bytes, line: int, problem: str
) -> None:
    path = file(table, "catalogue.csv")
    with pytest.raises(InputError) as error:
        build_index(path, index)
    assert str(error.value).startswith(f"{path}, line {line}: {problem}")


def test_too_large_a_row_is_refused(
    file: Callable[..., Path], index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "MAX_ROW_BYTES", 1000)
    with pytest.raises(InputError, match=r"line 2: more than 1,000 bytes in one row"):
        build_index(file(GOOD + json.dumps({"id": "b", "title": "x" * 1000})), index)
    with pytest.raises(InputError, match=r"line 1: more than 1,000 bytes in one row; one object a line is needed"):
        build_index(file(json.dumps([{"id": i, "title": "lamp"} for i in range(100)])), index)


def test_duplicate_is_found_while_the_build_still_runs(
    file: Callable[..., Path], index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [f'{{"id": {i}, "title": "x"}}\n' for i in range(2**16)]
    rows[40_000] = rows[3]
    with pytest.raises(InputError, match="line 40001: id '3' was already used in line 4"):
        build_index(file("".join(rows) + "not json"), index)


def test_ids_with_equal_hashes_are_no_duplicates(
    file: Callable[..., Path], index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "hash", lambda id: 1, raising=False)
    assert build_index(file(GOOD + '{"id": "b", "title": "chair"}'), index).documents == 2


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("none.jsonl", "there is no such file"),
        ("a.parquet", "unknown kind of file; allowed: .jsonl, "),
        (".", "BEIR"),
    ],
)
def test_input_of_another_kind_is_refused(file: Callable[..., Path], index: Path, name: str, problem: str) -> None:
    path = file("x", "a.parquet").parent / name
    with pytest.raises(InputError, match=problem):
        build_index(path, index)


def test_a_pipe_is_no_catalogue(tmp_path: Path, index: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(InputError, match=r"rows\.jsonl is no regular file: it is read twice; write it to a file"):
        build_index(tmp_path / "rows.jsonl", index)


def test_a_file_may_be_named_in_any_encoding(file: Callable[..., Path], index: Path) -> None:
    build_index(file(GOOD, os.fsdecode("手机.jsonl".encode("gbk"))), index)
    assert str(TantivyIndex(index).stats()["source"]).endswith("\ufffd.jsonl")
    assert not (index / ".manifest.json").exists()


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_catalogue_without_documents_is_refused(file: Callable[..., Path], index: Path, content: str) -> None:
    with pytest.raises(InputError, match="holds no documents"):
        build_index(file(content), index)


def test_failed_rebuild_leaves_the_old_index(file: Callable[..., Path], index: Path) -> None:
    build_index(file(GOOD), index)
    before = sorted(index.rglob("*"))
    with pytest.raises(InputError):
        build_index(file("nonsense"), index)
    assert sorted(index.rglob("*")) == before
    assert ids(index, "lamp") == ["a"]


def test_rebuild_replaces_the_index_whole_while_readers_go_on(file: Callable[..., Path], index: Path) -> None:
    build_index(file(GOOD), index)
    running = TantivyIndex(index)
    build_index(file('{"id": "new", "title": "floor lamp"}'), index)
    assert [candidate.id for candidate in running.search("lamp", 10)] == ["a"]
    assert ids(index, "lamp") == ["new"]
    assert len(list(index.glob("build-*"))) == 1


def test_reader_that_meets_a_rebuild_opens_the_new_build(
    file: Callable[..., Path], index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from serve_app.recall import manifest

    build_index(file(GOOD), index)
    read, pending = manifest.read, [file('{"id": "new", "title": "floor lamp"}', "new.jsonl")]

    def read_then_rebuild(folder: Path, analysis: int) -> manifest.Manifest:
        found = read(folder, analysis)
        if pending:
            build_index(pending.pop(), index)
        return found

    monkeypatch.setattr(manifest, "read", read_then_rebuild)
    assert ids(index, "lamp") == ["new"]


def test_killed_build_leaves_the_old_index_and_is_cleaned_up_by_the_next(
    file: Callable[..., Path], index: Path
) -> None:
    build_index(file(GOOD), index)
    code = (
        "import sys, os\n"
        "from serve_app.recall.builder import build_index\n"
        "build_index(sys.argv[1], sys.argv[2], progress=lambda *_: os.kill(os.getpid(), 9))\n"
    )
    path = file('{"id": "new", "title": "floor lamp"}', "new.jsonl")
    assert subprocess.run([sys.executable, "-c", code, path, index], check=False).returncode == -9
    assert len(list(index.glob("build-*"))) == 2
    assert ids(index, "lamp") == ["a"]
    build_index(path, index)
    assert len(list(index.glob("build-*"))) == 1
    assert ids(index, "lamp") == ["new"]


def test_index_of_another_version_is_replaced_only_by_a_whole_one(file: Callable[..., Path], index: Path) -> None:
    build_index(file(GOOD), index)
    manifest = index / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"analysis": 1', '"analysis": 0'))
    before = sorted(index.rglob("*"))
    with pytest.raises(InputError):
        build_index(file("nonsense"), index)
    assert sorted(index.rglob("*")) == before
    build_index(file(GOOD), index)
    assert ids(index, "lamp") == ["a"]


def test_second_build_into_a_folder_is_refused(file: Callable[..., Path], index: Path) -> None:
    build_index(file(GOOD), index)
    with filelock.FileLock(index / ".lock"), pytest.raises(BuildError, match="another build is writing into"):
        build_index(file(GOOD), index)
    build_index(file(GOOD), index)


@pytest.mark.parametrize("name", ["manifest.json", "holiday.jpg"])
def test_folder_with_other_things_is_not_filled(file: Callable[..., Path], index: Path, name: str) -> None:
    index.mkdir(parents=True)
    (index / name).write_text('{"manifest_version": 3, "name": "a browser extension"}')
    with pytest.raises(BuildError, match=r"holds other things \("):
        build_index(file(GOOD), index)
    assert os.listdir(index) == [name]


def test_folders_that_only_look_like_builds_are_not_removed(file: Callable[..., Path], index: Path) -> None:
    (index / "build-101").mkdir(parents=True)
    with pytest.raises(BuildError, match=r"holds other things \(build-101\)"):
        build_index(file(GOOD), index)
    assert os.listdir(index) == ["build-101"]


def test_an_input_that_cannot_be_read_is_not_called_a_failed_write(
    file: Callable[..., Path], index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = file(GOOD)
    monkeypatch.setattr(reader, "open", closed, raising=False)
    with pytest.raises(InputError, match=r"catalogue\.jsonl can't be read: Permission denied"):
        build_index(path, index)
    assert not index.exists()


def test_a_build_that_is_refused_leaves_the_other_its_lock(
    file: Callable[..., Path], index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both found no folder, and the other was the first to make it."""
    index.mkdir(parents=True)
    with filelock.FileLock(index / ".lock"):
        monkeypatch.setattr(Path, "exists", lambda path: False)
        with pytest.raises(BuildError, match="another build is writing into"):
            build_index(file(GOOD), index)
        assert os.listdir(index) == [".lock"]


def test_index_path_that_is_a_file_is_refused(file: Callable[..., Path]) -> None:
    with pytest.raises(BuildError, match="is a file; an index is a folder"):
        build_index(file(GOOD), file("x", "index"))


def test_full_disk_is_one_clear_error_and_leaves_nothing(
    file: Callable[..., Path], index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("serve_app.recall.manifest.fsync", full)
    with pytest.raises(
        BuildError, match=r"writing .* failed: .*No space left on device \([\d,]+ MiB are free there"
    ):
        build_index(file(GOOD), index)
    assert not index.exists()


def test_a_manifest_that_is_not_written_leaves_nothing(
    file: Callable[..., Path], index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(BuildError, match="No space left on device"):
        build_index(file(GOOD), index)
    assert not index.exists()


def test_a_build_that_is_interrupted_once_it_is_served_is_served(
    file: Callable[..., Path], index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_index(file(GOOD), index)

    def interrupted(path: Path) -> None:
        # The last thing of a build: the manifest names it already.
        if path == index:
            raise KeyboardInterrupt

    monkeypatch.setattr("serve_app.recall.manifest.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_index(file('{"id": "new", "title": "floor lamp"}', "new.jsonl"), index)
    assert ids(index, "lamp") == ["new"]


def test_interrupted_build_leaves_nothing(file: Callable[..., Path], index: Path) -> None:
    def interrupt(*_: int) -> None:
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        build_index(file(GOOD), index, progress=interrupt)
    assert not index.exists()
    assert time.monotonic() - started < 5
