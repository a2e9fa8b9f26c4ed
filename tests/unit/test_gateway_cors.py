"""Pages of other origins: none may call, unless the config names them."""

import pytest
from pydantic import ValidationError

from serve_app.config import GatewayArgs
from serve_app.gateway.cors import allow_origins
from tests.unit.gateway_double import Gateway

SHOP, OTHER = "https://shop.example", "https://other.example"
ASKS = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-timeout-ms",
}


def test_no_origin_is_let_in_by_default():
    gateway = Gateway()
    preflight = gateway.request("OPTIONS", "/v1/search", headers={"Origin": SHOP, **ASKS})
    assert preflight.status_code == 405
    answer = gateway.post("/v1/search", {"query": "cats"}, {"Origin": SHOP})
    for response in (preflight, answer):
        assert not [name for name in response.headers if name.startswith("access-control-")]


def test_origins_that_are_named_may_call_and_read_the_answer():
    gateway = Gateway()
    allow_origins(gateway.app, GatewayArgs(cors_origins=(SHOP,)).cors_origins)
    preflight = gateway.request("OPTIONS", "/v1/search", headers={"Origin": SHOP, **ASKS})
    assert preflight.status_code == 200
    assert preflight.headers["Access-Control-Allow-Origin"] == SHOP
    for name in ("authorization", "content-type", "x-timeout-ms"):
        assert name in preflight.headers["Access-Control-Allow-Headers"].lower()
    assert "Access-Control-Allow-Credentials" not in preflight.headers
    # Errors too: a page has to be able to read what it did wrong.
    for body, status in (({"query": "cats"}, 200), ({}, 400)):
        answer = gateway.post("/v1/search", body, {"Origin": SHOP})
        assert answer.status_code == status
        assert answer.headers["Access-Control-Allow-Origin"] == SHOP
        exposed = set(answer.headers["Access-Control-Expose-Headers"].split(", "))
        assert exposed == {"X-Request-Id", "Retry-After", "X-Degraded"}
    refused = gateway.request("OPTIONS", "/v1/search", headers={"Origin": OTHER, **ASKS})
    assert refused.status_code == 400
    assert "Access-Control-Allow-Origin" not in refused.headers


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_what_a_page_of_another_origin_sends_unasked_is_not_done(site):
    """As `fetch(url, {mode: "no-cors"})` does: plain text, for which no browser asks first."""
    gateway = Gateway()
    headers = {"Content-Type": "text/plain", "Sec-Fetch-Site": site}
    for path, body in (
        ("/v1/rerank", {"query": "cats", "documents": ["a"], "model": "small"}),
        ("/v1/search", {"query": "cats"}),
        ("/v1/events", {"events": [{"action_name": "click", "query_id": "q"}]}),
    ):
        answer = gateway.post(path, body, {**headers, "Origin": OTHER})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
        assert OTHER in answer.json()["message"]
    assert not gateway.fleet.asked
    named = Gateway()
    allow_origins(named.app, (SHOP,))
    assert named.post("/v1/search", {"query": "cats"}, {**headers, "Origin": SHOP}).status_code == 200
    everybody = Gateway()
    allow_origins(everybody.app, GatewayArgs(cors_origins=("*",)).cors_origins)
    assert everybody.post("/v1/search", {"query": "cats"}, {**headers, "Origin": OTHER}).status_code == 200
    # By leave that a proxy has given.
    with_key = {**headers, "Origin": OTHER, "Authorization": "Bearer key"}
    assert named.post("/v1/search", {"query": "cats"}, with_key).status_code == 200
    own = {"Origin": "https://search.example", "Sec-Fetch-Site": "same-origin"}
    assert gateway.post("/v1/search", {"query": "cats"}, own).status_code == 200


@pytest.mark.parametrize(
    "origin", ["shop.example", "https://shop.example/", "https://*.example", "ftp://shop", ""]
)
def test_what_no_browser_sends_as_origin_is_refused(origin):
    with pytest.raises(ValidationError, match="cors_origins"):
        GatewayArgs(cors_origins=(origin,))
