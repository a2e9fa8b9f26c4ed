"""Operators' commands over HTTP, events, and a rollout application that dies in between."""

import os
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from serve_app.rollout.store import Search, open_store
from tests.rollout.conftest import Load
from tests.system.conftest import wait_for

ROUTE = "third"
# Waits until an operator goes on.
HALF = [{"set_weight": 50}, {"pause": {}}, {"set_weight": 100}]


@pytest.fixture
def start(fleet):
    """Starts rollouts on the route; none is left behind."""
    begun = []

    def start(**document):
        begun.append(fleet.operator.start(**{"route": ROUTE, "stable": "stable", "canary": "dies", **document}))
        return begun[-1]

    yield start
    for rollout in reversed(begun):

        def over(rollout=rollout):
            status = fleet.operator.show(rollout)["status"]
            if status in ("rolled_back", "aborted"):
                return True
            fleet.operator.act(rollout, "undo" if status == "promoted" else "abort")
            return False

        wait_for(over, 30, what=f"the end of {rollout}")


def refused(answer, *says):
    assert answer.status_code == 409, answer.text
    message = answer.json()["error"]["message"]
    for text in says:
        assert text in message, message


def sides(fleet, n=32):
    """How many of `n` users each pipeline gets, whoever answers in its stead."""

    def pipeline(i):
        meta = fleet.search(route=ROUTE, user=f"u{i}")["meta"]
        return "for a canary" if meta["why"] == "fallback" else meta["pipeline"]

    with ThreadPoolExecutor(8) as threads:
        return Counter(threads.map(pipeline, range(n)))


def wait_for_sides(fleet, *pipelines):
    # The same twice: weights may reach the gateway in between.
    return wait_for(
        lambda: (seen := sides(fleet)).keys() == set(pipelines) and sides(fleet) == seen and seen,
        15,
        0.1,
        f"{pipelines}",
    )


def test_commands_move_a_rollout_and_are_refused_where_they_do_not_fit(fleet, start):
    operator = fleet.operator
    rollout = start(steps=[{"set_weight": 50}, {"pause": {"duration_s": 600}}, {"set_weight": 60}, {"pause": {}}])
    paused = operator.wait(rollout, status="paused", step=1)
    assert paused["weight"] == 50
    assert 590 < paused["until"] - time.time() < 601
    wait_for_sides(fleet, "stable", "dies")
    refused(operator.act(rollout, "undo"), "paused", "pause, resume, promote, abort")
    assert operator.act(rollout, "pause").json()["until"] is None
    refused(operator.act(rollout, "pause"), "paused in step 2 of 4 (pause) at 50 %", ": resume, promote, abort")

    resumed = operator.act(rollout, "resume")
    assert resumed.status_code == 200
    # It may have gone on already.
    assert resumed.json()["step"] in (2, 3)
    assert operator.wait(rollout, status="paused", step=3)["weight"] == 60

    promoted = operator.act(rollout, "promote")
    assert promoted.status_code == 200
    assert (promoted.json()["status"], promoted.json()["weight"]) == ("promoted", 100)
    wait_for_sides(fleet, "dies")
    for action in ("pause", "resume", "promote", "abort"):
        refused(operator.act(rollout, action), "promoted at 100 %", "allowed: undo")

    assert operator.act(rollout, "undo").json()["status"] == "rolled_back"
    wait_for_sides(fleet, "stable")
    for action in ("pause", "resume", "promote", "abort", "undo"):
        refused(operator.act(rollout, action), "rolled back at 0 %", "nothing: start another")
    reasons = [entry["reason"] for entry in operator.history(rollout)]
    assert reasons[0] == "started by tests"
    assert "resumed by an operator (tests)" in reasons
    assert reasons[-1] == "undone by an operator (tests)"


def test_abort_gives_stable_the_route_back_at_once(fleet, start):
    rollout = start(steps=HALF)
    fleet.operator.wait(rollout, status="paused")
    wait_for_sides(fleet, "stable", "dies")
    aborted = fleet.operator.act(rollout, "abort")
    at = time.monotonic()
    assert (aborted.json()["status"], aborted.json()["weight"]) == ("aborted", 0)
    wait_for_sides(fleet, "stable")
    print(f"stable alone {time.monotonic() - at:.2f} s after the abort")


def test_a_route_has_one_rollout_at_a_time(fleet, start):
    rollout = start(steps=HALF)
    second = {"route": ROUTE, "stable": "stable", "canary": "shuffles", "steps": HALF}
    refused(fleet.operator.client.post("/v1/rollouts", json=second), repr(ROUTE), rollout, "promote or abort")
    listed = fleet.operator.recent(ROUTE)
    assert [one["id"] for one in listed if one["status"] not in ("rolled_back", "aborted")] == [rollout]


def test_a_rollout_can_only_take_calls_from_a_pipeline_that_gets_some(fleet, start):
    first = start(steps=HALF)
    fleet.operator.wait(first, status="paused")
    assert fleet.operator.act(first, "promote").status_code == 200
    wait_for_sides(fleet, "dies")
    document = {"route": ROUTE, "stable": "stable", "canary": "shuffles", "steps": HALF}
    refused(fleet.operator.client.post("/v1/rollouts", json=document), "gets no calls", "those go to dies")
    second = start(stable="dies", canary="slow", steps=HALF)
    fleet.operator.wait(second, status="paused")
    wait_for_sides(fleet, "dies", "slow")


def test_what_cannot_start_says_why(fleet):
    def post(**document):
        return fleet.operator.client.post("/v1/rollouts", json={"route": ROUTE, "stable": "stable", **document})

    refused(post(canary="shuffle"), "canary is 'shuffle'", "did you mean 'shuffles'", "serve deploy FILE")
    refused(post(canary="slow", stable="hangs"), "stable is 'hangs', which gets no calls of route 'third'")
    refused(post(canary="slow", route="fourth"), "route is 'fourth'", "known: default, second, third")
    answer = post(canary="slow", guards={"speed": {}})
    assert answer.status_code == 400
    assert "'speed' is no metric" in answer.json()["message"]


def test_operators_need_the_key(fleet):
    answer = fleet.client.get("/v1/rollouts")
    assert answer.status_code == 401
    assert fleet.client.post("/v1/rollouts", json={"route": ROUTE}).status_code == 401
    wrong = {"Authorization": "Bearer wrong"}
    assert fleet.client.post("/v1/rollouts/any/abort", headers=wrong).status_code == 401
    assert fleet.operator.act("any", "abort").status_code == 404
    assert fleet.operator.act("any", "stop").status_code == 404
    assert fleet.operator.client.get("/v1/rollouts/any").status_code == 404
    assert fleet.operator.client.get("/v1/rollouts/any/history").status_code == 404


def test_a_call_may_name_a_pipeline(fleet, start):
    rollout = start(steps=HALF)
    fleet.operator.wait(rollout, status="paused")
    for name in ("stable", "dies"):
        for i in range(5):
            meta = fleet.search(model=name, user=f"u{i}")["meta"]
            assert (meta["pipeline"], meta["why"]) == (name, "forced")
            assert "rollout" not in meta


def test_score_calls_do_not_pay_for_a_canary(fleet, start):
    start(canary="raises", steps=HALF)
    body = {"model": ROUTE, "text_1": "tea", "text_2": ["tea", "a cup of tea", "coffee"]}

    def answered_for_the_canary():
        answer = fleet.client.post("/v1/score", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["meta"]["why"] == "fallback"

    wait_for(answered_for_the_canary, 30, 0.01, "a score call that the canary fails")


def test_events_of_answered_searches_count_once(fleet, start):
    rollout = start(steps=HALF, guards={"ctr_at_1": {"min_samples": 10}})
    fleet.operator.wait(rollout, status="paused")
    answers = wait_for(
        lambda: [a for i in range(20) if "rollout" in (a := fleet.search(route=ROUTE, user=f"u{i}"))["meta"]],
        15,
        0.1,
        "answers of the rollout",
    )
    roles = Counter(answer["meta"]["rollout"]["role"] for answer in answers)
    impressions = [event(answer["id"], "impression") for answer in answers]
    # Sooner than the gateway tells of its searches, and not sent again by who sent them.
    send(fleet, *impressions)
    store = open_store(fleet.store)
    wait_for(
        lambda: sum(c.impressions for c in store.event_counts(rollout)) == len(answers), 30, what="impressions"
    )
    again = send(fleet, *impressions)
    assert (again["counted"], again["repeated"], again["unknown"]) == (0, len(answers), 0)
    query = answers[0]["id"]
    first = send(
        fleet,
        event(query, "click", 1, event_id=f"{query}-click"),
        event(query, "click", 3),
        event("nobody-searched-this", "click", 1),
        event(query, "hover"),
    )
    assert first == {"counted": 2, "repeated": 0, "unknown": 1, "ignored": 1}
    assert send(fleet, event(query, "click", 1, event_id=f"{query}-click"))["repeated"] == 1
    refused_body = fleet.client.post("/v1/events", json={"events": [{"action_name": "click"}]})
    assert refused_body.status_code == 400

    counts = store.event_counts(rollout)
    assert (
        Counter({c.role: 0 for c in counts}) + sum((Counter({c.role: c.impressions}) for c in counts), Counter())
        == roles
    )
    assert sum(c.clicks for c in counts) == 2
    assert sum(c.by_rank[1] for c in counts) == 1


def test_a_canary_that_is_clicked_less_is_rolled_back(fleet, start):
    rollout = start(steps=[{"set_weight": 50}, {"analysis": {}}], guards={"ctr_at_1": {"min_samples": 100}})
    fleet.operator.wait(rollout, status="step", step=1)
    # Clicks of a minute are judged two minutes later, so these searches were some minutes ago.
    now = time.time()
    searches = [
        Search(f"{rollout}-{role}-{minutes}-{i}", rollout, role, now - 60 * minutes)
        for role in ("stable", "canary")
        for minutes in (6, 5, 4)
        for i in range(60)
    ]
    open_store(fleet.store).add_searches(searches)
    clicked = {"stable": 30, "canary": 6}
    events = [event(search.query_id, "impression") for search in searches]
    events += [
        event(search.query_id, "click", 1)
        for search in searches
        if int(search.query_id.rpartition("-")[2]) < clicked[search.role]
    ]
    assert send(fleet, *events)["counted"] == len(events)
    shown = {guard["metric"]: guard for guard in fleet.operator.show(rollout)["guards"]}["ctr_at_1"]
    assert (shown["stable"], shown["canary"], shown["canary_samples"]) == (0.5, 0.1, 180)
    with Load(fleet.url, ROUTE, rate=20) as load:
        found = fleet.operator.wait(rollout, limit_s=30, status="rolled_back")
    load.check_no_client_paid()
    *_, last = fleet.operator.history(rollout)
    assert "ctr_at_1 fails: click-through at 1 is 0.100 on the canary" in last["reason"]
    print(f"rolled back {found['since'] - now:.1f} s after the clicks: {last['reason']}")


def test_weights_outlive_the_rollout_application_and_the_rollout_goes_on(fleet, start):
    rollout = start(steps=[*HALF[:2], {"set_weight": 60}, {"pause": {}}])
    fleet.operator.wait(rollout, status="paused", step=1)
    before = wait_for_sides(fleet, "stable", "dies")
    (pid,) = fleet.replica_pids("rollouts", "Rollout").values()
    with Load(fleet.url, ROUTE, rate=30) as load:
        os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        looks = 0
        while True:
            assert sides(fleet) == before
            looks += 1
            try:
                shown = fleet.operator.client.get(f"/v1/rollouts/{rollout}", timeout=2)
            except httpx.TimeoutException:
                continue
            assert shown.status_code in (200, 503)
            if shown.status_code == 200:
                break
            assert time.monotonic() - killed < 90
        back_s = time.monotonic() - killed
        assert (shown.json()["status"], shown.json()["step"], shown.json()["weight"]) == ("paused", 1, 50)
        # The lease of the dead controller has to run out before another one acts.
        wait_for(lambda: fleet.operator.act(rollout, "resume").status_code != 503, 30, what="a controller")
        assert fleet.operator.wait(rollout, status="paused", step=3)["weight"] == 60
        wait_for(
            lambda: all(side["calls"] for side in fleet.operator.show(rollout)["figures"].values()),
            30,
            what="calls that are counted again",
        )
    load.check_no_client_paid()
    print(f"the application was back after {back_s:.1f} s, in which the split was looked at {looks} times")
    states = [entry["to_status"] for entry in fleet.operator.history(rollout)]
    assert len(states) == len(set(states)), states
    wait_for(lambda: fleet.statuses()["rollouts"] == "RUNNING", 60, what="rollouts RUNNING")


def event(query, action, position=None, event_id=None):
    made = {"action_name": action, "query_id": query, "event_id": event_id or f"{query}-{action}-{position}"}
    if position is not None:
        made["event_attributes"] = {"position": {"ordinal": position}}
    return made


def send(fleet, *events):
    answer = fleet.client.post("/v1/events", json={"events": events})
    assert answer.status_code == 200, answer.text
    return answer.json()
