"""Search and rerank calls through the running fleet: gateway, recall and real models."""

import json
import time
from pathlib import Path

import pytest

from tests.logs import lines_of
from tests.system.conftest import ROOT, wait_for


def test_search_reranks_what_recall_found(system):
    body = {"query": "headphones that block out noise", "top_n": 5, "timeout_ms": 20_000}
    answer = system.client.post("/v1/search", json=body).json()
    assert "degraded" not in answer["meta"], answer["meta"]
    assert answer["meta"]["pipeline"] == "fused"
    assert len(answer["results"]) == 5
    for result in answer["results"]:
        assert result["recall_score"] > 0
        assert 0 < result["rerank_score"] <= 1
        assert 0 <= result["score"] <= 1
        assert result["document"]["lang"] in ("en", "zh", "mixed")
    scores = [result["score"] for result in answer["results"]]
    assert scores == sorted(scores, reverse=True)
    plain = system.client.post("/v1/search", json={**body, "rerank": False}).json()
    assert [r["id"] for r in plain["results"]] != [r["id"] for r in answer["results"]]


def test_an_english_model_does_not_spoil_chinese_queries(system):
    body = {"query": "降噪耳机", "top_n": 10}
    fused = system.client.post("/v1/search", json=body).json()
    bm25 = system.client.post("/v1/search", json={**body, "model": "bm25"}).json()
    assert [r["id"] for r in fused["results"]] == [r["id"] for r in bm25["results"]]
    assert "scripts" in fused["meta"]["stages"][1]["skipped"]
    assert "degraded" not in fused["meta"]


def test_model_numbers_are_found_with_and_without_the_hyphen(system):
    products = [json.loads(line) for line in (ROOT / "examples/catalog.jsonl").open(encoding="utf-8")]
    product = next(p for p in products if "-" in p["attributes"].get("model", ""))
    model = product["attributes"]["model"]
    for query in (model, model.replace("-", ""), model.replace("-", " ").lower()):
        answer = system.client.post("/v1/search", json={"query": query, "model": "bm25"}).json()
        assert model in answer["results"][0]["title"], query


def test_a_cascade_asks_each_model_for_what_the_one_before_kept(system):
    body = {"query": "running shoes", "model": "cascade", "top_n": 10, "timeout_ms": 30_000}
    answer = system.client.post("/v1/search", json=body).json()
    stages = {stage["name"]: stage for stage in answer["meta"]["stages"]}
    assert "degraded" not in answer["meta"], answer["meta"]
    assert 20 < stages["minilm"]["pairs"] <= 50
    assert stages["qwen-f32"]["pairs"] == 20
    assert len(answer["results"]) == 10


def test_rerank_puts_the_answer_first(system):
    documents = ["London is the capital of England.", "The cat sat on the mat.", "Paris is the capital of France."]
    for path in ("/v1/rerank", "/v2/rerank", "/rerank"):
        body = {"model": "minilm", "query": "What is the capital of France?", "documents": documents}
        answer = system.client.post(path, json=body).json()
        assert [r["index"] for r in answer["results"]] == [2, 0, 1], path
        assert answer["usage"]["total_tokens"] > 0


def test_scores_of_pairs_are_those_of_rerank(system):
    documents = ["London is the capital of England.", "The cat sat on the mat."]
    query = "What is the capital of France?"
    reranked = system.client.post(
        "/v1/rerank", json={"model": "cross-encoder", "query": query, "documents": documents}
    ).json()
    scored = system.client.post(
        "/v1/score", json={"model": "cross-encoder", "text_1": query, "text_2": documents}
    ).json()
    by_index = {r["index"]: r["relevance_score"] for r in reranked["results"]}
    assert [entry["score"] for entry in scored["data"]] == pytest.approx([by_index[0], by_index[1]], abs=1e-6)


def test_an_instruction_reaches_the_model(system):
    body = {"model": "qwen-f32", "query": "capital of France", "documents": ["Paris", "London"]}
    plain = system.client.post("/v1/rerank", json=body).json()["results"]
    told = system.client.post("/v1/rerank", json={**body, "instruction": "Find the larger city"}).json()["results"]
    scores = [{r["index"]: r["relevance_score"] for r in results} for results in (plain, told)]
    assert scores[0] != scores[1]


def test_a_large_call_is_split_and_comes_back_in_order(system):
    documents = [f"document {i} " + "word " * (i % 7) for i in range(100)]
    body = {"model": "qwen-f32", "query": "document", "timeout_ms": 30_000}
    whole = system.client.post("/v1/rerank", json={**body, "documents": documents}).json()
    assert "degraded" not in whole["meta"]
    scores = {r["index"]: r["relevance_score"] for r in whole["results"]}
    for i in (0, 15, 16, 99):
        alone = system.client.post("/v1/rerank", json={**body, "documents": [documents[i]]}).json()
        assert scores[i] == pytest.approx(alone["results"][0]["relevance_score"], abs=1e-4)


def test_a_deadline_that_no_model_can_meet_still_gets_an_answer(system):
    documents = [f"{i} " + "long " * 200 for i in range(300)]
    body = {"model": "qwen-f32", "query": "7", "documents": documents, "timeout_ms": 300}
    response = system.client.post("/v1/rerank", json=body)
    answer = response.json()
    assert response.status_code == 200
    assert answer["meta"]["degraded"][0]["reason"] == "timeout"
    assert answer["results"][0]["index"] == 7
    assert len(answer["results"]) == 300


def test_cancelled_work_leaves_the_engine(system):
    from ray import serve

    handle = serve.get_deployment_handle("Reranker", app_name="qwen-f32")

    def rerank(numbers, timeout_ms):
        documents = [f"{i} " + "long " * 200 for i in numbers]
        body = {"model": "qwen-f32", "query": "7", "documents": documents, "timeout_ms": timeout_ms}
        return system.client.post("/v1/rerank", json=body).json()

    began = time.monotonic()
    assert "degraded" not in rerank(range(1000, 1050), 60_000)["meta"]
    took_s = time.monotonic() - began
    late = rerank(range(1000), 1000)
    assert late["meta"]["degraded"][0]["reason"] == "timeout"
    # Twenty times as many documents would keep it busy for twenty times as long.
    wait_for(
        lambda: handle.info.remote().result(timeout_s=30)["unfinished"] == 0, 5 * took_s, 0.1, "the engine idle"
    )

    def ends():
        lines = lines_of(late["id"]).get("qwen-f32_Reranker", ())
        return [line["message"] for line in lines if line["message"].startswith("CALL score ")]

    # It had some of the work.
    wait_for(lambda: any(not end.startswith("CALL score OK ") for end in ends()), 10, 0.2, "a call given up")


def test_a_replica_loads_nothing_for_sound_training_or_gpus(system):
    from ray import serve

    handle = serve.get_deployment_handle("Reranker", app_name="qwen-f32")
    pid = handle.info.remote().result(timeout_s=30)["pid"]
    loaded = Path(f"/proc/{pid}/maps").read_text()
    assert "/torch/" in loaded
    for package in ("scipy", "sklearn", "triton"):
        assert f"/{package}/" not in loaded


def test_a_query_without_room_is_refused_with_the_limit(system):
    body = {"model": "qwen-f32", "query": "word " * 1500, "documents": ["a"]}
    response = system.client.post("/v1/rerank", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "prompt_too_long"
    assert "1024" in response.json()["message"]
    assert "\n" not in response.json()["message"]


def test_an_answer_has_one_request_id(system):
    response = system.client.get("/healthz", headers={"X-Request-Id": "abc-1"})
    assert response.headers.get_list("x-request-id") == ["abc-1"]
    response = system.client.post("/v1/search", json={"query": "shoes", "model": "bm25"})
    assert response.headers.get_list("x-request-id") == [response.json()["id"]]


def test_models_and_readiness_say_what_runs(system):
    entries = {entry["id"]: entry for entry in system.client.get("/v1/models").json()["data"]}
    assert entries["minilm"]["running_replicas"] == 1
    assert entries["default"]["kind"] == "route"
    ready = system.client.get("/readyz").json()
    assert ready["applications"]["catalogue"] == {"status": "RUNNING", "running_replicas": 1}
    assert system.client.get("/healthz").json() == {"status": "ok"}
