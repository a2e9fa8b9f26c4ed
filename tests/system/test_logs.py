"""A call's id is on the lines of all deployments that it went through; what it says is on none."""

from tests.logs import files_with, lines_of
from tests.system.conftest import System, wait_for

DEPLOYMENTS = {"gateway_Gateway", "catalogue_Recall", "minilm_Reranker", "qwen-f32_Reranker"}
QUERY, DOCUMENT, KEY = "zxqv-query", "zxqv-document", "zxqv-key"


def test_every_deployment_writes_lines_with_the_id_of_the_answer(system: System) -> None:
    body = {"query": f"desk lamp {QUERY}", "model": "cascade"}
    for given in ({"X-Request-Id": "call-17"}, {}):
        answer = system.client.post("/v1/search", json=body, headers=given)
        request_id = answer.json()["id"]
        assert answer.headers["X-Request-Id"] == request_id == given.get("X-Request-Id", request_id)
        wait_for(lambda i=request_id: set(lines_of(i)) == DEPLOYMENTS, 10, 0.2, f"lines of {request_id}")


def test_an_id_that_no_log_can_carry_is_replaced_in_all_deployments(system: System) -> None:
    body = {"query": "desk lamp", "documents": ["lamp", "desk"], "model": "minilm"}
    sent = "not/an/id" * 20
    made = system.client.post("/v1/rerank", json=body, headers={"X-Request-Id": sent}).json()["id"]
    assert made != sent
    wait_for(lambda: "minilm_Reranker" in lines_of(made), 10, 0.2, "lines of the new id")
    # But for Serve's line of the HTTP request, which is its own.
    kept = lines_of(sent)
    assert [line["filename"] for lines in kept.values() for line in lines] == ["replica.py"] * (
        "gateway_Gateway" in kept
    )


def test_what_goes_wrong_is_told_with_the_id_and_without_what_was_said(system: System) -> None:
    headers = {"X-Request-Id": "call-18", "Authorization": f"Bearer {KEY}"}
    documents = [f"{DOCUMENT} {i} " * 100 for i in range(200)]
    late = {"query": QUERY, "documents": documents, "model": "qwen-f32", "timeout_ms": 300, "user": "zxqv-user"}
    for body in (
        late,
        {"query": "lamp", "documents": [DOCUMENT], "model": "nowhere"},
        {"query": QUERY * 5000, "documents": [DOCUMENT]},
        {"query": QUERY, "documents": [{"no-text": DOCUMENT}]},
        # Longer than a prompt may be.
        {"query": f"{QUERY} " * 800, "documents": [DOCUMENT], "model": "qwen-f32"},
    ):
        system.client.post("/v1/rerank", json=body, headers=headers)
    system.client.post("/v1/rerank", content=f'{{"query": "{QUERY}"', headers=headers)

    def told() -> bool:
        lines = lines_of("call-18")
        return any("degraded: timeout" in line["message"] for line in lines.get("gateway_Gateway", ()))

    wait_for(told, 10, 0.2, "the line of the degraded call")
    assert not files_with("zxqv-")
