"""Evaluation, pure parts and HTTP part, the latter against a made gateway."""

import asyncio
import json
import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.evaluation import DatasetError, EvaluationError, Report, evaluate
from serve_app.evaluation import client as client_module
from serve_app.evaluation.dataset import read_dataset
from serve_app.evaluation.measure import choose_systems
from serve_app.evaluation.metrics import percentile, quality

MODELS = [
    {"id": "default", "kind": "route", "weights": {"fused": 90.0, "canary": 10.0, "bm25": 0.0}},
    {"id": "bm25", "kind": "pipeline", "recall_k": 100, "stages": []},
    {"id": "fused", "kind": "pipeline", "recall_k": 200, "stages": [{"variant": "minilm"}]},
    {"id": "canary", "kind": "pipeline", "recall_k": 50, "stages": [{"variant": "minilm"}]},
    {"id": "minilm", "kind": "variant"},
]

Reply = Callable[[dict[str, Any]], httpx.Response]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    (tmp_path / "qrels").mkdir()
    queries = [
        {"_id": "q1", "text": "noise cancelling", "lang": "en"},
        {"_id": "q2", "text": "降噪", "lang": "zh"},
        {"_id": "q3", "text": "nothing fits this"},
    ]
    (tmp_path / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)), encoding="utf-8")
    (tmp_path / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq1\ta\t3\nq1\tb\t1\nq2\tc\t2\nq3\ta\t0\n", encoding="utf-8"
    )
    return tmp_path


def answer(*ids: str, **meta: Any) -> httpx.Response:
    return httpx.Response(
        200, json={"id": "r", "results": [{"id": id, "score": 0.5} for id in ids], "meta": {"stages": [], **meta}}
    )


def gateway(reply: Reply, seen: list[dict[str, Any]] | None = None, down: bool = False) -> httpx.MockTransport:
    async def handle(request: httpx.Request) -> httpx.Response:
        if down:
            raise httpx.ConnectError("connection refused")
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"object": "list", "data": MODELS})
        body = json.loads(request.content)
        if seen is not None:
            seen.append(body)
        await asyncio.sleep(0)
        return reply(body)

    return httpx.MockTransport(handle)


def run(dataset: Path, reply: Reply, seen: list[dict[str, Any]] | None = None, **options: Any) -> Report:
    return evaluate(dataset, "http://gateway", progress=False, transport=gateway(reply, seen), **options)


# Reading


def test_queries_without_a_relevant_document_are_left_out(dataset: Path) -> None:
    data = read_dataset(dataset)
    assert [query.id for query in data.queries] == ["q1", "q2"]
    assert data.unjudged == 1
    assert data.grades == {"q1": {"a": 3, "b": 1}, "q2": {"c": 2}}
    assert [query.id for query in read_dataset(dataset, limit=1).queries] == ["q1"]


def test_numbers_as_ids_no_header_blank_lines_and_crlf_are_read(dataset: Path) -> None:
    (dataset / "queries.jsonl").write_bytes(b'\xef\xbb\xbf{"_id": 7, "text": "x"}\r\n\r\n')
    (dataset / "qrels" / "test.tsv").write_bytes(b"7\t12\t1\r\n\r\n")
    data = read_dataset(dataset)
    assert (data.queries[0].id, data.grades) == ("7", {"7": {"12": 1}})


def test_no_language_may_be_null(dataset: Path) -> None:
    (dataset / "queries.jsonl").write_text('{"_id": "q1", "text": "x", "lang": null}\n')
    (dataset / "qrels" / "test.tsv").write_text("q1\ta\t1\n")
    assert read_dataset(dataset).queries[0].lang == ""


def test_a_first_line_about_a_query_is_no_header(dataset: Path) -> None:
    (dataset / "qrels" / "test.tsv").write_text("q1\ta\t1O\nq2\tc\t1\n")
    with pytest.raises(DatasetError, match=r"test\.tsv:1: the grade must be a whole number, got '1O'"):
        read_dataset(dataset)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"_id": "q4"', "not JSON"),
        (b'["q4"]', "expected an object with _id and text, got a list"),
        (b'{"text": "x"}', "_id must be a string or a whole number, got nothing"),
        (b'{"_id": true, "text": "x"}', "_id must be a string or a whole number, got a boolean"),
        (b'{"_id": "q4", "text": " "}', "text must be a string that is not empty"),
        (b'{"_id": "q4", "text": "x", "lang": 1}', "lang must be a string, got 1"),
        (b'{"_id": "q1", "text": "x"}', "the _id 'q1' is there twice"),
        (b'{"_id": "q4", "text": "\xff"}', "not UTF-8 (byte 24 of the line)"),
    ],
)
def test_a_bad_query_is_named_by_file_and_line(dataset: Path, line: bytes, problem: str) -> None:
    with (dataset / "queries.jsonl").open("ab") as file:
        file.write(b"\n" + line + b"\n")
    with pytest.raises(DatasetError) as error:
        read_dataset(dataset)
    assert str(error.value).startswith(f"{dataset / 'queries.jsonl'}:4: ")
    assert problem in str(error.value)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("q1 a 1", "between tabs, got 1 columns"),
        ("q1\td\thigh", "the grade must be a whole number, got 'high'"),
        ("q9\td\t1", "the query 'q9' is not in queries.jsonl"),
        ("q1\t\t1", "the document id is empty"),
        ("q1\ta\t1", "the document 'a' has the grades 3 and 1 for the query 'q1'"),
    ],
)
def test_a_bad_grade_is_named_by_file_and_line(dataset: Path, line: str, problem: str) -> None:
    with (dataset / "qrels" / "test.tsv").open("a", encoding="utf-8") as file:
        file.write(line)
    with pytest.raises(DatasetError) as error:
        read_dataset(dataset)
    assert str(error.value).startswith(f"{dataset / 'qrels' / 'test.tsv'}:6: ")
    assert problem in str(error.value)


def test_missing_folder_file_and_judgements_are_said(dataset: Path) -> None:
    with pytest.raises(DatasetError, match="no such folder"):
        read_dataset(dataset / "nowhere")
    (dataset / "qrels" / "test.tsv").write_text("q1\ta\t0\n")
    with pytest.raises(DatasetError, match="no query has a relevant document"):
        read_dataset(dataset)
    (dataset / "qrels" / "test.tsv").unlink()
    with pytest.raises(DatasetError, match=r"test\.tsv: no such file"):
        read_dataset(dataset)


# Metrics


def test_a_grade_that_trec_eval_cannot_reckon_with_is_refused(dataset: Path) -> None:
    (dataset / "qrels" / "test.tsv").write_text("q1\ta\t2147483647\n")
    with pytest.raises(
        DatasetError, match=r"test\.tsv:1: the grade is 2147483647; allowed: -1,000,000 to 1,000,000"
    ):
        read_dataset(dataset)


def test_metrics_are_those_of_the_definitions() -> None:
    grades = {"q": {"a": 3, "b": 1, "c": 2}}
    found = quality(grades, {"q": ["x", "b", "a"]})["q"]
    ideal = 3 + 2 / math.log2(3) + 1 / 2
    assert found["ndcg@10"] == pytest.approx((1 / math.log2(3) + 3 / 2) / ideal)
    assert found["recall@10"] == found["recall@100"] == pytest.approx(2 / 3)
    assert found["mrr@10"] == pytest.approx(1 / 2)


def test_only_the_first_ten_count_for_metrics_at_ten() -> None:
    order = [f"x{n}" for n in range(10)] + ["a"]
    found = quality({"q": {"a": 1}}, {"q": order})["q"]
    assert found == {"ndcg@10": 0, "recall@10": 0, "recall@100": 1, "mrr@10": 0}


def test_an_order_is_kept_whatever_the_ids_sort_like() -> None:
    grades = {"q": {"z": 1}}
    assert quality(grades, {"q": ["z", "a"]})["q"]["mrr@10"] == 1
    assert quality({"q": {"a": 1}}, {"q": ["z", "a"]})["q"]["mrr@10"] == 0.5


def test_a_query_without_an_answer_scores_nothing() -> None:
    values = quality({"q": {"a": 1}, "r": {"b": 1}}, {"q": ["a"], "r": []})
    assert values["q"]["ndcg@10"] == 1
    assert set(values["r"].values()) == {0.0}


def test_percentiles_are_linear() -> None:
    assert percentile([], 50) is None
    assert percentile([4.0], 99) == 4.0
    assert percentile([1.0, 3.0, 2.0], 50) == 2.0
    assert percentile([0.0, 10.0], 95) == pytest.approx(9.5)


# Which systems


def bodies(**options: Any) -> dict[str, dict[str, Any]]:
    options = {"route": None, "models": None, "top_n": 100} | options
    return {system.name: system.body for system in choose_systems(MODELS, **options)}


def test_recall_alone_and_every_pipeline_are_compared() -> None:
    assert bodies() == {
        "recall alone": {"rerank": False, "top_n": 100, "recall_k": 200},
        "bm25": {"model": "bm25", "top_n": 100},
        "fused": {"model": "fused", "top_n": 100},
        # No deeper than its searches are.
        "canary": {"model": "canary", "top_n": 50},
    }


def test_a_route_restricts_to_the_pipelines_with_weight() -> None:
    chosen = bodies(route="default")
    assert list(chosen) == ["recall alone", "fused", "canary"]
    assert chosen["recall alone"]["route"] == "default"


def test_a_route_has_the_pipelines_that_its_rollouts_leave_it() -> None:
    steered = [MODELS[0] | {"effective_weights": {"fused": 0.0, "canary": 90.0, "bm25": 10.0}}, *MODELS[1:]]
    chosen = choose_systems(steered, route="default", models=None, top_n=100)
    assert [system.name for system in chosen] == ["recall alone", "canary", "bm25"]


def test_models_may_name_pipelines_and_variants() -> None:
    assert list(bodies(models=["minilm", "fused", "minilm"])) == ["recall alone", "minilm", "fused"]


def test_an_unknown_name_is_refused_with_the_closest_one() -> None:
    with pytest.raises(EvaluationError, match=r"'fusd' is no pipeline or variant .* did you mean 'fused'"):
        bodies(models=["fusd"])
    with pytest.raises(EvaluationError, match="'fused' is no route of this gateway; known: default"):
        bodies(route="fused")


# Over HTTP


def test_report_compares_the_systems(dataset: Path) -> None:
    def reply(body: dict[str, Any]) -> httpx.Response:
        if body.get("rerank") is False:
            return answer("b", "a", "c")
        return answer("a", "b", "c", **({"degraded": [{"stage": "minilm"}]} if body["query"] == "降噪" else {}))

    seen: list[dict[str, Any]] = []
    report = run(dataset, reply, seen, models=["fused"], timeout_s=2)
    alone, fused = report.results
    assert fused.metrics["ndcg@10"] > alone.metrics["ndcg@10"]
    assert fused.metrics["recall@10"] == 1
    assert fused.ndcg_by_lang == {"en": 1.0, "zh": pytest.approx(0.5)}
    assert (alone.degraded_share, fused.degraded_share) == (0, 0.5)
    assert (fused.queries, fused.failures, report.failures, report.unjudged_queries) == (2, 0, 0, 1)
    assert fused.latency_ms["p99"] > 0
    assert [body["timeout_ms"] for body in seen] == [2000] * 4
    assert json.loads(json.dumps(report.json()))["results"][1]["metrics"] == fused.metrics


def test_table_lines_up_and_holds_every_system(dataset: Path) -> None:
    table = run(dataset, lambda body: answer("a")).table()
    quality_table, lang_table = (part.splitlines() for part in table.split("\n\n"))
    assert len({len(line) for line in quality_table}) == len({len(line) for line in lang_table}) == 1
    assert quality_table[0].startswith("| system ")
    assert [line.split("|")[1].strip() for line in quality_table[2:]] == [
        "recall alone",
        "bm25",
        "fused",
        "canary",
    ]
    assert "en (1)" in lang_table[0]


class Clock:
    """Time that passes only where it is waited for."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.waits: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        until = self.now + seconds
        await asyncio.sleep(0)
        self.now = max(self.now, until)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(client_module, "sleep", made.sleep)
    monkeypatch.setattr(client_module, "perf_counter", lambda: made.now)
    return made


def many(dataset: Path, count: int) -> Path:
    rows = [json.dumps({"_id": str(n), "text": f"query {n}"}) for n in range(count)]
    (dataset / "queries.jsonl").write_text("\n".join(rows))
    (dataset / "qrels" / "test.tsv").write_text("\n".join(f"{n}\ta\t1" for n in range(count)))
    return dataset


def test_overload_is_tried_again_after_the_time_asked_for(dataset: Path, clock: Clock) -> None:
    replies = iter(
        [
            httpx.Response(503, headers={"Retry-After": "3"}),
            httpx.Response(503, headers={"Retry-After": "300"}),
            httpx.Response(429, headers={"Retry-After": "300"}),
            httpx.Response(503, headers={"Retry-After": "Wed, 21 Oct 2037 07:28:00 GMT"}),
        ]
    )
    report = run(dataset, lambda body: next(replies, answer("a")), models=["fused"], limit=1)
    assert clock.waits == [3.0, client_module.MAX_WAIT_S, 300.0, 2.0]
    assert [(result.retries, result.failures) for result in report.results] == [(4, 0), (0, 0)]


def test_no_query_fails_for_a_rate_that_all_share(dataset: Path, clock: Clock) -> None:
    free_at = clock.now

    def reply(body: dict[str, Any]) -> httpx.Response:
        nonlocal free_at
        if clock.now < free_at:
            return httpx.Response(429, headers={"Retry-After": str(math.ceil(free_at - clock.now))})
        free_at = clock.now + 20
        return answer("a")

    report = run(many(dataset, 40), reply, models=["fused"], concurrency=8)
    assert report.failures == 0
    # 80 calls, each 20 s after the one before.
    assert clock.now == 1000 + 79 * 20


def test_one_querys_refusal_holds_back_all(dataset: Path, clock: Clock) -> None:
    refusals = iter([httpx.Response(429, headers={"Retry-After": "50"})])
    seen: list[float] = []

    def reply(body: dict[str, Any]) -> httpx.Response:
        seen.append(clock.now)
        return next(refusals, answer("a"))

    run(many(dataset, 6), reply, models=["fused"], concurrency=2)
    assert len(seen) == 13
    # One was under way already.
    assert sum(at < 1050 for at in seen) == 2


def test_a_key_that_is_only_refused_ends_the_run(dataset: Path, clock: Clock) -> None:
    refusal = httpx.Response(429, headers={"Retry-After": "45"}, json={"error": {"message": "its rate is 1"}})
    with pytest.raises(EvaluationError, match=r"nothing but 429, .* allowed: 600 \(429: its rate is 1\)"):
        run(dataset, lambda body: refusal)
    assert clock.now == 1000 + 13 * 45


@pytest.mark.parametrize("concurrency", [1, 2])
# Ray's HAProxy says 500 for a fleet whose gateways are away.
@pytest.mark.parametrize("status", [503, 500])
def test_a_gateway_that_goes_away_leaves_the_finished_systems(
    dataset: Path, clock: Clock, concurrency: int, status: int
) -> None:
    asked = 0

    def reply(body: dict[str, Any]) -> httpx.Response:
        nonlocal asked
        if body.get("model") != "fused":
            return answer("a")
        asked += 1
        if asked % 3:
            raise (httpx.ConnectError, httpx.ConnectTimeout)[asked % 2]("nobody there")
        return httpx.Response(status, text="Internal Server Error")

    report = run(many(dataset, 40), reply, concurrency=concurrency)
    assert [result.name for result in report.results] == ["recall alone", "bm25"]
    assert report.failures == 0
    assert f"cut off at fused: http://gateway left {3 * concurrency} queries in a row" in report.table()
    assert report.json()["stopped"]["system"] == "fused"
    # Some queries are begun before the last of them gave up.
    assert asked <= client_module.ATTEMPTS * (4 * concurrency)
    with pytest.raises(EvaluationError, match="queries in a row without an answer, the last with 503: Service"):
        run(dataset, lambda body: httpx.Response(503), concurrency=1)


def test_failures_between_answers_end_nothing(dataset: Path, clock: Clock) -> None:
    def reply(body: dict[str, Any]) -> httpx.Response:
        return answer("a") if int(body["query"].split()[1]) % 3 == 2 else httpx.Response(503)

    report = run(many(dataset, 9), reply, models=["fused"], concurrency=1)
    assert [(result.failures, report.stopped) for result in report.results] == [(6, None)] * 2


@pytest.fixture
def _ctrl_c() -> Iterator[None]:
    """Python's own handler, which a run in the background goes without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c")
def test_an_interrupt_leaves_the_finished_systems(dataset: Path) -> None:
    def reply(body: dict[str, Any]) -> httpx.Response:
        if body.get("model", "recall alone") == interrupted:
            signal.raise_signal(signal.SIGINT)
        return answer("a")

    interrupted = "fused"

    # Another signal would end it at once.
    report = run(dataset, reply, limit=1)
    assert [result.name for result in report.results] == ["recall alone", "bm25"]
    assert report.table().endswith("cut off at fused: interrupted")
    interrupted = "recall alone"
    with pytest.raises(KeyboardInterrupt):
        run(dataset, reply, limit=1)


def test_a_limit_of_the_gateways_names_the_option(dataset: Path) -> None:
    error = {"message": "top_n is 100; limits.max_recall_k is 50", "code": "limit_exceeded", "param": "top_n"}
    seen: list[dict[str, Any]] = []

    def reply(body: dict[str, Any]) -> httpx.Response:
        return httpx.Response(400, json={"error": error}) if body["top_n"] > 50 else answer("a")

    assert "limits.max_recall_k is 50; --top-n asks for fewer results" in run(dataset, reply).table()
    report = run(dataset, reply, seen, models=["canary"], top_n=50)
    assert report.failures == 0
    assert seen[0]["recall_k"] == 50
    error = {"message": "timeout_ms is 30000; the limit is 5000", "code": "limit_exceeded", "param": "timeout_ms"}
    table = run(dataset, lambda body: httpx.Response(400, json={"error": error})).table()
    assert "the limit is 5000; --timeout-s sets it" in table


def test_no_user_or_key_of_the_url_is_shown(dataset: Path) -> None:
    shown: list[str] = []
    for url in ("http://shop:KEY@gateway:8000/", "http://shop:KEY/x@gateway", "http://shop:KEY@[::1"):
        for transport in (gateway(lambda body: answer("a")), gateway(lambda body: answer("a"), down=True)):
            try:
                report = evaluate(dataset, url, progress=False, transport=transport)
            except EvaluationError as error:
                shown.append(str(error))
            else:
                shown.append(json.dumps(report.json()) + report.table())
                assert report.url == "http://gateway:8000"
    assert len(shown) == 6
    assert not any("KEY" in text or "shop" in text for text in shown)


def test_a_documents_own_query_is_left_out_when_asked_for(dataset: Path) -> None:
    seen: list[dict[str, Any]] = []

    def reply(body: dict[str, Any]) -> httpx.Response:
        return answer({"noise cancelling": "q1", "降噪": "q2"}[body["query"]], "a", "c")

    kept = run(dataset, reply, models=["fused"])
    assert any("--ignore-identical-ids" in note for note in kept.notes)
    left_out = run(dataset, reply, seen, models=["fused"], top_n=1, ignore_identical_ids=True)
    assert [result.metrics["mrr@10"] for result in kept.results] == [pytest.approx((1 / 2 + 1 / 3) / 2)] * 2
    # One result is asked for: a, which is right for the first query.
    assert [result.metrics["mrr@10"] for result in left_out.results] == [0.5] * 2
    assert not any("--ignore-identical-ids" in note for note in left_out.notes)
    assert {body["top_n"] for body in seen} == {2}
    run(dataset, reply, seen, models=["canary"], ignore_identical_ids=True)
    # Also of one that recalls no more than it shows.
    assert seen[-1] == {**seen[-1], "model": "canary", "top_n": 51}


def test_an_own_document_that_is_judged_relevant_is_no_surprise(dataset: Path) -> None:
    (dataset / "qrels" / "test.tsv").write_text("q1\tq1\t1\nq2\tq2\t1\n")
    assert run(dataset, lambda body: answer("q1" if body["query"] == "noise cancelling" else "q2")).notes == []


def test_a_failed_query_counts_as_nothing_found_and_is_shown(dataset: Path) -> None:
    def reply(body: dict[str, Any]) -> httpx.Response:
        if body["query"] == "降噪":
            return httpx.Response(504, json={"error": {"message": "the deadline of 2000 ms has passed"}})
        return answer("a", "b")

    report = run(dataset, reply, models=["fused"])
    fused = report.results[1]
    assert (fused.failures, fused.metrics["ndcg@10"]) == (1, 0.5)
    assert fused.errors == {"504: the deadline of 2000 ms has passed": 1}
    assert "fused: 1 x 504: the deadline of 2000 ms has passed" in report.table()


def test_lost_connections_and_nonsense_are_failures_not_crashes(dataset: Path) -> None:
    def reply(body: dict[str, Any]) -> httpx.Response:
        if body["query"] == "降噪":
            raise httpx.ReadTimeout("")
        return httpx.Response(200, text="<html>")

    result = run(dataset, reply, models=["fused"]).results[0]
    assert result.errors == {"200, but the body is no search answer": 1, "ReadTimeout": 1}
    assert result.latency_ms == {"p50": None, "p95": None, "p99": None}


def test_a_query_that_no_json_carries_is_a_failure_not_a_crash(dataset: Path) -> None:
    queries = dataset / "queries.jsonl"
    queries.write_text(queries.read_text().replace("noise cancelling", "half of \\ud83d"))
    result = run(dataset, lambda body: answer("c"), models=["fused"]).results[0]
    ((error, times),) = result.errors.items()
    assert error.startswith("UnicodeEncodeError: ")
    assert times == 1


def test_no_more_queries_than_asked_for_are_under_way(dataset: Path) -> None:
    many(dataset, 20)
    under_way, most = 0, 0

    async def handle(request: httpx.Request) -> httpx.Response:
        nonlocal under_way, most
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": MODELS})
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.001)
        under_way -= 1
        return answer("a")

    transport = httpx.MockTransport(handle)
    report = evaluate(dataset, "http://gateway", concurrency=3, progress=False, transport=transport)
    assert most == 3
    assert all(result.metrics["mrr@10"] == 1 for result in report.results)


def test_a_foreign_index_is_noticed(dataset: Path) -> None:
    assert "is it this dataset's corpus that is served?" in run(dataset, lambda body: answer("zz")).table()


def test_a_gateway_that_is_not_there_is_one_clear_error(dataset: Path) -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("connection refused")

    with pytest.raises(EvaluationError, match="ConnectError: connection refused"):
        evaluate(dataset, "http://gateway/", transport=httpx.MockTransport(refuse))
    with pytest.raises(EvaluationError, match="no gateway answers at nonsense"):
        evaluate(dataset, "nonsense")
    other = httpx.MockTransport(lambda request: httpx.Response(200, json=[]))
    with pytest.raises(EvaluationError, match="something else than a list of models"):
        evaluate(dataset, "http://gateway", transport=other)


@pytest.mark.parametrize("options", [{"concurrency": 0}, {"top_n": 0}, {"limit": 0}, {"timeout_s": 0}])
def test_numbers_out_of_range_are_refused(dataset: Path, options: dict[str, Any]) -> None:
    with pytest.raises(EvaluationError, match="is 0; allowed: "):
        evaluate(dataset, "http://gateway", **options)
