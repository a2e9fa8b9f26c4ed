"""`serve-app rollout …` against a running fleet, as an operator's shell and a pipeline use it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from serve_app import cli
from serve_app.access import ADMIN_KEY
from tests.rollout.conftest import KEY
from tests.system.conftest import wait_for

SERVE_APP = Path(sys.executable).with_name("serve-app")
ROUTE = "third"
DOCUMENT = f"""
route: {ROUTE}
stable: stable
canary: dies
steps:
- set_weight: 50
- pause: {{}}
- set_weight: 80
- pause: {{}}
"""


@pytest.fixture
def command(fleet, monkeypatch, capsys):
    """Runs `serve-app rollout …` in this process to its end. No rollout of the route is left behind."""

    def run(*arguments, code=0, key=KEY, url=fleet.url):
        with monkeypatch.context() as patch:
            patch.setenv(ADMIN_KEY, key)
            capsys.readouterr()
            ended = cli.main(["rollout", *arguments, "--url", url])
        said = capsys.readouterr()
        assert ended == code, said
        return said.out if code == 0 else said.err

    yield run
    for rollout in fleet.operator.recent(ROUTE):
        action = {"promoted": "undo", "rolled_back": None, "aborted": None}.get(rollout["status"], "abort")
        if action is not None:
            fleet.operator.act(rollout["id"], action)


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "rollout.yaml"
    path.write_text(DOCUMENT)
    return path


def test_an_operator_takes_a_rollout_from_start_to_undo(fleet, command, document):
    started = command("start", str(document))
    rollout = started.split(":")[0]
    assert rollout.startswith(f"{ROUTE}-")
    fleet.operator.wait(rollout, status="paused", step=1)
    shown = command("status", "--route", ROUTE)
    assert f"{rollout}  stable → dies on route {ROUTE}" in shown
    assert "weights  stable 50 %, dies 50 %" in shown
    assert "▶" in shown
    assert "until resumed" in shown
    listed = next(line for line in command("list", "--route", ROUTE).splitlines() if rollout in line)
    assert "paused in step 2 of 4 (pause) at 50 %" in listed

    command("resume", "--route", ROUTE)
    fleet.operator.wait(rollout, status="paused", step=3)
    assert "allowed: resume, promote, abort" in command("pause", rollout, code=1)
    assert "promoted at 100 %" in command("promote", rollout)
    assert json.loads(command("status", rollout, "--json"))["status"] == "promoted"
    assert "rolled back at 0 %" in command("undo", "--route", ROUTE)

    history = command("history", rollout)
    for text in ("started by", "50 % of the calls are the canary's", "resumed by an operator", "undone by an"):
        assert text in history
    entries = json.loads(command("history", rollout, "--json"))["history"]
    assert entries[-1]["to_status"] == "rolled back at 0 %"


@pytest.mark.parametrize(("action", "code"), [("promote", 0), ("abort", 1)])
def test_watching_ends_with_the_rollout_and_tells_a_pipeline_how(fleet, command, document, action, code):
    rollout = command("start", str(document)).split(":")[0]
    environment = {**os.environ, "SERVE_APP_URL": fleet.url, ADMIN_KEY: KEY}
    watching = subprocess.Popen(
        [SERVE_APP, "rollout", "status", rollout, "--watch"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        fleet.operator.wait(rollout, status="paused", step=1)
        assert fleet.operator.act(rollout, action).status_code == 200
        assert watching.wait(30) == code
    finally:
        watching.kill()
        said = watching.communicate()[0]
    assert f"{'promoted' if action == 'promote' else 'aborted'}" in said.splitlines()[-1]
    assert f"{action}" in said.splitlines()[-1]


def test_what_is_wrong_is_said_in_words(fleet, command, document, tmp_path):
    assert f"{ADMIN_KEY} is not set" in command("list", key="", code=1)
    assert "is not the key that the gateway was started with" in command("list", key="wrong", code=1)
    assert "no answer from http://127.0.0.1:1" in command("list", url="http://127.0.0.1:1", code=1)
    assert "there is no rollout" in command("status", "nobody-knows", code=1)
    assert "rollout yet" in command("abort", "--route", "no-such-route", code=1)
    bad = tmp_path / "bad.yaml"
    bad.write_text(DOCUMENT + "guards: {speed: {}}\n")
    assert "'speed' is no metric" in command("start", str(bad), code=2)
    assert "No such file" in command("start", str(tmp_path / "missing.yaml"), code=2)
    unknown = tmp_path / "unknown.yaml"
    unknown.write_text(DOCUMENT.replace("canary: dies", "canary: newest"))
    assert "canary is 'newest', which is no pipeline" in command("start", str(unknown), code=1)


def test_a_watcher_survives_a_gateway_that_is_away_for_a_while(fleet, command, document):
    """What the controller's death shows: 503, then the rollout again."""
    rollout = command("start", str(document)).split(":")[0]
    fleet.operator.wait(rollout, status="paused", step=1)
    (pid,) = fleet.replica_pids("rollouts", "Rollout").values()
    environment = {**os.environ, "SERVE_APP_URL": fleet.url, ADMIN_KEY: KEY}
    watching = subprocess.Popen(
        [SERVE_APP, "rollout", "status", rollout, "--watch"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert watching.stdout is not None
        assert "paused" in watching.stdout.readline()
        os.kill(pid, 9)
        wait_for(lambda: fleet.operator.act(rollout, "promote").status_code == 200, 90, what="a controller again")
        assert watching.wait(60) == 0
    finally:
        watching.kill()
        watching.communicate()
    wait_for(lambda: fleet.statuses()["rollouts"] == "RUNNING", 60, what="rollouts RUNNING")
