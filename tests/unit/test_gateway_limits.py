"""Every limit's error names it, and a call that is refused costs its key nothing."""

import pytest

from serve_app.access import API_KEYS
from serve_app.config import Limits
from serve_app.gateway.keys import Keys
from tests.unit.gateway_double import DOCUMENTS, SETTINGS, Gateway

KEY = "0123456789abcdef"
LIMITS = {
    "max_body_bytes": 3000,
    "max_documents": 3,
    "max_query_chars": 20,
    "max_document_chars": 30,
    "max_recall_k": 12,
    "max_timeout_ms": 2000,
}
LONG, MANY = "x" * 31, ["a", "b", "c", "d"]
# By name, calls that are just over it.
OVER = {
    "max_body_bytes": [("/v1/rerank", {"query": "q", "documents": ["x" * 3000]})],
    "max_documents": [
        ("/v1/rerank", {"query": "q", "documents": MANY}),
        ("/v2/rerank", {"query": "q", "documents": MANY}),
        ("/rerank", {"query": "q", "documents": MANY}),
        ("/rerank", {"query": "q", "texts": MANY}),
        ("/v1/score", {"text_1": "q", "text_2": MANY}),
        ("/v1/score", {"text_1": MANY, "text_2": MANY}),
    ],
    "max_query_chars": [
        ("/v1/search", {"query": LONG[:21]}),
        ("/v1/rerank", {"query": LONG[:21], "documents": ["a"]}),
        ("/v2/rerank", {"query": LONG[:21], "documents": ["a"]}),
        ("/rerank", {"query": LONG[:21], "texts": ["a"]}),
        ("/v1/score", {"text_1": ["q", LONG[:21]], "text_2": ["a", "b"]}),
    ],
    "max_document_chars": [
        ("/v1/rerank", {"query": "q", "documents": ["a", {"text": LONG}]}),
        ("/v2/rerank", {"query": "q", "documents": ["a", LONG]}),
        ("/rerank", {"query": "q", "texts": ["a", LONG]}),
        ("/v1/score", {"text_1": "q", "text_2": ["a", LONG]}),
    ],
    "max_recall_k": [("/v1/search", {"query": "q", "recall_k": 13}), ("/v1/search", {"query": "q", "top_n": 13})],
    "max_timeout_ms": [
        ("/v1/search", {"query": "q", "timeout_ms": 2001}),
        ("/v1/rerank", {"query": "q", "documents": ["a"], "timeout_ms": 2001}),
    ],
}
CALLS = [(name, *call) for name, calls in OVER.items() for call in calls]
# Calls that are refused for something else.
REFUSED = [
    ("/v1/search", {"query": " "}, 400),
    ("/v1/search", {"query": "q", "model": "nope"}, 404),
    ("/v1/rerank", {"query": " ", "documents": ["a"]}, 400),
    ("/v1/rerank", {"query": "q", "documents": [" "]}, 400),
    ("/v1/rerank", {"query": "q", "documents": [{"title": "a"}]}, 400),
    ("/v2/rerank", {"query": "q", "documents": []}, 400),
    ("/rerank", {"query": "q", "texts": [" "]}, 400),
    ("/v1/score", {"text_1": "q", "text_2": ["a", " "]}, 400),
    ("/v1/score", {"text_1": " ", "text_2": "a"}, 400),
    ("/v1/score", {"text_1": "q", "text_2": "a", "model": "bm25"}, 400),
    ("/v1/score", {"text_1": "猫", "text_2": "a"}, 400),
]
SETTINGS_HERE = {**SETTINGS, "limits": LIMITS, "routes": {"default": {"weights": {"one": 1}, "timeout_ms": 2000}}}


@pytest.fixture
def gateway() -> Gateway:
    made = Gateway(settings=SETTINGS_HERE)
    made.service.keys = Keys({API_KEYS: f"shop:{KEY}"})
    return made


@pytest.fixture
def spent(monkeypatch) -> list[int]:
    """What calls cost their keys."""
    costs: list[int] = []
    monkeypatch.setattr(Keys, "spend", lambda keys, key, pairs, gateways: costs.append(pairs))
    return costs


def post(gateway, path, body):
    return gateway.post(path, body, {"Authorization": f"Bearer {KEY}"})


@pytest.mark.parametrize(("name", "path", "body"), CALLS)
def test_a_call_over_a_limit_is_told_its_name_and_value_and_costs_nothing(gateway, spent, name, path, body):
    refused = post(gateway, path, body)
    assert refused.status_code == (413 if name == "max_body_bytes" else 400)
    assert f"limits.{name}" in refused.json()["message"]
    assert str(LIMITS[name]) in refused.json()["message"]
    assert gateway.fleet.asked == []
    # Whatever it asks for, the key's owner doesn't wait for it.
    assert spent == []


@pytest.mark.parametrize(("path", "body", "status"), REFUSED)
def test_a_call_that_is_refused_costs_nothing(gateway, spent, path, body, status):
    assert post(gateway, path, body).status_code == status
    assert spent == []


def test_a_search_without_a_catalogue_costs_nothing(gateway, spent):
    gateway.service.configure({name: value for name, value in SETTINGS_HERE.items() if name != "recall"})
    assert post(gateway, "/v1/search", {"query": "q"}).json()["error"]["code"] == "not_found"
    assert spent == []


def test_every_limit_of_a_call_is_tried():
    assert set(OVER) == set(Limits.model_fields) - {"max_concurrent_calls"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/rerank", {"query": "q", "documents": DOCUMENTS[:3]}),
        ("/v2/rerank", {"query": "q", "documents": DOCUMENTS[:3]}),
        ("/rerank", {"query": "q", "texts": DOCUMENTS[:3]}),
        ("/v1/score", {"text_1": "q", "text_2": DOCUMENTS[:3]}),
    ],
)
def test_a_list_costs_its_documents(gateway, spent, path, body):
    assert post(gateway, path, body).status_code == 200
    assert spent == [3]


def test_a_search_costs_the_pairs_that_it_has_scored(gateway, spent):
    for body in (
        {},
        {"recall_k": 5, "top_n": 2},
        {"recall_k": 5},
        {"recall_k": 5, "top_n": 12},
        {"rerank": False},
    ):
        assert post(gateway, "/v1/search", {"query": "cats", **body}).status_code == 200
    assert spent == [10, 5, 10, 12, 1]
