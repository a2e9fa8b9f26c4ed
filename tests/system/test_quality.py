"""The order that users see: BM25 by itself, and what the served pipeline makes of it."""

import json

import ir_measures
import pytest

from serve_app.evaluation import evaluate
from serve_app.recall.builder import build_index
from serve_app.recall.tantivy_index import TantivyIndex
from tests.system.conftest import ROOT

CRANFIELD = ROOT.parent / "shared" / "data" / "cranfield"


@pytest.mark.skipif(not CRANFIELD.is_dir(), reason="the Cranfield collection is not here")
def test_bm25_on_cranfield_is_as_good_as_documented(tmp_path):
    build_index(CRANFIELD, tmp_path / "index")
    index = TantivyIndex(tmp_path / "index")
    queries = [json.loads(line) for line in (CRANFIELD / "queries.jsonl").open(encoding="utf-8")]
    rows = [line.split("\t") for line in (CRANFIELD / "qrels/test.tsv").read_text().splitlines()[1:]]
    qrels = [ir_measures.Qrel(query, document, int(grade)) for query, document, grade in rows]
    run = [
        ir_measures.ScoredDoc(query["_id"], candidate.id, candidate.score)
        for query in queries
        for candidate in index.search(query["text"], 100)
    ]
    ndcg = ir_measures.calc_aggregate([ir_measures.nDCG @ 10], qrels, run)[ir_measures.nDCG @ 10]
    print(f"BM25 on Cranfield: nDCG@10 {ndcg:.4f}")
    assert ndcg >= 0.385


def test_the_served_pipeline_helps_english_queries_and_leaves_chinese_ones_alone(system, tmp_path):
    queries = [json.loads(line) for line in (ROOT / "examples/queries.jsonl").open(encoding="utf-8")]
    chosen = [
        query
        for lang, every in (("en", 4), ("zh", 4))
        for query in [q for q in queries if q["lang"] == lang][::every]
    ]
    (tmp_path / "queries.jsonl").write_text(
        "".join(json.dumps(query, ensure_ascii=False) + "\n" for query in chosen), encoding="utf-8"
    )
    ids = {query["_id"] for query in chosen}
    rows = (ROOT / "examples/qrels/test.tsv").read_text().splitlines(keepends=True)
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels/test.tsv").write_text("".join(row for row in rows if row.partition("\t")[0] in ids))
    report = evaluate(tmp_path, system.url, models=["bm25", "fused"], concurrency=2, timeout_s=60, progress=False)
    by_lang = {result.name: result.ndcg_by_lang for result in report.results}
    print(report.table())
    assert report.failures == 0
    assert by_lang["fused"]["en"] > by_lang["bm25"]["en"] + 0.05
    assert by_lang["fused"]["zh"] >= by_lang["bm25"]["zh"]
