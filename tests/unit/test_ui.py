"""The page's arithmetic, reading and HTML, its calls to a gateway, and its doors; no Gradio and no browser."""

import asyncio
import csv
import io
import json

import httpx
import pytest
from pydantic import ValidationError

from serve_app.config import UiArgs
from serve_app.configfile import ConfigError, load
from serve_app.ui import charts, fleet, markup, rollouts
from serve_app.ui.actions import Actions
from serve_app.ui.client import Gateway, Trouble
from serve_app.ui.documents import Document, DocumentsError, Ranked, read, to_csv
from serve_app.ui.doors import MAX_BODY_BYTES, Doors
from serve_app.ui.orders import Agreement, Move, agreement, came, ranks, shares, went

# ---- orders


@pytest.mark.parametrize(
    ("now", "was", "move"),
    [
        (1, 4, Move("up", 3, 4)),
        (4, 1, Move("down", 3, 1)),
        (2, 2, Move("same", 0, 2)),
        (2, None, Move("new")),
    ],
)
def test_a_move_says_where_a_document_came_from(now, was, move):
    assert came(now, was) == move


def test_a_move_says_where_a_document_went():
    assert went(4, 1) == Move("up", 3, 1)
    assert went(1, 4) == Move("down", 3, 4)
    assert went(1, None) == Move("gone")


def test_orders_agree_by_what_they_share_and_by_their_first():
    assert agreement(["a", "b", "c"], ["a", "c", "d", "e"]) == Agreement(2, 4, True)
    assert agreement([], ["a"]) == Agreement(0, 1, False)
    assert ranks(["a", "b", "a"]) == {"a": 1, "b": 2}


def test_bars_begin_at_nought_or_below():
    assert shares([2, 1, 0]) == [1, 0.5, 0]
    assert shares([1, -1]) == [1, 0]
    assert shares([0, 0]) == [0, 0]
    assert shares([]) == []


# ---- documents


def test_documents_come_one_a_line():
    (batch,) = read("耳机\n\n Wireless headphones \n")
    assert batch.query is None
    assert batch.documents == [Document("1", "耳机"), Document("2", "Wireless headphones")]


def test_documents_come_as_json_lines_with_queries():
    rows = [
        {"query": "a", "text": "one", "id": "x"},
        {"query": "b", "documents": ["two", {"text": "three", "_id": 7}]},
        {"query": "a", "text": "four"},
        "five",
    ]
    batches = read("\ufeff" + "\n".join(json.dumps(row) for row in rows))
    assert [(batch.query, [(d.id, d.text) for d in batch.documents]) for batch in batches] == [
        ("a", [("x", "one"), ("2", "four")]),
        ("b", [("1", "two"), ("7", "three")]),
        (None, [("1", "five")]),
    ]


@pytest.mark.parametrize("strange", ["\u2028", "\u2029", "\x85", "\x0b", "\x1e"])
def test_only_line_feeds_end_a_line(strange):
    text = f"red{strange}shoes"
    (batch,) = read(json.dumps({"text": text}, ensure_ascii=False) + "\r\n" + json.dumps("blue"))
    assert [d.text for d in batch.documents] == [text, "blue"]
    (batch,) = read(f"{text}\rblue")
    assert [d.text for d in batch.documents] == [text, "blue"]


def test_documents_come_as_csv_in_any_order_of_columns():
    batches = read('id,Text,query\n1,"one, with a comma",q\n2,"two\nlines",q\n')
    assert [(d.id, d.text) for d in batches[0].documents] == [("1", "one, with a comma"), ("2", "two\nlines")]
    assert batches[0].query == "q"


def test_blank_lines_before_a_header_are_none():
    (batch,) = read("\n \r\nid,text\n1,red shoes\n")
    assert batch.documents == [Document("1", "red shoes")]


def test_documents_come_as_a_json_array():
    rows = [{"query": "a", "documents": ["one", {"text": "two", "id": "x"}]}, {"query": "b", "text": "three"}]
    lines = "\n".join(json.dumps(row) for row in rows)
    assert read(f" {json.dumps(rows, indent=2)}\n") == read(lines)
    assert read('["red", "blue"]') == read("red\nblue")


@pytest.mark.parametrize(
    "text", ["[ad] red shoes\nblue shoes", "[1, 2]", '["red", "blue"]\n["green"]', "[" * 100_000]
)
def test_what_is_no_array_of_documents_is_read_by_line(text):
    (batch,) = read(text)
    assert [d.text for d in batch.documents] == text.split("\n")


def test_a_document_may_be_longer_than_a_csv_field_is_by_default():
    long = "red shoes, " * 20_000 + "blue shoes"
    assert [d.text for d in read(long)[0].documents] == [long]
    assert [d.text for d in read(f'id,text\n1,"{long}"')[0].documents] == [long]


@pytest.mark.parametrize("first", ["red, green and text", "Document, photo and film scanner"])
def test_a_sentence_with_a_comma_is_no_csv(first):
    assert [d.text for d in read(f"{first}\nx, A4, black")[0].documents] == [first, "x, A4, black"]


def test_cells_that_are_empty_are_no_text_too_many():
    assert read("id,text\n1,red shoes,,\n")[0].documents == [Document("1", "red shoes")]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (" \n", "there are no documents"),
        ('{"text": "a"}\n{"text": ', "line 2: is not valid JSON"),
        ('{"txt": "a"}', "line 1: a document without text"),
        ('{"text": "a"}\n[1]', "line 2: is neither"),
        ('{"query": 3, "text": "a"}', "line 1: query is no text"),
        ('{"a":' * 100_000, "line 1: is not valid JSON"),
        ("id,text\n1", "line 2: has 1 columns"),
        ("id,text\n1,red shoes, size 42\n2,lamp", "line 2: has 3 columns, the first line 2; a text with commas"),
        ("id,text\n", "no documents"),
        ('id,text\n1,"two\nlines"\n2,"no end\n3,red\n4,blue', "line 4: is not valid CSV"),
        ('id,text\n1,red\n2,"no end\n3,"blue"\n4,green', "line 3: is not valid CSV"),
        ("[]", "there are no documents"),
        ('[{"text": "a"}, {"txt": "b"}]', "item 2: a document without text"),
        ('["a", "\\ud83d"]', "item 2: has half a surrogate pair"),
        ('{"text": "a"}\n{"query": "\\ud83d", "text": "b"}', "line 2: has half a surrogate pair"),
        ('{"text": "a"}\n{"text": "b", "id": "\\ude00"}', "line 2: has half a surrogate pair"),
        ('{"query": "a", "documents": ["b", "\\ud83d"]}', "line 1: has half a surrogate pair"),
        ("id,text\n1,red\n2,\ud83d", "line 3: has half a surrogate pair"),
        ("red\n\nblue \ude00", "line 3: has half a surrogate pair"),
        ("\n".join(json.dumps({"query": str(i), "text": "a"}) for i in range(65)), "65 queries are too many"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(text, says):
    with pytest.raises(DocumentsError, match=says):
        read(text)


def test_csv_is_read_back_as_it_was():
    rows = [
        Ranked("查询", 1, 0.5, Document("7", 'a "quoted", text\nof 两 lines')),
        Ranked("q", 2, -0.25, Document("8", "x")),
    ]
    text = to_csv(rows)
    assert text.startswith("\ufeff")
    parsed = list(csv.reader(io.StringIO(text.removeprefix("\ufeff"))))
    assert parsed == [
        ["query", "rank", "score", "id", "text"],
        ["查询", "1", "0.500000", "7", 'a "quoted", text\nof 两 lines'],
        ["q", "2", "-0.250000", "8", "x"],
    ]


def test_csv_runs_nothing_in_a_spreadsheet():
    text = to_csv([Ranked("=1+1", 1, 0.5, Document("-5", "@SUM(A1)"))])
    assert next(csv.reader(text.splitlines()[1:])) == ["'=1+1", "1", "0.500000", "-5", "'@SUM(A1)"]


# ---- HTML

META = {
    "route": "default",
    "pipeline": "fused",
    "why": "split",
    "stages": [{"name": "recall", "took_ms": 2.0}, {"name": "small", "took_ms": 8.0, "pairs": 3, "cache_hits": 1}],
    "took_ms": 12.5,
}


def result(identity, score, rank=None, text="text", title=""):
    found = {
        "id": identity,
        "score": score,
        "recall_score": 3.0,
        "rerank_score": score,
        "title": title,
        "text": text,
    }
    if rank is not None:
        found["stages"] = [{"stage": "recall", "score": 3.0, "rank": rank}]
    return found


def search_html(**meta):
    recalled = {"results": [result("a", 9.0), result("b", 8.0)], "meta": META}
    found = {"results": [result("b", 0.9, 2), result("c", 0.8, 7)], "meta": {**META, **meta}}
    return markup.search(recalled, found)


def test_search_shows_both_orders_and_what_moved():
    html = search_html()
    left, right = html.split("<h3>Reranked</h3>")
    assert "▲ 1" in left
    assert "▼ out" in left
    assert "up 1, to place 1" in left
    assert "up 1, from place 2" in right
    assert "up 5, from place 7" in right
    assert "small 8 ms, 3 pairs (1 from the cache)" in html
    assert "in all 12 ms" in html


def test_degraded_and_skipped_stages_are_said():
    degraded = [{"stage": "small", "reason": "timeout", "detail": "small did not answer within 5 ms"}]
    html = search_html(degraded=degraded)
    assert "Not the full answer: small did not contribute (small did not answer within 5 ms)" in html
    assert "nothing reranked it" in html
    skipped = [META["stages"][0], {"name": "small", "took_ms": 0.0, "skipped": "the query has '耳'"}]
    html = search_html(stages=skipped)
    assert "left out on purpose" in html
    assert "nothing reranked it" in html


def test_what_comes_from_outside_is_escaped():
    evil = "<img src=x onerror=alert(1)>"
    recalled = {"results": [result(evil, 1.0, text=evil, title=evil)], "meta": META}
    meta = {**META, "route": evil, "pipeline": evil, "degraded": [{"stage": evil, "reason": "x", "detail": evil}]}
    meta["rollout"] = {"id": evil, "role": evil}
    meta["stages"] = [{"name": evil, "took_ms": 1.0}]
    html = markup.search(recalled, {"results": recalled["results"], "meta": meta})
    html += markup.compare([evil, "b"], [evil, {**recalled, "meta": meta}]) + markup.notice(evil)
    html += markup.reranked(evil, [(evil, evil)], {"results": [{"index": 0, "relevance_score": 1}], "meta": meta})
    assert "<img" not in html
    assert "&lt;img" in html


def test_compare_marks_what_differs_from_the_first():
    first = {"results": [result("a", 3.0), result("b", 2.0)], "meta": META}
    second = {"results": [result("b", 0.9), result("c", 0.8)], "meta": META}
    html = markup.compare(["one", "two", "three"], [first, second, "The gateway refused: no such model"])
    one, two = html.split("<h3>two</h3>")
    assert "▼ out" in one
    assert "1 of 2 in both · another first" in two
    assert "up 1, from place 2" in two
    assert ">new<" in two
    assert "The gateway refused: no such model" in two


def test_a_chart_keeps_gaps_and_its_scale():
    html = charts.card("drain", [(0, 1.0), (10, None), (20, 2.0), (30, 4.0)], "s", "target 2 s")
    assert html.count("<polyline") == 2
    assert ">4 s<" in html
    assert "most 4 in 30 s · target 2 s" in html
    assert "–" in charts.card("nothing", [])


# ---- fleet


def sample(at, answered, **more):
    calls = None if answered is None else {"answered": answered, "failed": 0, "degraded": 0}
    return {"at": at, "calls": calls, "variants": {}, "applications": [], "nodes": [], **more}


def test_rates_are_taken_over_half_a_minute():
    samples = [sample(t, 10 * (t // 10) * 10) for t in range(0, 61, 2)]
    rates = fleet.per_s(samples, "answered")
    assert rates[0][1] is None
    assert all(rate == pytest.approx(10, abs=0.4) for at, rate in rates if at % 10 == 0 and at >= 30)


def test_a_node_that_leaves_makes_no_negative_rate():
    assert fleet.per_s([sample(0, 100), sample(10, 40), sample(20, 60)], "answered")[-1][1] == 1.0
    assert fleet.per_s([sample(0, 100), sample(10, None)], "answered")[-1][1] is None


def test_what_was_missed_for_once_is_no_growth_and_leaves_rates_known():
    rates = fleet.per_s([sample(0, 1000), sample(2, None), sample(4, 1040)], "answered")
    assert [rate for _, rate in rates] == [None, None, 10.0]


def test_history_is_bounded_and_takes_an_answer_once():
    history = fleet.History()
    for at in range(3000):
        history.add(sample(at, at))
    assert len(history.samples) <= fleet.SPAN_S / 2 + 1
    assert history.samples[-1]["at"] >= 2998
    history.add(sample(2998.5, 1))
    assert history.samples[-1]["at"] != 2998.5


def test_history_begins_again_when_the_clock_is_set_back():
    history = fleet.History()
    for at in (1000, 1003, 6, 9, 8):
        history.add(sample(at, at))
    assert [s["at"] for s in history.samples] == [6, 9]


def test_the_fleet_shows_shares_of_gpus():
    history = fleet.History()
    deployment = {
        "name": "Reranker",
        "status": "HEALTHY",
        "running": 2,
        "target": 3,
        "states": {"RUNNING": 2, "STARTING": 1},
        "num_cpus": 1,
        "num_gpus": 0.25,
        "nodes": {"n1": 2},
    }
    app = {"name": "small", "kind": "variant", "status": "RUNNING", "deployments": [deployment]}
    node = {"node": "n1", "gpus": 1, "gpus_used": 0.5, "replicas": 2}
    variant = {"drain_s": 1.5, "target_drain_s": 2.0}
    history.add(sample(10, 5, applications=[app], nodes=[node], variants={"small": variant}))
    html = fleet.view(history)
    assert html.count('style="width:25.00%"') == 2
    assert "small 2 × 0.25 GPU" in html
    assert "0.5 of 1 GPUs in use" in html
    assert "2 of 3 (1 starting)" in html
    assert "1.5 s" in html
    assert "target 2 s" in html


# ---- rollouts

ROLLOUT = {
    "id": "default-1",
    "route": "default",
    "stable": "fused",
    "canary": "next",
    "status": "step",
    "state": "step 2 of 3 (analysis) at 25 %",
    "step": 1,
    "steps": 3,
    "weight": 25.0,
    "shadow": 0.5,
    "since": 100.0,
    "until": 200.0,
    "document": {"steps": [{"set_weight": 25}, {"analysis": {"timeout_s": 90}}, {"pause": {"duration_s": None}}]},
    "figures": {
        side: {"calls": 1200, "errors": 0, "degraded": 0, "p50_ms": 12.0, "p95_ms": None, "mirrored": 3}
        for side in ("stable", "canary")
    },
    "guards": [
        {
            "metric": "rbo",
            "outcome": "inconclusive",
            "canary_samples": 5,
            "stable_samples": 0,
            "min_samples": 20,
            "text": "rbo is inconclusive: 5 of 20 samples",
        }
    ],
    "streaks": {"rbo": 1},
}


def test_a_rollout_shows_weights_steps_guards_and_history():
    history = [{"at": 0.0, "from_status": "none", "to_status": "pending", "reason": "started by <me>"}]
    html = rollouts.view(ROLLOUT, history, 130.0)
    assert "for 30 s, 1 min 10 s left" in html
    assert "fused 75 %" in html
    assert "next 25 %" in html
    assert "50 % of fused&#x27;s calls are mirrored" in html or "50 % of fused's calls are mirrored" in html
    assert "analysis, 1 min 30 s at most" in html
    assert "pause until resumed" in html
    assert "inconclusive, 1 in a row" in html
    assert "5 samples, 20 needed" in html
    assert "width:25%" in html
    assert "started by &lt;me&gt;" in html
    assert "1,200" in html


def test_a_promotion_before_the_last_step_did_not_take_the_others():
    early = rollouts.view({**ROLLOUT, "status": "promoted", "step": 0}, [], 130.0)
    assert "(cut short by the promotion)" in early
    assert "(left out)" in early
    assert "(done)" not in early
    last = len(ROLLOUT["document"]["steps"]) - 1
    assert "(left out)" not in rollouts.view({**ROLLOUT, "status": "promoted", "step": last}, [], 130.0)


def test_a_history_of_several_days_has_their_dates():
    entry = {"from_status": "paused", "to_status": "promoted", "reason": "by hand"}
    html = rollouts.view(ROLLOUT, [{**entry, "at": 0.0}, {**entry, "at": 200_000.0}], 200_010.0)
    assert "<time>1970-01-01 00:00:00</time>" in html
    assert "<time>07:33:20</time>" in html


# ---- calls to the gateway


def gateway(answer):
    return Gateway("http://gateway", httpx.MockTransport(answer))


def refused(status, message="why", headers=None):
    return gateway(lambda request: httpx.Response(status, json={"message": message}, headers=headers))


def trouble(gateway, key="k", ask="models"):
    with pytest.raises(Trouble) as raised:
        asyncio.run(getattr(gateway, ask)(key))
    return raised.value


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (refused(403), "Not open here: why"),
        (refused(429, headers={"Retry-After": "3"}), "Too many calls: why. Try again in 3 s."),
        (refused(503, headers={"Retry-After": "5"}), "Nothing that could answer is up: why. Try again in 5 s."),
        (refused(504), "Too late: why."),
        (refused(400, "query is empty"), "The gateway refused: query is empty"),
        (refused(500), "A fault in the gateway"),
        (gateway(lambda request: httpx.Response(503, text="no replica")), "no replica that could answer"),
        (gateway(lambda request: httpx.Response(200, text="<html>")), "is not a gateway of ours"),
    ],
)
def test_errors_are_said_in_words(found, says):
    assert says in str(trouble(found))


def test_a_gateway_that_is_down_is_said_in_words():
    def down(request):
        raise httpx.ConnectError("refused")

    def slow(request):
        raise httpx.ReadTimeout("late")

    assert "is not there" in str(trouble(gateway(down)))
    assert "did not answer in time" in str(trouble(gateway(slow)))


def test_a_missing_key_is_asked_for_and_a_wrong_one_said():
    assert "wants an API key" in str(trouble(refused(401), ""))
    assert trouble(refused(401), "").needs_key
    assert "does not know this API key" in str(trouble(refused(401), "wrong"))
    assert "need the admin key" in str(trouble(refused(401), "", "rollouts"))
    assert "does not know this admin key" in str(trouble(refused(401), "wrong", "rollouts"))
    assert "characters that no key has" in str(trouble(refused(200), "键"))


def test_calls_bring_the_visitors_key_and_nobody_elses(monkeypatch):
    monkeypatch.setenv("SERVE_APP_API_KEY", "of-the-machine")
    seen = []

    def answer(request):
        seen.append(request.headers.get("authorization"))
        return httpx.Response(200, json={"data": []})

    asked = gateway(answer)

    async def ask():
        await asked.models("")
        await asked.models(" mine ")

    asyncio.run(ask())
    assert seen == [None, "Bearer mine"]


def test_names_of_a_rollout_cannot_leave_their_path():
    seen = []

    def answer(request):
        seen.append(request.url.raw_path)
        return httpx.Response(200, json={"history": []})

    asyncio.run(gateway(answer).act("k", "../models?x", "abort"))
    assert seen == [b"/v1/rollouts/..%2Fmodels%3Fx/abort"]


def test_a_batch_asks_once_for_each_query_and_goes_on_after_an_error():
    def answer(request):
        body = json.loads(request.content)
        if body["query"] == "bad":
            return httpx.Response(400, json={"message": "no"})
        results = [{"index": i, "relevance_score": 1 - i / 10} for i in range(len(body["documents"]))]
        return httpx.Response(200, json={"results": results, "meta": META})

    text = "\n".join(json.dumps({"query": q, "text": t}) for q in ("a", "bad", "b") for t in ("x", "y"))

    async def run():
        return [made async for made in Actions(gateway(answer)).rerank("k", "", text, None, "")]

    html, made = asyncio.run(run())[-1]
    assert "The gateway refused: no" in html
    assert "All 3 queries are done" in html
    assert [row[0] for row in csv.reader(made.splitlines()[1:])] == ["a", "a", "b", "b"]


@pytest.mark.parametrize("given", [("\ud83d", ""), ("shoes", "\ud83d")])
def test_half_a_surrogate_pair_is_said_in_words(given):
    query, instruction = given
    actions = Actions(gateway(lambda request: httpx.Response(200, json={})))

    async def run():
        yield await actions.search("k", query, None, instruction, 10)
        async for html, _ in actions.rerank("k", query, "red\nblue", None, instruction):
            yield html

    async def said():
        return [html async for html in run()]

    for html in asyncio.run(said()):
        assert "has half a surrogate pair" in html
        html.encode()


def test_nothing_is_sent_for_an_empty_query():
    def answer(request):
        raise AssertionError("sent")

    actions = Actions(gateway(answer))
    assert "Enter a query" in asyncio.run(actions.search("", " ", None, "", 10))
    assert "Choose two" in asyncio.run(actions.compare("", "q", ["a"], "", 10))


# ---- doors


def through(method, path, content=b"", root="/ui", headers=None):
    async def app(scope, receive, send):
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"in"})

    async def call():
        transport = httpx.ASGITransport(Doors(app), root_path=root)
        async with httpx.AsyncClient(transport=transport, base_url="http://page") as client:
            return await client.request(method, root + path, content=content, headers=headers)

    return asyncio.run(call())


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("HEAD", "/"),
        ("GET", "/config"),
        ("GET", "/assets/index-1.js"),
        ("GET", "/gradio_api/queue/data"),
        ("GET", "/gradio_api/heartbeat/abc1"),
        ("POST", "/gradio_api/queue/join"),
    ],
)
def test_the_page_and_its_events_are_open(method, path):
    answer = through(method, path)
    assert answer.status_code == 200
    assert "default-src 'self'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/gradio_api/upload"),
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", "/gradio_api/proxy=http://169.254.169.254/"),
        ("GET", "/assets/%2e%2e/config"),
        ("GET", "/assets/%252e%252e/x"),
        ("POST", "/gradio_api/run/predict"),
        ("POST", "/login"),
        ("DELETE", "/"),
        ("GET", "/monitoring"),
    ],
)
def test_everything_else_of_gradio_is_closed(method, path):
    assert through(method, path).status_code == 404


def test_bodies_are_bounded():
    assert through("POST", "/gradio_api/queue/join", b"x" * (MAX_BODY_BYTES + 1)).status_code == 413


def test_the_page_has_its_slash():
    answer = through("GET", "")
    assert (answer.status_code, answer.headers["location"]) == (308, "/ui/")


# ---- in a config file


def test_a_page_is_one_replica(tmp_path):
    config = tmp_path / "serve.yaml"
    text = (
        "applications:\n- {name: page, import_path: 'serve_app.ui:build', route_prefix: /ui, deployments: [%s]}\n"
    )
    config.write_text(text % "{name: Page, num_replicas: 2}")
    with pytest.raises(ConfigError, match="Page has several replicas; allowed: num_replicas 1"):
        load(config)
    config.write_text(text % "{name: Page, num_replicas: 1}")
    assert load(config).gateways == {}


@pytest.mark.parametrize(
    ("url", "good"),
    [
        ("http://gateway:8000", True),
        ("https://search.example/api", True),
        ("gateway:8000", False),
        ("http://user:password@gateway", False),
        ("http://gateway/?key=1", False),
    ],
)
def test_a_gateways_url_holds_no_password(url, good):
    if good:
        assert UiArgs(gateway_url=url).gateway_url == url
    else:
        with pytest.raises(ValidationError):
            UiArgs(gateway_url=url)
