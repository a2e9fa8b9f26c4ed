import json
import multiprocessing
import os
import pickle
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.recall import analysis
from serve_app.recall.builder import build_index
from serve_app.recall.errors import OpenError
from serve_app.recall.messages import Candidate, RecallResult
from serve_app.recall.tantivy_index import MAX_TERMS, TantivyIndex

CATALOGUE = [
    ("xm4-zh", "索尼WH-1000XM4无线降噪耳机", "头戴式蓝牙耳机，续航30小时"),
    ("xm4-en", "Sony WH1000XM4 wireless headphones", "Noise cancelling, over-ear."),
    ("xm5-en", "Sony WH-1000XM5 headphones", "Noise-cancelling, over-ear."),
    ("batteries", "4 pack batteries", "1000 mAh AAA"),
    ("case", "手机保护壳", "适用于iPhone15 Pro，防摔"),
    ("charger", "无线充电器", "支持手机充电"),
    ("iphone", "iPhone 15 Pro 128 GB", "Apple smartphone"),
    ("foam", "隔音棉", "降噪材料"),
    ("router", "Wi-Fi router", "dual band"),
    ("novel", "It", "A novel by Stephen King about a town in Maine"),
    ("ja", "ソニー ワイヤレスヘッドホン", "ノイズキャンセリング機能搭載"),
    ("ko", "무선 이어폰 블루투스", "노이즈 캔슬링"),
]


def rows(documents: list[tuple[str, str, str]]) -> str:
    return "".join(json.dumps({"id": i, "title": a, "text": b}) + "\n" for i, a, b in documents)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TantivyIndex]:
    def build(text: str, **boosts: float) -> TantivyIndex:
        folder = tmp_path_factory.mktemp("catalogue")
        (folder / "catalogue.jsonl").write_text(text)
        build_index(folder / "catalogue.jsonl", folder / "index", threads=1)
        return TantivyIndex(folder / "index", **boosts)

    return build


@pytest.fixture(scope="module")
def index(build: Callable[..., TantivyIndex]) -> TantivyIndex:
    return build(rows(CATALOGUE))


def ids(index: TantivyIndex, query: str, k: int = 10) -> list[str]:
    return [candidate.id for candidate in index.search(query, k)]


@pytest.mark.parametrize("query", ["wh1000xm4", "WH-1000XM4", "wh 1000xm4", "WH‑1000XM4"])
def test_exact_model_is_found_before_its_relatives(index: TantivyIndex, query: str) -> None:
    found = ids(index, query)
    assert set(found[:2]) == {"xm4-zh", "xm4-en"}
    assert "batteries" not in found


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("索尼WH-1000XM4无线降噪耳机", "xm4-zh"),
        ("降噪耳机", "xm4-zh"),
        ("无线充电", "charger"),
        ("壳", "case"),
        ("iphone15pro", "iphone"),
        ("wifi router", "router"),
        ("ﾍｯﾄﾞﾎﾝ", "ja"),
        ("블루투스이어폰", "ko"),
        ("it", "novel"),
        ("stephen king's novels", "novel"),
    ],
)
def test_best_match_comes_first(index: TantivyIndex, query: str, first: str) -> None:
    assert ids(index, query)[0] == first


def test_the_letter_a_decides_between_vitamins(build: Callable[..., TantivyIndex]) -> None:
    vitamins = build(rows([(letter, f"维生素{letter}片", "") for letter in "BCDEA"]))
    assert ids(vitamins, "维生素A")[0] == "A"


def test_partial_match_is_found_behind_the_product(index: TantivyIndex) -> None:
    assert ids(index, "手机壳")[:1] == ["case"]
    assert "charger" in ids(index, "手机壳")


@pytest.mark.parametrize("query", ["", "?!", "qwertzuiop"])
def test_no_match_is_an_empty_answer(index: TantivyIndex, query: str) -> None:
    assert index.search(query, 10) == []


def test_k_larger_than_the_catalogue_is_fine(index: TantivyIndex) -> None:
    assert len(index.search("sony headphones 手机", 10_000)) < len(CATALOGUE)


@pytest.mark.parametrize(
    "query", ["+sony -headphones", 'title:"sony"', "sony AND (", "sony^5 OR *", "/so.*/", "[a TO z]"]
)
def test_query_syntax_is_only_text(index: TantivyIndex, query: str) -> None:
    assert {"xm4-en", "xm5-en"} <= set(ids(index, "sony " + query))


def test_equal_scores_keep_the_catalogues_order(build: Callable[..., TantivyIndex]) -> None:
    index = build(rows([(f"d{i}", "same words", "") for i in range(50)]))
    assert ids(index, "words", 20) == [f"d{i}" for i in range(20)]


def test_boosts_decide_between_title_and_text(build: Callable[..., TantivyIndex]) -> None:
    documents = rows([("title", "lamp", "for the desk"), ("text", "for the desk", "lamp")])
    assert ids(build(documents, title_boost=5.0), "lamp") == ["title", "text"]
    assert ids(build(documents, text_boost=5.0), "lamp") == ["text", "title"]


def test_long_query_searches_its_rarest_terms(build: Callable[..., TantivyIndex]) -> None:
    common = [f"common{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(2 * MAX_TERMS)]
    filler = [(f"d{i}", " ".join(common), "") for i in range(20)]
    index = build(rows([*filler, ("rare", "needle", "")]))
    assert "rare" in ids(index, " ".join([*common, "absent", "needle"]), 100)


def test_tantivys_late_lock_is_removed_too(
    build: Callable[..., TantivyIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first reader's thread writes it while the folder goes, once in a thousand times on a busy machine."""
    remove, removed = shutil.rmtree, []

    def late(folder: Path, **how: bool) -> None:
        remove(folder, **how)
        removed.append(folder)
        if len(removed) == 1:
            folder.mkdir()
            (folder / ".tantivy-meta.lock").touch()

    monkeypatch.setattr(shutil, "rmtree", late)
    build(rows(CATALOGUE))
    assert len(removed) == 2
    assert not removed[0].exists()


def test_source_is_the_row_as_it_was(build: Callable[..., TantivyIndex]) -> None:
    row = '{"_id": 7, "title": "Lampe", "price": 12.50, "tags": ["a", {"b": null}], "名": "灯"}'
    [candidate] = build(row + "\r\n").search("lampe", 1)
    assert (candidate.id, candidate.title, candidate.text, candidate.source) == ("7", "Lampe", "", row)


def test_stats_describe_the_index(index: TantivyIndex) -> None:
    stats = json.loads(json.dumps(index.stats()))
    assert stats["documents"] == len(CATALOGUE)
    assert stats["bytes"] > 0
    assert stats["analysis"] == analysis.VERSION
    assert stats["fields"] == ["id", "title", "text"]


def test_result_survives_pickling() -> None:
    some = RecallResult([Candidate("a", 1.5, "t", "x", "{}"), Candidate("b", 0.5, "", "", "{}")], 1.0)
    for result in (some, RecallResult([], 0.1)):
        assert pickle.loads(pickle.dumps(result)) == result


@settings(max_examples=80, deadline=None)
@given(query=st.text(max_size=80) | st.text('ab1-+"():^~*\\/[]{} 机耳', max_size=30), k=st.integers(1, 30))
def test_any_query_is_answered_in_order(index: TantivyIndex, query: str, k: int) -> None:
    found = index.search(query, k)
    scores = [candidate.score for candidate in found]
    assert len(found) <= k
    assert scores == sorted(scores, reverse=True)
    assert len({candidate.id for candidate in found}) == len(found)


WORD = st.text(st.characters(categories=["Lu", "Ll", "Lo", "Nd"]), min_size=1, max_size=12)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.lists(WORD, min_size=1, max_size=4).map(" ".join), min_size=1, max_size=8))
def test_every_document_is_found_by_its_own_title(build: Callable[..., TantivyIndex], titles: list[str]) -> None:
    index = build(rows([(str(i), title, "") for i, title in enumerate(titles)]))
    for i, title in enumerate(titles):
        assert str(i) in ids(index, title, len(titles))


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda index: None, "there is no such folder; build it: serve-app index build"),
        (lambda index: index.mkdir(), "is not a search index: it has no manifest.json"),
        (lambda index: _manifest(index, "{}"), "manifest.json is of something else"),
        (lambda index: _manifest(index, "{"), "can't be read"),
        (lambda index: _manifest(index, '{"format": 1, "analysis": 999}'), "analysis 999, but this version reads"),
        (lambda index: _manifest(index, f'{{"format": 1, "analysis": {analysis.VERSION}}}'), "is damaged"),
    ],
)  # fmt: skip
def test_folder_without_a_usable_index_is_refused(
    tmp_path: Path, spoil: Callable[[Path], None], problem: str
) -> None:
    spoil(tmp_path / "index")
    with pytest.raises(OpenError, match=problem):
        TantivyIndex(tmp_path / "index")


def test_damaged_build_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(rows(CATALOGUE))
    build_index(tmp_path / "a.jsonl", tmp_path / "index")
    for file in tmp_path.glob("index/build-*/bm25/meta.json"):
        file.write_text("{")
    with pytest.raises(OpenError, match="build the index again"):
        TantivyIndex(tmp_path / "index")


def test_a_build_that_was_copied_in_part_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(rows(CATALOGUE))
    build_index(tmp_path / "a.jsonl", tmp_path / "index")
    (documents,) = tmp_path.glob("index/build-*/documents.jsonl")
    os.truncate(documents, documents.stat().st_size // 2)
    with pytest.raises(OpenError, match=r"is damaged: it has \d+ bytes of documents\.jsonl"):
        TantivyIndex(tmp_path / "index")


def test_builds_of_one_catalogue_have_one_fingerprint(tmp_path: Path) -> None:
    found = []
    for folder, catalogue in (("a", CATALOGUE), ("b", CATALOGUE), ("c", CATALOGUE[1:])):
        (tmp_path / f"{folder}.jsonl").write_text(rows(catalogue))
        build_index(tmp_path / f"{folder}.jsonl", tmp_path / folder)
        found.append(TantivyIndex(tmp_path / folder).fingerprint)
    assert found[0] == found[1] != found[2]


def test_a_build_that_is_gone_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(rows(CATALOGUE))
    build_index(tmp_path / "a.jsonl", tmp_path / "index")
    (build,) = tmp_path.glob("index/build-*")
    shutil.rmtree(build)
    with pytest.raises(OpenError, match=rf"lacks .*{build.name}; build the index again"):
        TantivyIndex(tmp_path / "index")


def test_an_index_is_served_to_who_may_only_read_it(tmp_path: Path) -> None:
    """A read-only volume, or another user's folder; also after other replicas have opened it."""
    (tmp_path / "a.jsonl").write_text(rows(CATALOGUE))
    build_index(tmp_path / "a.jsonl", tmp_path / "index")
    files = [path for path in tmp_path.rglob("index/**/*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) & 0o444 for path in files} == {0o444}
    before = sorted(tmp_path.rglob("*"))
    for path in [*tmp_path.rglob("*"), tmp_path]:
        path.chmod(path.stat().st_mode & 0o555)
    reader = multiprocessing.get_context("fork").Process(target=_read_as_a_stranger, args=(tmp_path / "index",))
    reader.start()
    reader.join(60)
    assert reader.exitcode == 0
    assert sorted(tmp_path.rglob("*")) == before


def _read_as_a_stranger(index: Path) -> None:
    # Root may write whatever the modes say.
    if os.getuid() == 0:
        for folder in index.parents:
            if folder.stat().st_mode & 0o005 != 0o005:
                folder.chmod(0o755)
        os.setgid(65534)
        os.setuid(65534)
    assert ids(TantivyIndex(index), "router", 1) == ["router"]


def _manifest(index: Path, text: str) -> None:
    index.mkdir()
    (index / "manifest.json").write_text(text)


def test_a_home_folder_is_the_one_that_the_command_builds_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(OpenError, match=f"no index at {tmp_path}/idx"):
        TantivyIndex("~/idx")
