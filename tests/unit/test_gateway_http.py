"""The gateway's HTTP surface over a fleet double: dialects, limits and the one error body."""

import asyncio
import json
import re
import time
from dataclasses import replace

import httpx
import pytest

from serve_app.gateway import service
from serve_app.gateway.app import create_app
from serve_app.gateway.errors import CODES
from serve_app.gateway.pipeline import StageFailure
from serve_app.gateway.plan import resolve
from serve_app.reranker.messages import PromptTooLongError
from serve_app.rollout.messages import Splits
from serve_app.rollout.split import Split
from tests.unit.gateway_double import DOCUMENTS, SETTINGS, FleetDouble, Gateway


@pytest.fixture(scope="module")
def gateway():
    return Gateway()


def failing(failure):
    def scores(variant, request):
        raise failure

    return Gateway(FleetDouble(scores))


def test_search_shows_recall_rerank_and_final_scores(gateway):
    answer = gateway.post("/v1/search", {"query": "cats", "top_n": 3, "model": "fused"}).json()
    assert [r["id"] for r in answer["results"]] == sorted((r["id"] for r in answer["results"]), key=int)
    first = answer["results"][0]
    assert first["recall_score"] == 10.0 - int(first["id"])
    assert first["rerank_score"] == int(first["id"]) / 10
    assert 0 <= first["score"] <= 1
    assert first["document"] == {"price": int(first["id"])}
    assert answer["meta"]["pipeline"] == "fused"
    assert [stage["name"] for stage in answer["meta"]["stages"]] == ["recall", "small"]
    assert "degraded" not in answer["meta"]


def test_search_without_rerank_keeps_the_order_of_recall(gateway):
    answer = gateway.post("/v1/search", {"query": "cats", "rerank": False}).json()
    assert [r["id"] for r in answer["results"]] == [str(i) for i in range(10)]
    assert {r["rerank_score"] for r in answer["results"]} == {None}


def test_search_recalls_at_least_what_is_to_be_shown():
    fleet = FleetDouble()
    seen = []
    recalls = fleet.recalls
    fleet.recalls = lambda request: seen.append(request.k) or recalls(request)
    Gateway(fleet).post("/v1/search", {"query": "cats", "top_n": 30})
    Gateway(fleet).post("/v1/search", {"query": "cats", "recall_k": 7, "top_n": 2})
    assert seen == [30, 7]


def test_explain_lists_the_score_of_every_stage(gateway):
    body = {"query": "cats", "model": "cascade", "explain": True}
    first = gateway.post("/v1/search", body).json()["results"][0]
    assert [stage["stage"] for stage in first["stages"]] == ["recall", "small", "large"]


def test_cohere_v1_answers_without_documents_unless_asked(gateway):
    body = {"query": "cats", "documents": DOCUMENTS, "top_n": 2, "model": "small"}
    answer = gateway.post("/v1/rerank", body).json()
    assert [(r["index"], r["relevance_score"]) for r in answer["results"]] == [(9, 0.9), (8, 0.8)]
    assert "document" not in answer["results"][0]
    assert answer["meta"]["api_version"]["version"]
    body["return_documents"] = True
    assert gateway.post("/v1/rerank", body).json()["results"][0]["document"] == {"text": DOCUMENTS[9]}


def test_rerank_takes_object_documents_and_rank_fields():
    fleet = FleetDouble(lambda variant, request: [0.5] * len(request.documents))
    gateway = Gateway(fleet)
    documents = [{"text": "a", "brand": "N", "tags": ["x"]}, "b"]
    answer = gateway.post("/rerank", {"query": "q", "documents": documents, "model": "small"}).json()
    assert fleet.asked[0][1].documents == ["a", "b"]
    assert [r["document"] for r in answer["results"]] == [documents[0], {"text": "b"}]
    body = {"query": "q", "documents": documents[:1], "rank_fields": ["brand", "tags"], "model": "small"}
    assert gateway.post("/v1/rerank", body).status_code == 200
    assert fleet.asked[1][1].documents == ['brand: N\ntags: ["x"]']


def test_rank_fields_that_no_document_has_are_named(gateway):
    documents = ["a", {"title": "b", "body": "c"}, {"title": "d"}]
    body = {"query": "q", "documents": documents, "rank_fields": ["titel", "text"], "model": "small"}
    refused = gateway.post("/v1/rerank", body)
    assert refused.json()["error"]["param"] == "rank_fields"
    message = "documents[1] has none of rank_fields (titel, text); it has: body, title"
    assert (refused.status_code, refused.json()["message"]) == (400, message)


def test_a_document_may_lack_a_field_that_another_has():
    fleet = FleetDouble(lambda variant, request: [0.5] * len(request.documents))
    documents = [{"title": "a"}, {"title": "b", "body": "c"}, {"title": "d", "body": None}]
    body = {"query": "q", "documents": documents, "rank_fields": ["body"], "model": "small"}
    answer = Gateway(fleet).post("/v1/rerank", body).json()
    assert [result["index"] for result in answer["results"]] == [1, 0, 2]
    assert fleet.asked[0][1].documents == ["body: c"]


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank"])
def test_a_name_in_rank_fields_that_no_document_has_is_warned_of(path):
    fleet = FleetDouble(lambda variant, request: [0.5] * len(request.documents))
    documents = ["a", {"title": "b", "body": "c"}, {"title": "d"}]
    body = {"query": "q", "documents": documents, "model": "small"}
    answer = Gateway(fleet).post(path, {**body, "rank_fields": ["title", "bdoy"]}).json()
    assert answer["meta"]["warnings"] == ["rank_fields: no document has 'bdoy'"]
    assert fleet.asked[0][1].documents == ["a", "title: b", "title: d"]
    answer = Gateway(fleet).post(path, {**body, "rank_fields": ["title", "body"]}).json()
    assert "warnings" not in answer["meta"]


def test_a_text_is_looked_at_where_it_is_read():
    fleet = FleetDouble(lambda variant, request: [0.5] * len(request.documents))
    body = {"query": "q", "documents": [{"title": "a", "text": 5}], "model": "small", "return_documents": True}
    answer = Gateway(fleet).post("/v1/rerank", {**body, "rank_fields": ["title"]}).json()
    assert answer["results"][0]["document"] == {"title": "a", "text": 5}
    refused = Gateway(fleet).post("/v1/rerank", body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "documents[0].text")


@pytest.mark.parametrize(
    ("asked", "of_stage", "cap"),
    [
        (4096, 256, 256),
        (100, 256, 100),
        (0, 256, 256),
        (None, 256, 256),
        (4096, None, 4096),
        (0, None, None),
    ],
)
@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/v1/score"])
def test_documents_are_cut_to_the_smaller_of_the_calls_cap_and_the_stages(path, asked, of_stage, cap):
    fleet = FleetDouble()
    stage = {"variant": "small", "max_tokens_per_doc": of_stage}
    gateway = Gateway(
        fleet, {**SETTINGS, "pipelines": {**SETTINGS["pipelines"], "one": {"recall_k": 10, "stages": [stage]}}}
    )
    body = {"query": "q", "queries": "q", "documents": DOCUMENTS[:1], "max_tokens_per_doc": asked}
    assert gateway.post(path, body).status_code == 200
    assert fleet.asked[0][1].max_tokens_per_doc == cap


def test_ties_keep_the_order_of_the_documents():
    gateway = Gateway(FleetDouble(lambda variant, request: [0.5] * len(request.documents)))
    answer = gateway.post("/v2/rerank", {"query": "q", "documents": DOCUMENTS, "model": "small"}).json()
    assert [r["index"] for r in answer["results"]] == list(range(10))


def test_numbers_that_json_cannot_say_do_not_come_back(gateway):
    body = b'{"query": "q", "documents": [{"text": "document number 1", "x": 1e400}], "model": "small"}'
    answer = gateway.post("/rerank", body)
    assert "Infinity" not in answer.text
    assert answer.json()["results"][0]["document"]["x"] is None


def test_rank_fields_cannot_multiply_a_document(gateway):
    body = {"query": "q", "documents": [{"text": "x" * 1000}], "rank_fields": ["text"] * 33}
    assert gateway.post("/v1/rerank", body).status_code == 400


class Replaced(FleetDouble):
    """Replicas of two revisions; `revisions` says which answers next, the last one from then on."""

    def __init__(self, *revisions):
        super().__init__()
        self.revisions = list(revisions)

    async def score(self, *args, **kwargs):
        revision = self.revisions.pop(0) if len(self.revisions) > 1 else self.revisions[0]
        value = {"old": 0.1, "new": 0.9}[revision]
        (part,) = await super().score(*args, **kwargs)
        return [replace(part, scores=[value] * len(part.scores), fingerprint=revision)]


def test_a_score_call_is_of_one_revision():
    body = {"text_1": ["1", "2", "3"], "text_2": DOCUMENTS[:3], "model": "small"}
    answer = Gateway(Replaced("old", "old", "new", "new")).post("/v1/score", body).json()
    assert {entry["score"] for entry in answer["data"]} == {0.9}
    # Of unlike machines, which both go on: better two revisions than none.
    never = Gateway(Replaced(*["old", "new", "new"] + ["old", "new", "new", "old"] * 9)).post("/v1/score", body)
    assert {entry["score"] for entry in never.json()["data"]} == {0.1, 0.9}


def test_distinct_queries_of_a_score_call_are_under_way_together():
    under_way, most = 0, 0

    class SlowFleet(FleetDouble):
        async def score(self, *args, **kwargs):
            nonlocal under_way, most
            under_way += 1
            most = max(most, under_way)
            await asyncio.sleep(0.05)
            under_way -= 1
            return await super().score(*args, **kwargs)

    texts = [f"document number {i}" for i in range(16)]
    body = {"text_1": [str(i) for i in range(16)], "text_2": texts, "model": "small", "timeout_ms": 60_000}
    answer = Gateway(SlowFleet()).post("/v1/score", body).json()
    assert 2 <= most <= 8
    assert [e["score"] for e in answer["data"]] == [i / 10 for i in range(16)]
    assert answer["meta"]["stages"][0]["pairs"] == 16


@pytest.mark.parametrize("user", [None, *map(str, range(10))])
def test_a_score_call_gets_a_pipeline_of_the_route_that_can_score(gateway, user):
    body = {"text_1": "q", "text_2": DOCUMENTS[:2], "model": "split", "user": user}
    answer = gateway.post("/v1/score", body)
    assert (answer.status_code, answer.json()["meta"]["pipeline"]) == (200, "one")


def test_a_route_that_cannot_score_says_which_pipelines_it_has():
    gateway = Gateway(settings={**SETTINGS, "routes": {"words": {"weights": {"bm25": 1, "one": 0}}}})
    refused = gateway.post("/v1/score", {"text_1": "q", "text_2": "d"}).json()
    assert refused["message"] == "words has no pipeline with a rerank stage to score with; it has: bm25"
    assert refused["error"]["param"] == "model"


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank", "/v1/score", "/score"])
def test_a_user_gets_one_pipeline_by_every_path(path):
    fleet = FleetDouble()
    routes = {"default": {"weights": {"one": 50, "two": 50}}}
    asked = {"one": "small", "two": "large"}
    pipelines = {name: {"recall_k": 10, "stages": [{"variant": variant}]} for name, variant in asked.items()}
    gateway = Gateway(fleet, {**SETTINGS, "pipelines": pipelines, "routes": routes})
    documents = "texts" if path == "/rerank" else "documents"
    users = [f"u{i}" for i in range(12)]
    for i, user in enumerate(users):
        body = {"query": "q", "queries": "q", documents: [f"document number {i}"], "user": user}
        assert gateway.post(path, body).status_code == 200
    assert [variant for variant, _ in fleet.asked] == [
        asked[resolve(gateway.service.settings, None, None, user).pipeline] for user in users
    ]


@pytest.mark.parametrize(("left", "right"), [("text_1", "text_2"), ("queries", "documents"), ("data_1", "data_2")])
def test_errors_of_a_score_call_name_what_was_sent(gateway, left, right):
    def refused(queries, documents):
        body = {left: queries, right: documents, "model": "small"}
        error = gateway.post("/v1/score", body).json()["error"]
        return error["param"], error["message"]

    assert refused("q", ["a", " "]) == (f"{right}[1]", f"{right}[1] is blank")
    assert refused("q", [" "]) == (right, f"{right} holds nothing but blank texts")
    assert refused(" ", ["a"]) == (left, f"{left} is empty")
    assert refused("q", ["a", 7]) == (f"{right}[1]", f"{right}[1]: Input should be a valid string (got 7)")
    assert refused(["p", "q"], ["a", "b", "c"])[1].startswith(f"{left} has 2 texts and {right} has 3;")


@pytest.mark.parametrize("path", ["/v1/score", "/score"])
def test_a_score_call_refuses_what_its_model_cannot_read(path):
    gateway = Gateway()
    body = {"queries": ["cats", "降噪耳机"], "documents": DOCUMENTS[:2]}
    refused = gateway.post(path, body)
    message = "the query has '降', and variants.small.scripts is [Latin]"
    assert (refused.status_code, refused.json()["message"]) == (400, message)
    assert (refused.json()["error"]["code"], refused.json()["error"]["param"]) == ("invalid_request", "queries")
    assert not gateway.fleet.asked
    # The one that gives the scores.
    assert gateway.post(path, {**body, "model": "cascade"}).status_code == 200
    assert gateway.post(path, {**body, "model": "small"}).status_code == 200


def test_stable_scores_what_a_canary_cannot_read():
    variants = {"old": "large", "new": "small"}
    pipelines = {name: {"recall_k": 10, "stages": [{"variant": variant}]} for name, variant in variants.items()}
    gateway = Gateway(
        settings={**SETTINGS, "pipelines": pipelines, "routes": {"default": {"weights": {"old": 1}}}}
    )
    gateway.service.rollouts._splits = Splits({"default": (Split("r1", "default", "old", "new", 100),)})
    answer = gateway.post("/v1/score", {"text_1": "降噪耳机", "text_2": DOCUMENTS[:2]})
    assert (answer.status_code, answer.json()["meta"]["why"]) == (200, "fallback")
    assert [variant for variant, _ in gateway.fleet.asked] == ["large"]


def test_what_neither_a_canary_nor_stable_can_read_costs_nothing():
    pipelines = {name: {"recall_k": 10, "stages": [{"variant": "small"}]} for name in ("old", "new")}
    gateway = Gateway(
        settings={**SETTINGS, "pipelines": pipelines, "routes": {"default": {"weights": {"old": 1}}}}
    )
    gateway.service.rollouts._splits = Splits({"default": (Split("r1", "default", "old", "new", 100),)})
    gateway.service._spend = lambda call, pairs: pytest.fail("it was charged")
    answer = gateway.post("/v1/score", {"text_1": "降噪耳机", "text_2": DOCUMENTS[:2]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "text_1")


def test_cohere_v2_refuses_object_documents(gateway):
    response = gateway.post("/v2/rerank", {"query": "q", "documents": [{"text": "a"}]})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "documents[0]"


@pytest.mark.parametrize(
    ("left", "right"), [("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2")]
)
def test_score_takes_every_name_that_vllm_takes(gateway, left, right):
    body = {left: "q", right: DOCUMENTS[:3], "model": "small"}
    answer = gateway.post("/v1/score", body).json()
    assert [entry["score"] for entry in answer["data"]] == [0.0, 0.1, 0.2]
    assert [entry["index"] for entry in answer["data"]] == [0, 1, 2]
    assert answer["usage"]["total_tokens"] == 21


def test_score_pairs_two_lists_position_by_position(gateway):
    body = {"text_1": ["a", "b", "a"], "text_2": DOCUMENTS[:3], "model": "small"}
    assert [e["score"] for e in gateway.post("/score", body).json()["data"]] == [0.0, 0.1, 0.2]


def test_score_never_falls_back():
    response = failing(StageFailure("unavailable", "small is down", 5)).post(
        "/v1/score", {"text_1": "q", "text_2": "d", "model": "small"}
    )
    assert response.status_code == 503
    assert response.headers["retry-after"] == "5"
    assert response.json()["error"]["code"] == "unavailable"


def test_plain_rerank_falls_back_to_bm25_and_says_so():
    gateway = failing(StageFailure("overloaded", "small has too many calls waiting"))
    documents = ["a dog", "two cats and a cat", "nothing"]
    answer = gateway.post("/v1/rerank", {"query": "cats", "documents": documents, "model": "small"}).json()
    assert answer["results"][0]["index"] == 1
    assert all(0 <= r["relevance_score"] < 1 for r in answer["results"])
    assert answer["meta"]["degraded"] == [
        {"stage": "small", "reason": "overloaded", "detail": "small has too many calls waiting"}
    ]


def test_search_falls_back_to_the_order_of_recall_and_says_so():
    answer = failing(StageFailure("timeout", "small did not answer")).post("/v1/search", {"query": "cats"}).json()
    assert [r["id"] for r in answer["results"]] == [str(i) for i in range(10)]
    assert answer["meta"]["degraded"][0]["reason"] == "timeout"


@pytest.mark.parametrize(
    ("reason", "status"), [("timeout", 504), ("overloaded", 503), ("unavailable", 503), ("error", 503)]
)
def test_search_without_recall_is_an_error(reason, status):
    fleet = FleetDouble()

    def recalls(request):
        raise StageFailure(reason, "catalogue is gone", 3)

    fleet.recalls = recalls
    response = Gateway(fleet).post("/v1/search", {"query": "cats"})
    assert response.status_code == status
    assert response.json()["message"] == "catalogue is gone"


def test_a_stage_skips_queries_in_scripts_its_model_does_not_know():
    fleet = FleetDouble()
    gateway = Gateway(fleet)
    answer = gateway.post("/v1/search", {"query": "降噪耳机 headphones"}).json()
    assert not fleet.asked
    assert "scripts" in answer["meta"]["stages"][1]["skipped"]
    assert "degraded" not in answer["meta"]
    gateway.post("/v1/search", {"query": "降噪耳机", "model": "small"})
    assert [variant for variant, _ in fleet.asked] == ["small"]


def test_blank_documents_never_reach_a_model_and_come_last():
    fleet = FleetDouble(lambda variant, request: [0.1, 0.2])
    documents = ["", "x", "  \n", "y"]
    answer = Gateway(fleet).post("/v1/rerank", {"query": "q", "documents": documents, "model": "small"}).json()
    assert fleet.asked[0][1].documents == ["x", "y"]
    assert [r["index"] for r in answer["results"]] == [3, 1, 0, 2]
    fleet.scores = lambda variant, request: [-0.1, 0.3]
    body = {"query": "q", "documents": ["", "a", "b"], "model": "small"}
    assert [r["index"] for r in Gateway(fleet).post("/v1/rerank", body).json()["results"]] == [2, 1, 0]
    body["model"] = "bm25"
    assert [r["index"] for r in Gateway(fleet).post("/v1/rerank", body).json()["results"]] == [1, 2, 0]


@pytest.mark.parametrize("path", ["/v1/rerank", "/v1/score"])
def test_a_prompt_without_room_is_the_callers_error(path):
    texts = (
        {"text_1": "cats", "text_2": "a"} if path == "/v1/score" else {"query": "cats", "documents": ["a", "b"]}
    )
    response = failing(PromptTooLongError("query and instruction have 900 tokens; max_model_len is 512")).post(
        path, {**texts, "model": "small"}
    )
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "prompt_too_long"
    assert response.json()["error"]["param"] == ("text_1" if path == "/v1/score" else "query")


def test_a_search_whose_query_is_too_long_for_a_model_keeps_the_order_that_there_is():
    answer = failing(PromptTooLongError("query and instruction have 900 tokens; max_model_len is 512")).post(
        "/v1/search", {"query": "cats"}
    )
    assert answer.status_code == 200
    ((stage,),) = [answer.json()["meta"]["degraded"]]
    assert (stage["reason"], "900 tokens" in stage["detail"]) == ("prompt_too_long", True)
    assert answer.json()["results"]


RERANK = {"query": "q", "documents": ["a", "b"]}

BAD_CALLS = {
    "empty body": ("/v1/search", b"", 400, "invalid_json", None),
    "half a body": ("/v1/search", b'{"query": "a', 400, "invalid_json", None),
    "invalid UTF-8": ("/v1/search", b'{"query": "\xff\xfe"}', 400, "invalid_json", None),
    "lone surrogate": ("/v1/search", rb'{"query": "\ud800"}', 400, "invalid_json", None),
    "NaN": ("/v1/rerank", b'{"query": "q", "documents": ["a"], "top_n": NaN}', 400, "invalid_json", None),
    "infinity": (
        "/v1/rerank",
        b'{"query": "q", "documents": ["a"], "top_n": -Infinity}',
        400,
        "invalid_json",
        None,
    ),
    "deep nesting": ("/v1/search", b"[" * 10_000, 400, "invalid_json", None),
    "not an object": ("/v1/search", [1], 400, "invalid_request", None),
    "no query": ("/v1/search", {}, 400, "invalid_request", "query"),
    "blank query": ("/v1/search", {"query": " \n\t"}, 400, "invalid_request", "query"),
    "query of a number": ("/v1/search", {"query": 3}, 400, "invalid_request", "query"),
    "long query": ("/v1/search", {"query": "x" * 101}, 400, "limit_exceeded", "query"),
    "unknown field": ("/v1/search", {"query": "q", "recal_k": 3}, 400, "invalid_request", "recal_k"),
    "unknown model": ("/v1/search", {"query": "q", "model": "nope"}, 404, "model_not_found", "model"),
    "unknown route": ("/v1/search", {"query": "q", "route": "one"}, 404, "model_not_found", "route"),
    "deep recall": ("/v1/search", {"query": "q", "recall_k": 51}, 400, "limit_exceeded", "recall_k"),
    "many results": ("/v1/search", {"query": "q", "top_n": 51}, 400, "limit_exceeded", "top_n"),
    "no results": ("/v1/search", {"query": "q", "top_n": 0}, 400, "invalid_request", "top_n"),
    "no time": ("/v1/search", {"query": "q", "timeout_ms": 0}, 400, "invalid_request", "timeout_ms"),
    "too much time": ("/v1/search", {"query": "q", "timeout_ms": 10**9}, 400, "limit_exceeded", "timeout_ms"),
    "no documents": ("/v1/rerank", {**RERANK, "documents": []}, 400, "invalid_request", "documents"),
    "blank documents": ("/v1/rerank", {**RERANK, "documents": ["", " "]}, 400, "invalid_request", "documents"),
    "null document": ("/v1/rerank", {**RERANK, "documents": ["a", None]}, 400, "invalid_request", "documents[1]"),
    "object without text": (
        "/v1/rerank",
        {**RERANK, "documents": ["a", {"title": "t"}]},
        400,
        "invalid_request",
        "documents[1].text",
    ),
    "text of a number": (
        "/v1/rerank",
        {**RERANK, "documents": ["a", {"text": 5}]},
        400,
        "invalid_request",
        "documents[1].text",
    ),
    "too many documents": ("/v1/rerank", {**RERANK, "documents": ["a"] * 21}, 400, "limit_exceeded", "documents"),
    "too large a body": ("/v1/rerank", {**RERANK, "documents": ["a" * 30_000]}, 413, "body_too_large", None),
    "uneven lists": ("/v1/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, 400, "invalid_request", None),
    "one side only": ("/v1/score", {"text_1": "a"}, 400, "invalid_request", None),
    "no reranker": ("/v1/score", {"text_1": "a", "text_2": "b", "model": "bm25"}, 400, "invalid_request", "model"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_get_the_one_error_body(gateway, name):
    path, body, status, code, param = BAD_CALLS[name]
    before = len(gateway.fleet.asked)
    response = gateway.post(path, body)
    error = response.json()
    assert (response.status_code, error["error"]["code"]) == (status, code), error
    assert error["error"]["param"] == param, error
    assert error["message"] == error["error"]["message"]
    assert CODES[code] == (status, error["error"]["type"])
    assert error["id"]
    assert len(gateway.fleet.asked) == before
    assert gateway.post("/v1/search", {"query": "still here"}).status_code == 200


def test_a_limit_is_named_with_what_was_seen(gateway):
    message = gateway.post("/v1/rerank", {**RERANK, "documents": ["a"] * 21}).json()["message"]
    assert message == "documents has 21 documents; limits.max_documents is 20"


@pytest.mark.parametrize(
    ("path", "fields", "what"),
    [
        ("/v1/search", {"top_n": 0}, "top_n: Input should be greater than or equal to 1 (got 0)"),
        ("/v1/search", {"rerank": None}, "rerank: Input should be a valid boolean (got null)"),
        ("/v1/search", {"recall_k": "9" * 70 + "x" * 70}, f"(got '{'9' * 70}xxxxxx...)"),
        ("/v1/rerank", {"truncation_side": "left"}, "truncation_side: Input should be 'right' (got 'left')"),
        (
            "/v1/rerank",
            {"documents": ["a", {"text": ["b"]}]},
            "documents[1].text: Input should be a valid string (g",
        ),
        ("/v1/rerank", {"chat_template_kwargs": 5}, "chat_template_kwargs: Input should be an object (got 5)"),
        ("/v1/rerank", {"query": ["q"]}, "query: Input should be a valid string (got a list)"),
        ("/v2/rerank", {"documents": ["a", {"a": 1}]}, "Input should be a valid string (got an object)"),
    ],
)
def test_an_error_names_the_field_what_was_seen_and_what_is_allowed(gateway, path, fields, what):
    rest = {} if path == "/v1/search" else {"documents": ["a"]}
    refused = gateway.post(path, {"query": "q", **rest, **fields})
    assert refused.status_code == 400
    assert what in refused.json()["message"]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/rerank", {"texts": "private words"}),
        ("/v1/rerank", {"documents": ["a"], "instruction": "private words " * 500}),
        ("/v1/rerank", {"documents": ["a"], "chat_template_kwargs": "private words"}),
        ("/v1/rerank", {"documents": [["private words"]]}),
        ("/v1/score", {"text_1": {"a": "private words"}, "text_2": "b"}),
        ("/v1/search", {"api_key": "private words"}),
        ("/v1/search", {"user": "private words " * 500}),
    ],
)
def test_an_error_shows_no_text(gateway, path, fields):
    refused = gateway.post(path, {"query": "q", **fields})
    assert refused.status_code == 400
    assert "private" not in refused.text


@pytest.mark.parametrize(
    ("path", "body", "what"),
    [
        ("/v1/search", [1], "a list"),
        ("/rerank", "q", "a string"),
        ("/v2/rerank", 5, "5"),
        ("/v1/score", None, "null"),
        ("/v1/events", [], "a list"),
    ],
)
def test_a_body_is_an_object(gateway, path, body, what):
    refused = gateway.post(path, body)
    assert refused.status_code == 400
    assert refused.json()["message"] == f"the body is {what}; allowed: a JSON object"


def test_unknown_fields_are_named_with_those_that_there_are(gateway):
    known = "known: explain, instruction, model, query, recall_k, rerank, route, timeout_ms, top_n, user"
    refused = gateway.post("/v1/search", {"query": "q", "recal_k": 3}).json()
    assert refused["message"] == f"recal_k is unknown; did you mean 'recall_k'? {known}"
    many = gateway.post("/v1/search", {"query": 5, **{"x" * 100 + str(i): 0 for i in range(100)}}).json()
    name = "x" * 80
    assert many["message"] == f"{name}, {name}, {name} and 97 more are unknown; {known}"
    assert many["error"]["param"] == name
    assert gateway.post("/v1/events", {"event": []}).json()["message"] == (
        "event is unknown; did you mean 'events'? known: events"
    )


def test_unknown_paths_and_methods_get_the_error_body(gateway):
    for method, path, status, code in (
        ("GET", "/nope", 404, "not_found"),
        ("GET", "/v1/search", 405, "method_not_allowed"),
    ):
        response = gateway.request(method, path)
        assert response.status_code == status
        assert response.json()["error"]["code"] == code


def test_compressed_bodies_are_refused(gateway):
    response = gateway.post("/v1/search", b"\x1f\x8b", headers={"Content-Encoding": "gzip"})
    assert response.status_code == 415


def test_a_body_that_trickles_in_gives_its_place_up(monkeypatch):
    monkeypatch.setattr("serve_app.gateway.body._TIMEOUT_S", 0.05)
    gateway = Gateway()

    async def body():
        yield b'{"query":'
        await asyncio.sleep(30)

    response = gateway.request("POST", "/v1/search", content=body())
    assert response.status_code == 408
    assert response.json()["error"]["code"] == "body_too_slow"
    assert gateway.service._under_way["calls"] == 0


@pytest.mark.parametrize("value", ["0", "-1", "abc", "1.5", "9" * 12, "²"])
def test_a_bad_timeout_header_is_refused(gateway, value):
    headers = {"X-Timeout-Ms": value.encode()}
    assert gateway.post("/v1/search", {"query": "q"}, headers=headers).status_code == 400


def test_request_ids_come_back_when_a_log_can_carry_them(gateway):
    headers = {"X-Request-Id": "abc-123"}
    assert gateway.post("/v1/search", {"query": "q"}, headers=headers).json()["id"] == "abc-123"
    headers = {"X-Request-Id": "two words\x7f"}
    assert gateway.post("/v1/search", {"query": "q"}, headers=headers).json()["id"] != headers["X-Request-Id"]


def test_too_many_calls_at_once_are_turned_away():
    gateway = Gateway(settings={**SETTINGS, "limits": {**SETTINGS["limits"], "max_concurrent_calls": 1}})
    gateway.service.enter()
    response = gateway.post("/v1/search", {"query": "q"})
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"
    gateway.service.leave()
    assert gateway.post("/v1/search", {"query": "q"}).status_code == 200


def test_a_fault_of_ours_is_a_500_that_gives_nothing_away():
    def scores(variant, request):
        raise RuntimeError("secret")

    response = Gateway(FleetDouble(scores)).post("/v1/search", {"query": "q"})
    assert response.status_code == 500
    assert "secret" not in response.text


@pytest.mark.parametrize(("reason", "status"), [("timeout", 504), ("unavailable", 503), (None, 500)])
def test_calls_that_fail_are_told_of_with_their_route(reason, status):
    def recalls(request):
        raise StageFailure(reason, "catalogue is gone") if reason else RuntimeError

    told = []
    gateway = Gateway()
    gateway.fleet.recalls = recalls
    gateway.app = create_app(gateway.service, lambda *call: told.append(call))
    gateway.post("/v1/search", {"query": "cats"})
    gateway.post("/v1/search", {"query": "cats", "model": "nope"})
    (path, seen, _, call, reports), unresolved = told
    assert (path, seen, call.plan.route, call.plan.pipeline) == ("/v1/search", status, "default", "one")
    assert not reports
    assert unresolved[1:4:2] == (404, None)


def test_models_lists_every_name(gateway):
    entries = gateway.request("GET", "/v1/models").json()["data"]
    kinds = {entry["id"]: entry["kind"] for entry in entries}
    assert kinds["default"] == "route"
    assert kinds["cascade"] == "pipeline"
    assert kinds["small"] == "variant"


def test_a_route_shows_what_its_pipelines_get_now():
    routes = {"default": {"weights": {"one": 3, "bm25": 1, "cascade": 0}}}
    gateway = Gateway(settings={**SETTINGS, "routes": routes})

    def effective(*splits):
        gateway.service.rollouts._splits = Splits({"default": splits})
        entry = gateway.request("GET", "/v1/models/default").json()
        assert entry["weights"] == routes["default"]["weights"]
        return entry["effective_weights"]

    assert effective() == {"one": 75, "bm25": 25, "cascade": 0}
    live = Split("r2", "default", "fused", "cascade", 50)
    promoted = Split("r1", "default", "one", "fused", 100, live=False)
    assert effective(promoted, live) == {"one": 0, "bm25": 25, "fused": 37.5, "cascade": 37.5}
    # Not of this route's pipelines, and one that this gateway doesn't know.
    foreign, unknown = replace(live, stable="cascade"), replace(promoted, canary="later")
    assert effective(foreign, unknown) == {"one": 75, "bm25": 25, "cascade": 0}
    schemas = gateway.request("GET", "/openapi.json").json()["components"]["schemas"]
    assert "effective_weights" in schemas["ModelEntry"]["properties"]


def test_openapi_describes_every_body(gateway):
    schema = gateway.request("GET", "/openapi.json").json()
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            if method == "post" and not path.endswith("{action}"):
                reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
                assert reference.rpartition("/")[2] in schema["components"]["schemas"], path
    assert "$defs" not in json.dumps(schema)


def test_openapi_describes_every_parameter_of_a_path(gateway):
    paths = gateway.request("GET", "/openapi.json").json()["paths"]
    for path, operations in paths.items():
        for operation in operations.values():
            described = [one["name"] for one in operation.get("parameters", []) if one["in"] == "path"]
            assert sorted(described) == sorted(re.findall(r"{(\w+)}", path)), path
    assert "/v1/rollouts/{rollout}/{action}" in paths
    (route,) = (p for p in paths["/v1/rollouts"]["get"]["parameters"] if p["in"] == "query")
    assert route["name"] == "route"


def test_openapi_offers_headers_where_they_are_read(gateway):
    paths = gateway.request("GET", "/openapi.json").json()["paths"]

    def headers(path):
        return {one["name"] for one in paths[path]["post"]["parameters"] if one["in"] == "header"}

    assert headers("/v1/search") == {"X-Timeout-Ms", "X-Request-Id", "Cache-Control"}
    assert headers("/v1/rollouts") == {"X-Operator", "X-Request-Id"}
    assert headers("/v1/events") == {"X-Request-Id"}


def test_refused_settings_leave_the_old_ones_in_force():
    gateway = Gateway()
    gateway.service.configure({**SETTINGS, "routes": {"default": {"weights": {"nope": 1}}}})
    assert gateway.post("/v1/search", {"query": "q"}).status_code == 200
    assert "nope" in gateway.request("GET", "/readyz").json()["settings_error"]


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank", "/v2/rerank", "/v1/score"])
def test_a_list_that_is_too_long_is_refused_before_its_texts_are_looked_at(path):
    name = "text_2" if path == "/v1/score" else "documents"
    body = {"query": "q", "text_1": "q", name: [1] * 5000}
    answer = Gateway().post(path, body)
    assert answer.status_code == 400
    assert answer.json()["message"] == f"{name} has 5000 documents; limits.max_documents is 20"


def test_an_empty_instruction_is_none():
    gateway = Gateway()
    body = {
        "query": "q",
        "documents": DOCUMENTS[:2],
        "instruction": "",
        "chat_template_kwargs": {"instruction": ""},
    }
    assert gateway.post("/rerank", body).status_code == 200
    assert gateway.fleet.asked[0][1].instruction is None


def test_bm25_in_place_of_a_model_keeps_to_the_deadline(monkeypatch):
    begun = []

    def slow(query, documents):
        begun.append(query)
        time.sleep(1)
        return [0.5 for _ in documents]

    monkeypatch.setattr(service, "_bounded_bm25", slow)
    gateway = failing(StageFailure("unavailable", "small is down", 5))

    async def calls():
        transport = httpx.ASGITransport(app=gateway.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            body = {"query": "q", "documents": DOCUMENTS[:3], "model": "one", "timeout_ms": 100}
            return await asyncio.gather(*(client.post("/v1/rerank", json=body) for _ in range(8)))

    answers = asyncio.run(calls())
    assert [answer.status_code for answer in answers] == [200] * 8
    for answer in answers:
        assert [result["index"] for result in answer.json()["results"]] == [0, 1, 2]
        assert answer.json()["meta"]["degraded"]
    # What nobody waits for any more isn't begun.
    assert len(begun) == 1
