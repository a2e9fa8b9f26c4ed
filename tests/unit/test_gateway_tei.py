"""The body of text-embeddings-inference at /rerank, over a fleet double."""

import math
from dataclasses import replace

import pytest

from serve_app import __version__
from tests.unit.gateway_double import SETTINGS, FleetDouble, Gateway

TEXTS = ["document number 3", "document number 9", "document number 5"]


def tei(gateway, **more):
    return gateway.post("/rerank", {"query": "q", "texts": TEXTS, "model": "small", **more})


def test_texts_get_teis_list_the_best_first():
    answer = tei(Gateway()).json()
    assert answer == [{"index": 1, "score": 0.9}, {"index": 2, "score": 0.5}, {"index": 0, "score": 0.3}]


def test_return_text_puts_the_texts_in():
    answer = tei(Gateway(), return_text=True).json()
    assert [rank["text"] for rank in answer] == [TEXTS[1], TEXTS[2], TEXTS[0]]


def test_top_n_cuts_the_list():
    assert [rank["index"] for rank in tei(Gateway(), top_n=2).json()] == [1, 2]
    assert len(tei(Gateway(), top_n=0).json()) == len(tei(Gateway(), top_n=None).json()) == 3


def test_raw_scores_are_logits_within_what_float64_can_say():
    answer = tei(Gateway(), raw_scores=True).json()
    assert [rank["score"] for rank in answer] == pytest.approx([math.log(9), 0, math.log(3 / 7)])
    ends = Gateway(FleetDouble(lambda variant, request: [0.0, 1.0, -0.5]))
    assert [rank["score"] for rank in tei(ends, raw_scores=True).json()] == pytest.approx(
        [36.74, -36.74, -36.74], 1e-3
    )


def test_info_describes_the_default_route_to_who_has_a_key(monkeypatch):
    monkeypatch.setenv("SERVE_APP_API_KEYS", "shop:shop-0123456789abcdef")
    gateway = Gateway()
    assert gateway.request("GET", "/info").status_code == 401
    bearer = {"Authorization": "Bearer shop-0123456789abcdef"}
    assert gateway.request("GET", "/info", headers=bearer).json() == {
        "model_id": "default",
        "model_type": {"reranker": {}},
        "max_concurrent_requests": 256,
        "max_client_batch_size": 20,
        "version": __version__,
    }


class Cutting(FleetDouble):
    async def score(self, *args, **kwargs):
        return [replace(result, truncated=2) for result in await super().score(*args, **kwargs)]


def test_truncate_false_refuses_texts_that_would_be_cut():
    gateway = Gateway(Cutting())
    assert tei(gateway).status_code == 200
    refused = tei(gateway, truncate=False)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "prompt_too_long")
    assert "2 of texts" in refused.json()["message"]
    assert tei(Gateway(), truncate=False).status_code == 200
    # As with TEI, whose field may be null.
    assert tei(gateway, truncate=None).status_code == 200


def test_truncate_false_names_the_cap_of_the_stage_that_cut():
    stages = [{"variant": "large", "keep": 3}, {"variant": "small", "max_tokens_per_doc": 256}]
    settings = {
        **SETTINGS,
        "pipelines": {"capped": {"recall_k": 10, "stages": stages}},
        "routes": {"default": {"weights": {"capped": 1}}},
    }
    refused = tei(Gateway(Cutting(), settings), truncate=False, model="capped").json()
    assert refused["message"] == (
        "2 of texts have more than 256 tokens (pipelines.capped.stages[1].max_tokens_per_doc), or more than the "
        "model reads; truncate: true cuts them"
    )


def test_texts_cannot_be_cut_on_the_left():
    assert tei(Gateway(), truncation_direction="Right").status_code == 200
    refused = tei(Gateway(), truncation_direction="Left")
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "truncation_direction"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"query": "q", "texts": []}, "texts"),
        ({"query": "q", "texts": ["a"] * 21}, "texts"),
        ({"query": "q", "texts": ["a", 1]}, "texts[1]"),
        ({"query": "q", "documents": ["a", 1]}, "documents[1]"),
        ({"query": "q"}, "documents"),
    ],
)
def test_errors_name_the_fields_of_the_dialect(body, param):
    refused = Gateway().post("/rerank", body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == param
