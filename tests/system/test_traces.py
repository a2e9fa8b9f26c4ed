"""A caller's trace goes on in the gateway, recall and rerankers."""

from tests.otlp import Receiver, Span
from tests.system.conftest import System, wait_for

SERVER, CLIENT = 2, 3


def test_a_search_is_one_trace_through_all_deployments(system: System, receiver: Receiver) -> None:
    trace, caller = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    headers = {"traceparent": f"00-{trace}-{caller}-01"}
    answer = system.client.post("/v1/search", json={"query": "desk lamp", "model": "cascade"}, headers=headers)
    assert answer.status_code == 200
    spans = wait_for(lambda: len(found := receiver.of(trace)) == 8 and found, 20, 0.2, "eight spans")

    def below(parent: str, kind: int) -> list[Span]:
        found = [span for span in spans if span.parent == parent]
        assert {span.kind for span in found} <= {kind}
        return sorted(found, key=lambda span: span.began_ns)

    (call,) = below(caller, SERVER)
    assert (call.service, call.name) == ("gateway", "POST /v1/search")
    assert call.attributes["serve_app.request_id"] == answer.json()["id"]
    stages = below(call.id, CLIENT)
    assert [span.name for span in stages] == ["recall catalogue", "rerank minilm", "rerank qwen-f32"]
    (search,), (first,), chunks = (below(stage.id, SERVER) for stage in stages)
    assert (search.service, search.name) == ("catalogue", "Recall.search")
    assert (first.service, first.name) == ("minilm", "Reranker.score")
    assert first.attributes["serve_app.documents"] == 50
    # 20 in calls of 16 at most.
    assert {c.service for c in chunks} == {"qwen-f32"}
    assert len(chunks) == 2
    assert sum(c.attributes["serve_app.documents"] for c in chunks) == 20
    for stage in stages:
        assert call.began_ns <= stage.began_ns <= stage.ended_ns <= call.ended_ns
    assert not any(span.failed for span in spans)


def test_a_stage_that_fails_says_so_in_its_span(system: System, receiver: Receiver) -> None:
    trace = "1af7651916cd43dd8448eb211c80319c"
    documents = [f"number {i} " * 100 for i in range(200)]
    body = {"query": "lamp", "model": "qwen-f32", "documents": documents, "timeout_ms": 300}
    headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
    assert system.client.post("/v1/rerank", json=body, headers=headers).json()["meta"]["degraded"]

    def both() -> tuple[Span, Span] | None:
        found = {span.name: span for span in receiver.of(trace)}
        return ("POST /v1/rerank" in found and "rerank qwen-f32" in found) and (
            found["POST /v1/rerank"],
            found["rerank qwen-f32"],
        )

    call, stage = wait_for(both, 20, 0.2, "both spans")
    assert (stage.failed, stage.status) == (True, "timeout")
    assert call.attributes["serve_app.stage.qwen-f32.degraded"] == "timeout"
    assert not call.failed
