"""Every limit's error names it, and a call that is over one costs its key nothing."""

import pytest

from serve_app.access import API_KEYS
from serve_app.config import Limits
from serve_app.gateway.keys import Key, Keys, hashed
from tests.unit.gateway_double import SETTINGS, Gateway

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


@pytest.fixture
def gateway() -> Gateway:
    made = Gateway(
        settings={**SETTINGS, "limits": LIMITS, "routes": {"default": {"weights": {"one": 1}, "timeout_ms": 2000}}}
    )
    made.service.keys = Keys({API_KEYS: f"shop:{KEY}"})
    made.service.keys._put((Key("shop", hashed(KEY), pairs_per_s=20),))
    return made


@pytest.mark.parametrize(("name", "path", "body"), CALLS)
def test_a_call_over_a_limit_is_told_its_name_and_value_and_costs_nothing(gateway, name, path, body):
    key = {"Authorization": f"Bearer {KEY}"}
    # Whatever a call asks for that is refused, the key's owner doesn't wait for it.
    for _ in range(15 if name in ("max_documents", "max_recall_k") else 1):
        refused = gateway.post(path, body, key)
        assert refused.status_code == (413 if name == "max_body_bytes" else 400)
        assert f"limits.{name}" in refused.json()["message"]
        assert str(LIMITS[name]) in refused.json()["message"]
    assert gateway.fleet.asked == []


def test_every_limit_of_a_call_is_tried():
    assert set(OVER) == set(Limits.model_fields) - {"max_concurrent_calls"}


def test_a_search_costs_the_pairs_that_it_has_scored(gateway, monkeypatch):
    spent = []
    monkeypatch.setattr(Keys, "spend", lambda keys, key, pairs, gateways: spent.append(pairs))
    for body in (
        {},
        {"recall_k": 5, "top_n": 2},
        {"recall_k": 5},
        {"recall_k": 5, "top_n": 12},
        {"rerank": False},
    ):
        answer = gateway.post("/v1/search", {"query": "cats", **body}, {"Authorization": f"Bearer {KEY}"})
        assert answer.status_code == 200
    assert spent == [10, 5, 10, 12, 1]
