"""The score cache of the running fleet: what it saves, and that it never serves an old revision."""

import copy
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis import Redis

from tests.models import SENTENCES
from tests.processes.redis_server import RedisServer, needs_redis
from tests.system.conftest import System, wait_for

# From the moment a new replica answers to that of the last old score (docs/caching.md).
MOST_STALE_S = 3.0


@pytest.fixture
def client(system: System) -> Iterator[httpx.Client]:
    """The system's own asks for no cached score."""
    with httpx.Client(base_url=system.url, timeout=60) as client:
        yield client


@pytest.fixture
def restored(system: System) -> Iterator[System]:
    """The system, brought back to its config afterwards."""
    original = system.config
    yield system
    if system.config is not original:
        system.deploy(original)
        system.wait_running()


def user_config(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = config["applications"][0]["deployments"][0]["user_config"]
    return found


def rerank(client: httpx.Client, documents: list[str], model: str = "minilm", **more: Any) -> dict[str, Any]:
    body = {
        "model": model,
        "query": "what keeps drinks hot?",
        "documents": documents,
        "timeout_ms": 30_000,
        **more,
    }
    answer = client.post("/v1/rerank", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    assert "degraded" not in found["meta"], found["meta"]["degraded"]
    return found


def stage(answer: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = answer["meta"]["stages"][-1]
    return found


def scores(answer: dict[str, Any]) -> list[float]:
    """By document."""
    found = {result["index"]: result["relevance_score"] for result in answer["results"]}
    return [found[i] for i in range(len(found))]


def test_a_repeated_call_is_answered_without_a_model(client: httpx.Client) -> None:
    documents = [f"{i}: {SENTENCES[i % len(SENTENCES)]}" for i in range(100)]
    first = rerank(client, documents)
    assert (stage(first)["cache_hits"], stage(first)["tokens"] > 0) == (0, True)
    again = rerank(client, documents)
    assert (stage(again)["pairs"], stage(again)["cache_hits"], stage(again)["tokens"]) == (100, 100, 0)
    assert scores(again) == scores(first)
    fresh = client.post(
        "/v1/rerank",
        json={"model": "minilm", "query": "what keeps drinks hot?", "documents": documents[:3]},
        headers={"Cache-Control": "no-cache"},
    ).json()
    assert stage(fresh)["cache_hits"] == 0


def test_of_a_half_overlapping_list_the_new_half_is_computed(client: httpx.Client) -> None:
    documents = [f"half {i}: {SENTENCES[i % len(SENTENCES)]}" for i in range(150)]
    whole = rerank(client, documents[:100])
    half = rerank(client, documents[50:])
    assert (stage(half)["pairs"], stage(half)["cache_hits"]) == (100, 50)
    assert 0.3 < stage(half)["tokens"] / stage(whole)["tokens"] < 0.7
    assert scores(half)[:50] == scores(whole)[50:]


def test_search_and_score_use_what_the_other_computed(client: httpx.Client) -> None:
    body = {"query": "a bottle for the office", "recall_k": 30, "top_n": 30, "timeout_ms": 30_000}
    first = client.post("/v1/search", json=body).json()
    again = client.post("/v1/search", json={**body, "recall_k": 40, "top_n": 40}).json()
    assert (stage(first)["cache_hits"], stage(first)["pairs"]) == (0, 30)
    assert 30 == stage(again)["cache_hits"] < stage(again)["pairs"]
    texts = [f"{result['title']}\n{result['text']}" for result in first["results"]]
    scored = client.post("/v1/score", json={"model": "minilm", "text_1": body["query"], "text_2": texts}).json()
    assert stage(scored)["cache_hits"] == 30
    assert [entry["score"] for entry in scored["data"]] == [result["rerank_score"] for result in first["results"]]


def test_a_search_again_asks_neither_recall_nor_a_model(client: httpx.Client) -> None:
    body = {"query": "a desk lamp for reading at night", "recall_k": 30, "top_n": 10, "timeout_ms": 30_000}
    first = client.post("/v1/search", json=body).json()
    again = client.post("/v1/search", json=body).json()
    assert again["results"] == first["results"]
    recalled, scored = again["meta"]["stages"]
    assert (recalled["cached"], scored["cache_hits"], scored["tokens"]) == (True, scored["pairs"], 0)


def test_a_search_finds_what_a_new_index_has(restored: System, client: httpx.Client, tmp_path: Path) -> None:
    from ray import serve

    from serve_app.recall.builder import build_index

    catalogue = tmp_path / "catalogue.jsonl"
    catalogue.write_text('{"id": "new-1", "title": "Quokka", "text": "A quokka made of plush."}\n')
    build_index(catalogue, tmp_path / "index")
    config = copy.deepcopy(restored.config)
    (recall,) = (app for app in config["applications"] if app["name"] == "catalogue")
    recall["args"]["index"] = str(tmp_path / "index")
    body = {"query": "a quokka made of plush", "recall_k": 30, "top_n": 30, "timeout_ms": 30_000}

    def found() -> list[str]:
        answer = client.post("/v1/search", json=body)
        assert answer.status_code == 200, answer.text
        return [result["id"] for result in answer.json()["results"]]

    def documents() -> int:
        """Asked past the gateway, which would hear of the new index by that."""
        handle = serve.get_deployment_handle("Recall", app_name="catalogue")
        return int(handle.stats.remote().result(timeout_s=10)["documents"])

    old, before = found(), documents()
    assert "new-1" not in old
    restored.deploy(config)
    began, new_at = time.monotonic(), None
    while (seen := found()) != ["new-1"]:
        # All of it is known, until the gateway hears of the new index.
        assert seen == old
        now = time.monotonic()
        assert now < began + 120
        if new_at is None:
            # Recall is there all the while: the new replica starts beside the old one (max_surge_percent).
            asked = documents()
            assert asked in (before, 1)
            if asked == 1:
                new_at = now
        assert new_at is None or now <= new_at + MOST_STALE_S
        time.sleep(0.02)
    restored.wait_running()


def test_scores_of_a_revision_that_was_replaced_are_never_served(restored: System, client: httpx.Client) -> None:
    from ray import serve

    def config(revision: str) -> dict[str, Any]:
        made = copy.deepcopy(restored.config)
        made["applications"] = [a for a in made["applications"] if a["name"] != "changing"]
        args = {"takes_ms": 5, "revision": revision}
        path = "tests.rollout.scorers:build"
        made["applications"].append({"name": "changing", "import_path": path, "route_prefix": None, "args": args})
        user_config(made)["variants"]["changing"] = {"pairs_per_call": 16}
        return made

    def fingerprint() -> str:
        handle = serve.get_deployment_handle("Reranker", app_name="changing")
        try:
            return str(handle.info.remote().result(timeout_s=0.5)["fingerprint"])
        except Exception:
            return ""

    restored.deploy(config("old"))
    restored.wait_running()
    documents = [f"{sentence} {i}" for i, sentence in enumerate(SENTENCES * 2)]
    old = scores(rerank(client, documents, "changing"))
    assert stage(rerank(client, documents, "changing"))["cache_hits"] == len(documents)

    restored.deploy(config("new"))
    seen: list[tuple[float, list[float]]] = []
    new_at: float | None = None
    while new_at is None or time.monotonic() < new_at + 8:
        now = time.monotonic()
        assert not seen or now < seen[0][0] + 240
        # All of it is in the cache, until the gateway hears of the new revision.
        seen.append((now, scores(rerank(client, documents, "changing"))))
        if new_at is None and fingerprint() == "new":
            new_at = time.monotonic()
        time.sleep(0.02)
    new = scores(rerank(client, documents, "changing"))
    assert max(abs(a - b) for a, b in zip(old, new, strict=True)) > 0.01
    assert all(found in (old, new) for _, found in seen), "an answer mixed revisions"
    last_old = max(at for at, found in seen if found == old)
    print(
        f"\n{len(seen)} calls while the variant was replaced; the last old answer began "
        f"{last_old - new_at:+.1f} s from the new replica's first"
    )
    assert last_old <= new_at + MOST_STALE_S
    assert all(found == new for at, found in seen if at > last_old)
    restored.wait_running()


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    needs_redis()
    server = RedisServer(tmp_path)
    yield server
    server.kill()


def test_scores_outlive_the_gateway_in_redis_which_is_not_missed_when_it_stops(
    restored: System, client: httpx.Client, redis_server: RedisServer
) -> None:
    config = copy.deepcopy(restored.config)
    user_config(config)["cache"] = {"redis": f"redis://127.0.0.1:{redis_server.port}/0"}
    restored.deploy(config)
    documents = [f"redis {i}: {SENTENCES[i % len(SENTENCES)]}" for i in range(60)]
    server = Redis(port=redis_server.port)
    number = iter(range(10_000))
    wait_for(
        lambda: rerank(client, [f"is it there? {next(number)}"]) and server.dbsize() > 0,
        60,
        what="the new settings",
    )
    before = scores(rerank(client, documents))
    wait_for(lambda: server.dbsize() >= len(documents), 10, what="the writes")

    ((actor, pid),) = restored.replica_pids("gateway", "Gateway").items()
    os.kill(pid, signal.SIGKILL)

    def another_gateway() -> bool:
        if actor in restored.replica_pids("gateway", "Gateway"):
            return False
        try:
            return client.get("/readyz").status_code == 200
        except httpx.HTTPError:
            return False

    wait_for(another_gateway, 60, what="another gateway")
    # It asks the variants what they are within two seconds.
    wait_for(lambda: stage(rerank(client, documents))["cache_hits"] == len(documents), 10, what="hits from Redis")
    assert scores(rerank(client, documents)) == before

    os.kill(redis_server.process.pid, signal.SIGSTOP)
    for i in range(10):
        assert stage(rerank(client, [*documents, f"new {i}"]))["cache_hits"] == len(documents)
