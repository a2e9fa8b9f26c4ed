"""What the clients of single dialects look for, over a fleet double; the clients are in tests/system."""

import math

import pytest

from serve_app.gateway.pipeline import StageFailure
from tests.unit.gateway_double import SETTINGS, FleetDouble, Gateway

RERANK = {"query": "q", "documents": ["document number 1"], "model": "small"}


def test_a_model_is_described_by_its_name():
    gateway = Gateway()
    listed = gateway.request("GET", "/v1/models").json()["data"]
    for entry in listed:
        assert gateway.request("GET", f"/v1/models/{entry['id']}").json() == entry
    assert {entry["model_type"] for entry in listed} == {"rerank"}
    unknown = gateway.request("GET", "/v1/models/nope")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")


def test_a_route_may_be_called_as_a_model_on_the_hub_is():
    name = "Qwen/Qwen3-Reranker-0.6B"
    gateway = Gateway(settings={**SETTINGS, "routes": {name: {"weights": {"one": 100}}}})
    answer = gateway.post("/v1/rerank", {**RERANK, "model": name}).json()
    assert (answer["model"], answer["meta"]["route"], answer["meta"]["why"]) == (name, name, "split")
    for written in (name, name.replace("/", "%2F")):
        assert gateway.request("GET", f"/v1/models/{written}").json()["id"] == name
    assert gateway.request("GET", f"/v1/models/{name}/more").status_code == 404
    assert gateway.request("GET", "/v1/models/").json() == gateway.request("GET", "/v1/models").json()


@pytest.mark.parametrize(("keys", "needed"), [("", False), ("shop:shop-0123456789abcdef", True)])
def test_xinferences_client_is_told_whether_a_key_is_needed(monkeypatch, keys, needed):
    monkeypatch.setenv("SERVE_APP_API_KEYS", keys)
    gateway = Gateway()
    assert gateway.request("GET", "/v1/cluster/auth").json() == {"auth": needed}
    assert gateway.request("GET", "/v1/models/small").status_code == (401 if needed else 200)


@pytest.mark.parametrize("path", ["/healthz", "/health"])
def test_probes_need_no_key(monkeypatch, path):
    monkeypatch.setenv("SERVE_APP_API_KEYS", "shop:shop-0123456789abcdef")
    gateway = Gateway()
    assert gateway.request("GET", path).json() == {"status": "ok"}
    assert gateway.request("HEAD", path).status_code == 200


def test_errors_have_the_message_where_each_client_looks():
    body = Gateway().post("/v1/rerank", {**RERANK, "documents": []}).json()
    assert body["message"] == body["detail"] == body["error"]["message"] == "documents is empty"


def test_scores_are_written_as_fractions():
    # OpenSearch reads 1 as an integer, and refuses it.
    assert '"relevance_score":0.1,' in Gateway().post("/v1/rerank", {**RERANK, "return_documents": True}).text
    ends = {**RERANK, "documents": ["document number 10", "document number 0"]}
    answer = Gateway().post("/v1/rerank", ends).text
    assert '"relevance_score":1.0}' in answer
    assert '"relevance_score":0.0}' in answer


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_vllms_zero_for_top_n_is_all_and_its_single_document_a_list(path):
    documents = ["document number 1", "document number 2", "document number 3"]
    answer = Gateway().post(path, {**RERANK, "documents": documents, "top_n": 0}).json()
    assert [result["index"] for result in answer["results"]] == [2, 1, 0]
    answer = Gateway().post(path, {**RERANK, "documents": documents[2]}).json()
    assert [result["relevance_score"] for result in answer["results"]] == [0.3]


def test_v2_answers_with_documents_where_asked():
    def first(**more):
        return Gateway().post("/v2/rerank", {**RERANK, **more}).json()["results"][0]

    assert first(return_documents=True)["document"] == {"text": "document number 1"}
    assert "document" not in first(return_documents=False)
    assert "document" not in first(return_documents=None)
    assert "document" not in first()


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank", "/score", "/v1/score"])
def test_vllms_use_activation_false_gives_logits(path):
    texts = ["document number 3", "document number 9"]
    body = {"model": "small", "query": "q", "queries": "q", "documents": texts}

    def scores(**more):
        answer = Gateway().post(path, {**body, **more}).json()
        given = {
            r["index"]: r.get("relevance_score", r.get("score")) for r in answer.get("results", answer.get("data"))
        }
        return [given[0], given[1]]

    assert scores(use_activation=False) == pytest.approx([math.log(3 / 7), math.log(9)])
    assert scores(use_activation=True) == scores(use_activation=None) == scores() == [0.3, 0.9]


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank", "/score", "/v1/score"])
def test_vllms_instruction_in_chat_template_kwargs_wins(path):
    def instruction(**more):
        fleet = FleetDouble()
        body = {"model": "small", "query": "q", "queries": "q", "documents": ["document number 3"], **more}
        assert Gateway(fleet).post(path, body).status_code == 200
        return fleet.asked[0][1].instruction

    assert instruction(chat_template_kwargs={"instruction": "a"}) == "a"
    assert instruction(chat_template_kwargs={"instruction": "a", "other": 1}, instruction="b") == "a"
    assert instruction(chat_template_kwargs={"other": 1}, instruction="b") == "b"
    assert instruction(chat_template_kwargs=None) is None
    refused = Gateway().post(path, {**RERANK, "queries": "q", "chat_template_kwargs": {"instruction": 1}})
    assert refused.json()["error"]["param"] == "chat_template_kwargs.instruction"


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank", "/score", "/v1/score"])
def test_documents_cannot_be_cut_on_vllms_left_side(path):
    body = {**RERANK, "queries": "q"}
    for side in ("right", None):
        assert Gateway().post(path, {**body, "truncation_side": side}).status_code == 200
    refused = Gateway().post(path, {**body, "truncation_side": "left"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "truncation_side")
    assert "'right'" in refused.json()["message"]


PARTS = {"content": [{"type": "text", "text": "document number 3"}, {"type": "text", "text": "and more"}]}
IMAGE = {"content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}]}


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank", "/score", "/v1/score"])
@pytest.mark.parametrize("documents", [PARTS, [PARTS], ["document number 1", PARTS]])
def test_the_text_in_vllms_content_parts_is_read(path, documents):
    fleet = FleetDouble()
    query = {"content": [{"type": "text", "text": "q"}]}
    body = {"model": "small", "query": query, "queries": query, "documents": documents}
    answer = Gateway(fleet).post(path, {**body, "return_documents": True}).json()
    request = fleet.asked[0][1]
    assert (request.query, request.documents[-1]) == ("q", "document number 3\nand more")
    for best in answer.get("results", [])[:1]:
        assert best["document"]["text"] == request.documents[-1]


def test_content_parts_come_back_with_their_text():
    answer = Gateway().post("/rerank", {**RERANK, "documents": [PARTS, {**PARTS, "text": "document number 9"}]})
    assert [result["document"] for result in answer.json()["results"]] == [
        {**PARTS, "text": "document number 9"},
        {**PARTS, "text": "document number 3\nand more"},
    ]


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank", "/score", "/v1/score"])
@pytest.mark.parametrize("parts", [IMAGE, {"content": [*PARTS["content"], {"type": "text"}]}, {"content": ["a"]}])
def test_images_are_refused(path, parts):
    refused = Gateway().post(path, {**RERANK, "queries": "q", "documents": ["a", parts]})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"].startswith("documents")
    assert "images are not read here" in refused.json()["message"]


@pytest.mark.parametrize("path", ["/v2/rerank", "/score"])
def test_objects_that_hold_no_parts_are_refused_where_texts_are_wanted(path):
    for wrong in ({"text": "a"}, {"content": "a"}, 1):
        refused = Gateway().post(path, {**RERANK, "queries": "q", "documents": ["a", wrong]})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"].startswith("documents")
        assert "valid string" in refused.json()["message"]


def test_an_answer_without_meta_says_in_a_header_what_it_went_without():
    def scores(variant, request):
        raise StageFailure("timeout", "small did not answer")

    degraded = Gateway(FleetDouble(scores)).post("/rerank", {"query": "q", "texts": ["a", "b"]})
    assert (degraded.status_code, degraded.headers["X-Degraded"]) == (200, "small timeout")
    skipped = Gateway().post("/rerank", {"query": "降噪耳机", "texts": RERANK["documents"], "model": "cascade"})
    assert (skipped.status_code, skipped.headers["X-Degraded"]) == (200, "small skipped")
    assert "X-Degraded" not in Gateway().post("/v1/rerank", RERANK).headers
