"""The page in a real browser, over a real fleet with keys."""

import codecs
import csv
import json
import random
import re
import time

import httpx
import pytest
from playwright.sync_api import expect

from tests.system.conftest import wait_for
from tests.ui.conftest import ADMIN, KEY, RECALL_K, WANTS_PICTURES

ENGLISH, CHINESE = "wireless headphones that block out noise", "降噪耳机"


def tab(page, name):
    """By keyboard, as by mouse; the tabs that don't fit are in a menu."""
    found = page.get_by_role("tab", name=name, exact=True)
    if not found.first.is_visible():
        page.locator(".overflow-menu button").first.click()
        page.locator(".overflow-dropdown").get_by_text(name, exact=True).click()
    else:
        found.first.click()


def choose(page, field, *names):
    """Of a dropdown, by typing."""
    box = page.locator(f"{field} input")
    for name in names:
        box.click()
        box.fill(name)
        page.get_by_role("option", name=name, exact=True).click()


def titles(column):
    return column.locator(".title").all_inner_texts()


def search(page, query):
    page.locator("#search-query textarea, #search-query input").fill(query)
    page.keyboard.press("Enter")


# ---- keys


def test_nothing_is_shown_before_the_gateway_knows_the_key(open_page):
    page = open_page(key="")
    expect(page.locator("#search-query")).to_have_count(0)
    page.locator("#api-key input").fill("a-wrong-key-0123456789")
    page.locator("#connect").click()
    expect(page.locator("#status")).to_contain_text("does not know this API key")
    expect(page.locator("#search-query")).to_have_count(0)
    page.locator("#api-key input").fill(KEY)
    page.locator("#connect").click()
    expect(page.locator("#search-query")).to_be_visible()
    expect(page.locator("#status")).to_be_empty()


def test_events_bring_strangers_no_further_than_the_gateway_does(fleet):
    """Past the page's own script, as anybody may send them."""
    with httpx.Client(base_url=f"{fleet.url}/ui", timeout=30) as client:
        config = client.get("/config").json()
        ids = {c["props"].get("elem_id"): c["id"] for c in config["components"]}
        event = next(
            d
            for d in config["dependencies"]
            if ids["search-results"] in d["outputs"]
            and [ids["search"], "click"] in [list(t) for t in d["targets"]]
        )
        body = {"data": ["", ENGLISH, None, "", 10], "fn_index": event["id"], "session_hash": "stranger1"}
        assert client.post("/gradio_api/queue/join", json=body).status_code == 200
        said = ""
        with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": "stranger1"}) as answer:
            for line in answer.iter_lines():
                said += line
                if '"process_completed"' in line:
                    break
        assert "wants an API key" in said
        assert "BM25" not in said
        assert client.post("/gradio_api/upload", files={"files": b"x"}).status_code == 404
        assert client.get("/gradio_api/file=/etc/passwd").status_code == 404


def test_no_secret_is_in_what_everybody_can_read(fleet):
    with httpx.Client(base_url=fleet.url, timeout=30) as client:
        for path in ("/ui/", "/ui/config"):
            text = client.get(path).text
            assert KEY not in text
            assert ADMIN not in text
            assert "minilm" not in text


# ---- search


def test_search_shows_what_moved_in_english(open_page, picture):
    page = open_page()
    search(page, ENGLISH)
    columns = page.locator("#search-results .column")
    expect(columns).to_have_count(2)
    before, after = titles(columns.nth(0)), titles(columns.nth(1))
    assert len(before) == len(after) == 10
    assert before != after
    assert "Headphones" in after[0] or "Headset" in after[0]
    # Every arrow says what the two columns show.
    for rank, (title, said) in enumerate(
        zip(after, columns.nth(1).locator(".move .unseen").all_text_contents(), strict=True), 1
    ):
        place = re.fullmatch(r"(up|down) (\d+), from place (\d+)", said)
        was = int(place[3]) if place else rank
        assert 1 <= was <= RECALL_K
        if was <= 10:
            assert before[was - 1] == title
        if place:
            assert abs(was - rank) == int(place[2])
            assert (was > rank) == (place[1] == "up")
    widths = [
        float(re.search(r"[\d.]+", bar.get_attribute("style"))[0]) for bar in columns.nth(1).locator(".fill").all()
    ]
    assert widths[0] == 100
    assert widths == sorted(widths, reverse=True)
    expect(page.locator("#search-results .legend")).to_contain_text(
        re.compile(r"recall [\d.]+ ms.*minilm [\d,.]+ ms")
    )
    picture(page, "search")


def test_search_in_chinese_says_which_model_was_left_out(open_page, picture):
    page = open_page()
    search(page, CHINESE)
    expect(page.locator("#search-results")).to_contain_text("minilm was left out on purpose")
    assert any("耳机" in title for title in titles(page.locator("#search-results .column").nth(1)))
    choose(page, "#search-model", "chinese")
    search(page, f"{CHINESE} 黑色")
    expect(page.locator("#search-results .legend")).to_contain_text("words-model")
    # Its model counts whole words, which colours are here.
    black = ["黑色" in title.split() for title in titles(page.locator("#search-results .column").nth(1))]
    assert black[0]
    assert black == sorted(black, reverse=True)
    picture(page, "search-chinese")


def test_a_degraded_answer_is_shown_as_one(open_page):
    page = open_page()
    choose(page, "#search-model", "broken")
    search(page, ENGLISH)
    warning = page.locator("#search-results .notice.warning")
    expect(warning).to_contain_text("Not the full answer: raises-model did not contribute")
    assert len(titles(page.locator("#search-results .column").nth(1))) == 10


def test_a_query_is_text_whatever_is_in_it(open_page):
    page = open_page()
    evil = "<img src=x onerror=window.hit=1> ${window.hit=1} {{value}} 耳机"
    tab(page, "Rerank")
    page.locator("#rerank-query textarea, #rerank-query input").fill(evil)
    page.locator("#rerank-documents textarea").fill(f"{evil}\nanother headphone")
    page.locator("#rerank").click()
    expect(page.locator("#rerank-results h3")).to_have_text(evil)
    expect(page.locator("#rerank-results .title").filter(has_text="window.hit")).to_have_text(evil)
    assert page.evaluate("window.hit") is None


# ---- compare


def test_compare_marks_what_differs(open_page, picture):
    page = open_page()
    tab(page, "Compare")
    field = page.locator("#compare-models")
    for token in field.locator(".token").all()[::-1]:
        token.locator(".token-remove").click()
    choose(page, "#compare-models", "bm25", "fused", "words")
    page.locator("#compare-query textarea, #compare-query input").fill(ENGLISH)
    page.locator("#compare").click()
    columns = page.locator("#compare-results .column")
    expect(columns).to_have_count(3)
    assert columns.locator("h3").all_inner_texts() == ["bm25", "fused", "words"]
    first = titles(columns.nth(0))
    for column in (columns.nth(1), columns.nth(2)):
        shown = titles(column)
        shared = len(set(first) & set(shown))
        expect(column.locator(".note")).to_contain_text(f"{shared} of 10 in both")
        assert column.locator(".move.new").count() == len(set(shown) - set(first))
    picture(page, "compare")


# ---- rerank


def upload(page, file):
    with page.expect_file_chooser() as chooser:
        page.locator("#rerank-file").click()
    chooser.value.set_files(file)


def test_a_batch_from_a_file_comes_back_as_csv(open_page, picture, tmp_path):
    page = open_page()
    tab(page, "Rerank")
    file = tmp_path / "batch.jsonl"
    documents = ["Paris is the capital of France.", "London is the capital of England.", "The cat sat on the mat."]
    rows = [
        {"query": "What is the capital of France?", "documents": documents},
        {"query": "Where did the cat sit?", "documents": documents},
    ]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    upload(page, file)
    expect(page.locator("#rerank-documents textarea")).to_have_value(file.read_text())
    choose(page, "#rerank-model", "minilm")
    page.locator("#rerank").click()
    expect(page.locator("#rerank-results")).to_contain_text("All 2 queries are done")
    picture(page, "rerank")
    with page.expect_download() as download:
        page.locator("#rerank-save").click()
    with open(download.value.path(), encoding="utf-8-sig", newline="") as saved:
        table = list(csv.DictReader(saved))
    assert [(row["query"][:5], row["rank"]) for row in table] == [
        (q, r) for q in ("What ", "Where") for r in "123"
    ]
    assert [row["text"] for row in table if row["rank"] == "1"] == [documents[0], documents[2]]
    page.locator("#rerank-documents textarea").fill('{"text": "a"}\n{"text')
    page.locator("#rerank").click()
    expect(page.locator("#rerank-results")).to_contain_text("line 2: is not valid JSON")


def test_a_file_is_read_in_its_encoding_and_what_is_no_text_is_refused(open_page, tmp_path):
    page = open_page()
    tab(page, "Rerank")
    shown = page.locator("#rerank-documents textarea")
    file = tmp_path / "documents.txt"
    for mark, encoding in (
        (b"", "utf-8"),
        (b"", "utf-8-sig"),
        (b"", "gb18030"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
    ):
        text = f"{CHINESE} 𠮷\n{encoding}"
        file.write_bytes(mark + text.encode(encoding))
        upload(page, file)
        expect(shown).to_have_value(text)
    said = []

    def answer(dialog):
        said.append(dialog.message)
        dialog.accept()

    page.on("dialog", answer)
    for no_text in ("café au lait".encode("latin-1"), codecs.BOM_UTF16_LE + b"odd"):
        file.write_bytes(no_text)
        with page.expect_event("dialog"):
            upload(page, file)
    assert ["is no text in UTF-8, UTF-16 or GB 18030" in message for message in said] == [True, True]
    expect(shown).to_have_value(text)


# ---- fleet and rollouts


def test_the_fleet_shows_replicas_and_keeps_looking(open_page, picture, fleet):
    page = open_page()
    tab(page, "Fleet")
    row = page.locator("#fleet tr", has_text="minilm")
    expect(row).to_contain_text("1 of 1")
    expect(row).to_contain_text("0.5 CPU")
    expect(page.locator("#fleet")).to_contain_text("minilm: drain time")
    points = page.locator("#fleet figure", has_text="minilm: replicas").locator("polyline")

    def drawn():
        return len((points.get_attribute("points") or "").split()) >= 4

    wait_for(drawn, 30, 0.3, "a fourth point of the chart")
    picture(page, "fleet")
    assert KEY not in page.content()


def test_fleet_answer_counts_calls_and_needs_a_key(fleet):
    assert httpx.get(f"{fleet.url}/v1/fleet", timeout=30).status_code == 401
    fleet.search(ENGLISH, "somebody")

    def counted():
        answer = fleet.client.get("/v1/fleet").json()
        return answer["calls"] and answer["calls"]["answered"] and answer

    answer = wait_for(counted, 60, what="Ray's metrics of a call")
    (gateway,) = [app for app in answer["applications"] if app["kind"] == "gateway"]
    assert gateway["deployments"][0]["running"] == 1
    minilm = answer["variants"]["minilm"]
    assert minilm["pairs"] >= RECALL_K
    assert 0 <= minilm["drain_s"] < 10
    assert answer["nodes"][0]["replicas"] >= 6
    assert not any(secret in json.dumps(answer) for secret in (KEY, ADMIN, "127.0.0.1", "sqlite"))


@pytest.fixture
def rollout(fleet):
    """Waits at half for an operator; is over afterwards."""
    headers = {"Authorization": f"Bearer {ADMIN}"}
    document = {
        "route": "default",
        "stable": "fused",
        "canary": "next",
        "shadow": 1,
        "steps": [
            {"set_weight": 25},
            {"analysis": {"timeout_s": 300}},
            {"set_weight": 50},
            {"pause": {}},
            {"set_weight": 100},
        ],
        "guards": {"error_rate": {"min_samples": 5}, "rbo": {"min_samples": 10, "threshold": 0.5}},
    }
    with httpx.Client(base_url=fleet.url, headers=headers, timeout=30) as client:
        identity = client.post("/v1/rollouts", json=document).json()["id"]
        yield identity

        def over():
            status = client.get(f"/v1/rollouts/{identity}").json()["status"]
            if status in ("rolled_back", "aborted"):
                return True
            client.post(f"/v1/rollouts/{identity}/{'undo' if status == 'promoted' else 'abort'}")
            return False

        wait_for(over, 30, what=f"the end of {identity}")


def test_a_rollout_is_watched_step_by_step_and_promoted(open_page, picture, fleet, rollout):
    page = open_page(height=1200)
    tab(page, "Rollouts")
    expect(page.locator("#rollouts-status")).to_contain_text("need the admin key")
    page.locator("#admin-key input").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#rollouts-status")).to_contain_text("does not know this admin key")
    page.locator("#admin-key input").fill(ADMIN)
    page.keyboard.press("Enter")
    shown = page.locator("#rollout-shown")
    expect(shown).to_contain_text("step 2 of 5 (analysis) at 25 %")
    expect(shown).to_contain_text("inconclusive")
    # The page is only looked at from here on, until the guards have passed.
    for i in range(400):
        fleet.search(f"{ENGLISH} {i % 50}", f"user-{i}")
        if i % 20 == 19 and "step 4 of 5 (pause) at 50 %" in shown.inner_text():
            break
    expect(shown).to_contain_text("step 4 of 5 (pause) at 50 %")
    expect(shown.locator(".history li").first).to_contain_text("paused")
    # Guards that have just begun anew would make a dull picture.
    while WANTS_PICTURES and shown.locator(".guards .state.good").count() < 2:
        fleet.search(f"{ENGLISH} {random.randrange(50)}", f"user-{time.monotonic_ns()}")
    picture(page, "rollouts", full=True)
    page.locator("#rollout-pause").click()
    expect(page.locator("#rollouts-status")).to_contain_text("allowed: resume, promote, abort")
    page.locator("#rollout-promote").click()
    expect(page.locator("#rollouts-status")).to_contain_text("promote: now promoted")
    expect(shown).to_contain_text("next 100 %")
    page.locator("#rollout-undo").click()
    expect(page.locator("#rollouts-status")).to_contain_text("undo: now rolled back")


# ---- narrow screens and keyboards


def test_it_fits_a_screen_of_400_pixels(open_page, picture):
    page = open_page(width=400, height=850)

    def fits():
        assert page.evaluate("document.scrollingElement.scrollWidth") <= 400

    search(page, ENGLISH)
    expect(page.locator("#search-results .column")).to_have_count(2)
    fits()
    picture(page, "narrow")
    for name, something in (
        ("Compare", "#compare-query"),
        ("Rerank", "#rerank-documents"),
        ("Fleet", "#fleet table"),
        ("Rollouts", "#admin-key"),
    ):
        tab(page, name)
        expect(page.locator(something)).to_be_visible()
        fits()


def test_a_search_needs_no_mouse(open_page):
    page = open_page()
    page.locator("#api-key input").focus()
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('#search-query') !== null"):
            break
    page.keyboard.type(ENGLISH)
    page.keyboard.press("Enter")
    expect(page.locator("#search-results .column")).to_have_count(2)
    page.get_by_role("tab", name="Search", exact=True).first.focus()
    for _ in range(3):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent.trim()") == "Compare":
            page.keyboard.press("Enter")
            break
        page.keyboard.press("ArrowRight")
    expect(page.locator("#compare-query")).to_be_visible()
