"""docs/clients.md as it stands: its snippets run in the real clients, and what search engines send is sent."""

import contextlib
import copy
import json
import os
import re
import secrets
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from serve_app.access import API_KEYS_FILE
from serve_app.gateway.keys import hashed
from serve_app.reranker.messages import ScoreRequest
from tests.system.conftest import ROOT, System, wait_for

DOC = (ROOT / "docs" / "clients.md").read_text("utf-8")
VENV = ROOT / ".venv-clients"
URL, KEY = "http://127.0.0.1:8000", "YOUR_KEY"

PRELUDE, *_ = re.findall(r"^```python\n(.*?)^```", DOC, re.S | re.M)
SNIPPETS: dict[str, str] = dict(re.findall(r"^## ([^\n]+)\n\n```python\n(.*?)^```", DOC, re.S | re.M))
# litellm speaks a dialect for each prefix; the page names these.
SNIPPETS |= {
    f"litellm, {provider}": SNIPPETS["litellm"].replace("cohere/", f"{provider}/")
    for provider in re.findall(r"`(\w+)/`", DOC)
}
SDKS = {"cohere": "cohere", "cohere v2": "cohere v2"}
ERRORS = {row[0]: row[1:] for row in re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", DOC, re.M)}

# In pairs a second. Two seconds of it may be used at once, so the first call leaves it used up for 0.7 s.
SLOW_RATE, MANY_PAIRS = 20, 55
# haystack's Cohere ranker sends 1,000 at most by itself.
MOST_DOCUMENTS = 100


@dataclass
class Keyed:
    """The running system with keys: one that may do anything, and one with a rate for every snippet."""

    system: System
    key: str
    slow: dict[str, str]


@pytest.fixture(scope="module")
def keyed(system: System, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    key = secrets.token_urlsafe(32)
    slow = {name: secrets.token_urlsafe(32) for name in [*SNIPPETS, *(f"newest {name}" for name in SDKS)]}
    lines = [f"all: sha256:{hashed(key)}"] + [
        f"slow-{i}: {{sha256: {hashed(slow_key)}, pairs_per_s: {SLOW_RATE}}}"
        for i, slow_key in enumerate(slow.values())
    ]
    keys_file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    keys_file.write_text("\n".join(lines))
    original = system.config
    config = copy.deepcopy(original)
    gateway = config["applications"][0]["deployments"][0]
    gateway["user_config"]["limits"]["max_documents"] = MOST_DOCUMENTS
    gateway["ray_actor_options"] = {"runtime_env": {"env_vars": {API_KEYS_FILE: str(keys_file)}}}
    system.client.headers["Authorization"] = f"Bearer {key}"
    try:
        put_in_force(system, config, keys=True)
        yield Keyed(system, key, slow)
    finally:
        put_in_force(system, original, keys=False)
        del system.client.headers["Authorization"]


def put_in_force(system: System, config: dict[str, Any], keys: bool) -> None:
    """Deploys a config that changes nothing but the gateway, and waits for one that needs keys, or needs none."""
    system.deploy(config)

    def replaced() -> bool:
        with contextlib.suppress(httpx.HTTPError, ValueError):
            return system.client.get("/v1/cluster/auth").json() == {"auth": keys}
        return False

    wait_for(replaced, 60, what=f"a gateway with keys={keys}")
    system.wait_running()


def run(jobs: list[dict[str, Any]], newest_sdk: bool = False) -> list[dict[str, Any]]:
    made = subprocess.run(
        [VENV / "bin" / "python", ROOT / "tests" / "system" / "client_runner.py"],
        input=json.dumps(jobs),
        env={**os.environ, **({"PYTHONPATH": str(VENV / "newest")} if newest_sdk else {})},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert made.returncode == 0, made.stderr[-4000:]
    results: list[dict[str, Any]] = json.loads(made.stdout)
    return results


@pytest.fixture(scope="module")
def outcomes(keyed: Keyed) -> dict[str, dict[str, dict[str, Any]]]:
    """What came of every snippet: as it is, with a wrong key, with too many documents, and over its rate."""
    assert (VENV / ".made").exists(), "the clients aren't installed: make setup-clients"
    many = [f"document {i}" for i in range(MANY_PAIRS)]
    too_many = [f"document {i}" for i in range(MOST_DOCUMENTS + 1)]
    # From the cache they take no time in which a rate could recover.
    bearer = {"Authorization": f"Bearer {keyed.key}"}
    warm = {"query": asked()["query"], "documents": many, "model": "minilm", "timeout_ms": 20_000}
    assert httpx.post(f"{keyed.system.url}/v1/rerank", json=warm, headers=bearer, timeout=60).status_code == 200
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for prefix, newest_sdk, names in (("", False, list(SNIPPETS)), ("newest ", True, list(SDKS))):
        cases = []
        for name in names:
            for case, given in (
                ("as it is", {"key": keyed.key}),
                ("wrong key", {"key": "wrong-key-wrong-key"}),
                ("too many", {"key": keyed.key, "documents": too_many}),
                ("first", {"key": keyed.slow[prefix + name], "documents": many}),
                ("overloaded", {"key": keyed.slow[prefix + name], "documents": many}),
            ):
                job = {"code": [PRELUDE, SNIPPETS[name]], "given": {"url": keyed.system.url, **given}}
                cases.append((prefix + name, case, job))
        for (name, case, _), outcome in zip(cases, run([job for *_, job in cases], newest_sdk), strict=True):
            found.setdefault(name, {})[case] = outcome
    return found


NAMES = [*SNIPPETS, *(f"newest {name}" for name in SDKS)]


def asked() -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(PRELUDE, names)
    return {"query": names["query"], "documents": names["documents"]}


def lines(outcome: dict[str, Any]) -> list[tuple[float, str]]:
    assert outcome["error"] is None, outcome
    split = (line.split(" ", 1) for line in outcome["printed"].splitlines())
    return [(float(score), text) for score, text in split]


def expected_error(name: str, column: int) -> str:
    row = ERRORS.get(name.removeprefix("newest ")) or ERRORS["litellm"]
    return row[column].strip("`")


@pytest.mark.parametrize("name", NAMES)
def test_a_snippet_ranks_as_the_gateway_does(keyed, outcomes, name):
    answer = keyed.system.client.post(
        "/v1/rerank", json={"model": "minilm", **asked(), "return_documents": True}
    ).json()
    ranked = [(result["relevance_score"], result["document"]["text"]) for result in answer["results"]]
    printed = lines(outcomes[name]["as it is"])
    assert [text for _, text in printed] == [text for _, text in ranked]
    assert [score for score, _ in printed] == pytest.approx([score for score, _ in ranked], abs=1e-3)
    assert printed[0][1] == "Paris is the capital of France."


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_key_is_the_clients_own_error(outcomes, name):
    outcome = outcomes[name]["wrong key"]
    assert outcome["error"] == expected_error(name, 0), outcome


@pytest.mark.parametrize("name", NAMES)
def test_too_many_documents_is_an_error_that_names_the_limit(outcomes, name):
    outcome = outcomes[name]["too many"]
    assert outcome["error"] == expected_error(name, 1), outcome
    # Clients that show no message: this one never looks at it, and httpx shows the status.
    if name not in ("llama-index, TEI", "TEI over HTTP", "vLLM's score API"):
        assert f"limits.max_documents is {MOST_DOCUMENTS}" in outcome["message"]


@pytest.mark.parametrize("name", NAMES)
def test_a_used_up_rate_is_waited_for_where_the_page_says_so(outcomes, name):
    assert lines(outcomes[name]["first"])
    outcome = outcomes[name]["overloaded"]
    if (expected := expected_error(name, 2)) == "tries again":
        assert lines(outcome)
        assert 0.5 < outcome["took_s"] < 10
    else:
        assert outcome["error"] == expected, outcome


# ---- what the snippet for TEI has no room for


def test_teis_raw_scores_are_the_models_logits(keyed, score):
    texts = asked()["documents"]
    body = {"query": asked()["query"], "texts": texts, "model": "qwen-f32", "timeout_ms": 30_000}
    ranks = keyed.system.client.post("/rerank", json={**body, "raw_scores": True}).json()
    logits = score("qwen-f32", ScoreRequest(body["query"], texts)).logits
    assert {rank["index"]: rank["score"] for rank in ranks} == pytest.approx(dict(enumerate(logits)), abs=1e-4)
    assert all("text" not in rank for rank in ranks)


def test_tei_cuts_a_long_text_unless_told_not_to(keyed):
    long = {"query": "q", "texts": ["short", "word " * 3000], "model": "qwen-f32", "timeout_ms": 30_000}
    assert len(keyed.system.client.post("/rerank", json=long).json()) == 2
    for _ in range(2):
        refused = keyed.system.client.post("/rerank", json={**long, "truncate": False})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "prompt_too_long")
        assert "1 of texts" in refused.json()["message"]


# ---- search engines

CONNECTORS = {
    what.split("/")[0].split("?")[0]: json.loads(body)
    for what, body in re.findall(
        r"^```json\n(?:PUT|POST) (_inference|_plugins/_ml/connectors)[^\n]*\n(.*?)^```", DOC, re.S | re.M
    )
}
REQUESTS = re.findall(r"^```http\nPOST (\S+)\n(.*?)\n\n(.*?)^```", DOC, re.S | re.M)
ELASTICSEARCH, OPENSEARCH, MILVUS_VLLM, MILVUS_TEI = REQUESTS


def sent(keyed: Keyed, request: tuple[str, str, str]) -> httpx.Response:
    """The request as the page has it, byte for byte but for the key."""
    path, headers, body = request
    parsed = dict(line.split(": ", 1) for line in headers.replace(KEY, keyed.key).splitlines())
    response = httpx.post(keyed.system.url + path, content=body.strip().encode(), headers=parsed, timeout=60)
    assert response.status_code == 200, response.text
    return response


def by_index(keyed: Keyed) -> list[float]:
    answer = keyed.system.client.post("/v1/rerank", json={"model": "minilm", **asked()}).json()
    return [r["relevance_score"] for r in sorted(answer["results"], key=lambda result: result["index"])]


def test_elasticsearchs_template_makes_the_request_and_its_paths_read_the_answer(keyed):
    settings = CONNECTORS["_inference"]["service_settings"]
    # Placeholders are replaced by JSON, quotes included.
    query = asked()
    made = settings["request"].replace("${query}", json.dumps(query["query"]))
    made = made.replace("${input}", json.dumps(query["documents"]))
    assert json.loads(made) == json.loads(ELASTICSEARCH[2])
    assert settings["url"] == URL + ELASTICSEARCH[0]
    results = sent(keyed, ELASTICSEARCH).json()["results"]
    assert settings["response"]["json_parser"] == {
        "relevance_score": "$.results[*].relevance_score",
        "reranked_index": "$.results[*].index",
    }
    scores = {result["index"]: result["relevance_score"] for result in results}
    assert [scores[i] for i in range(3)] == pytest.approx(by_index(keyed))


def test_opensearchs_template_makes_the_request_and_its_function_reads_the_answer(keyed):
    connector = CONNECTORS["_plugins"]
    (action,) = connector["actions"]
    query = asked()
    # Strings are escaped and put between the template's quotes, all else is put in as JSON.
    parameters = {
        "documents": json.dumps(query["documents"], separators=(",", ":")),
        "query": json.dumps(query["query"])[1:-1],
        "model": connector["parameters"]["model"],
        "top_n": str(len(query["documents"])),
    }
    made = re.sub(r"\$\{parameters\.(\w+)\}", lambda found: parameters[found.group(1)], action["request_body"])
    assert made == OPENSEARCH[2].strip()
    assert action["url"] == URL + OPENSEARCH[0]
    results = json.loads(sent(keyed, OPENSEARCH).text)["results"]
    scores: list[float | None] = [None] * len(results)
    for result in results:
        assert type(result["index"]) is int
        assert type(result["relevance_score"]) is float
        scores[result["index"]] = result["relevance_score"]
    assert scores == pytest.approx(by_index(keyed))


def test_milvus_gets_every_score_by_index_from_vllm_and_from_tei(keyed):
    results = sent(keyed, MILVUS_VLLM).json()
    assert isinstance(results["usage"]["total_tokens"], int)
    as_vllm = {result["index"]: result["relevance_score"] for result in results["results"]}
    as_tei = {rank["index"]: rank["score"] for rank in sent(keyed, MILVUS_TEI).json()}
    for scores in (as_vllm, as_tei):
        assert [scores[i] for i in range(3)] == pytest.approx(by_index(keyed), abs=1e-6)


def test_every_snippet_is_in_the_table_of_errors_and_the_other_way_round():
    assert {name for name in SNIPPETS if not name.startswith("litellm,")} == set(ERRORS) - {"client", "---"}
