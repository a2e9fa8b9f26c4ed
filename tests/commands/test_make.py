"""The two commands of a newcomer, and what they say when something is missing."""

import os
import re
import signal
import socket
import subprocess
import time
import uuid
from pathlib import Path

import psutil
import pytest
import yaml

from tests.ports import free_port

ROOT = Path(__file__).parents[2]
MARK = "SERVE_APP_TEST_MARK"


class Serving:
    """`make serve`, or another command, as a terminal starts it, in a process group of its own; found by a mark in
    its environment."""

    def __init__(self, log: Path, port: int, *command: str, **environment: str) -> None:
        self.log, self.mark = log, uuid.uuid4().hex
        self.process = subprocess.Popen(
            command or ["make", "serve", f"PORT={port}"],
            cwd=ROOT,
            env={**os.environ, **environment, MARK: self.mark},
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait_ready(self) -> str:
        """The ready line."""
        give_up_at = time.monotonic() + 300
        while time.monotonic() < give_up_at:
            ready = re.search(r"^serve-app: ready on .*$", self.log.read_text(), re.M)
            if ready:
                return ready.group()
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.5)
        raise AssertionError(self.log.read_text())

    def family(self) -> list[psutil.Process]:
        """Every process that descends from the command, also those that it lost sight of."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def clean_up(self) -> None:
        for process in self.family():
            process.kill()
        self.process.wait(30)


def interrupt(serving, port):
    os.killpg(serving.process.pid, signal.SIGINT)


def terminate(serving, port):
    serving.process.terminate()


def make_stop(serving, port):
    stopped = subprocess.run(
        ["make", "stop", f"PORT={port}"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert f"stopped what served on port {port}\n" in stopped.stdout, stopped


def kill_ray(serving, port):
    next(process for process in serving.family() if process.name() == "raylet").kill()


def bm25_alone(folder):
    """configs/local.yaml without its model, for what has nothing to do with it: that starts in half the time."""
    config = yaml.safe_load((ROOT / "configs" / "local.yaml").read_text())
    config["applications"] = [app for app in config["applications"] if app["name"] != "minilm"]
    settings = config["applications"][0]["deployments"][0]["user_config"]
    del settings["variants"], settings["pipelines"]["fused"]
    settings["routes"]["default"]["weights"] = {"bm25": 100}
    path = folder / "bm25.yaml"
    path.write_text(yaml.safe_dump(config))
    return {"CONFIG": str(path)}


def test_make_serve_answers_the_call_it_shows_and_leaves_nothing_behind(tmp_path):
    """tests/commands/test_make_without_model.py has the other ways to end."""
    check_serving(tmp_path, interrupt, make_stop)


def check_serving(tmp_path, *stops):
    """Two side by side, each ended in another way; what `make stop` ends has a model."""
    subprocess.run(["make", "index"], cwd=ROOT, check=True, capture_output=True, timeout=600)
    servings = []
    try:
        for stop in stops:
            environment = {} if stop is make_stop else bm25_alone(tmp_path)
            port = free_port()
            servings.append((Serving(tmp_path / stop.__name__, port, **environment), port))
        # Both first: who starts takes the other's cores, and a call has a deadline.
        lines = [serving.wait_ready() for serving, _ in servings]
        for (serving, _), line, stop in zip(servings, lines, stops, strict=True):
            curl = line.partition("try: ")[2]
            assert curl.startswith("curl ")
            answer = subprocess.run(curl, shell=True, capture_output=True, text=True, timeout=60)
            assert answer.returncode == 0, answer
            assert ('"rerank_score":0.' in answer.stdout) is (stop is make_stop)
            assert '"recall_score":' in answer.stdout
            assert '"degraded"' not in answer.stdout
            names = {process.name() for process in serving.family()}
            assert {"raylet", "gcs_server"} <= names
        for i, ((serving, port), stop) in enumerate(zip(servings, stops, strict=True)):
            stop(serving, port)
            serving.process.wait(120)
            psutil.wait_procs(serving.family(), timeout=10)
            left = [" ".join(process.cmdline())[:200] for process in serving.family()]
            assert not left
            assert "Traceback" not in serving.log.read_text()
            if stop is not kill_ray:
                assert "failed" not in serving.log.read_text().partition("serve-app: stopping")[2]
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", port))
            assert all(other.process.poll() is None for other, _ in servings[i + 1 :])
    finally:
        for serving, _ in servings:
            serving.clean_up()


def test_make_serve_takes_a_config_with_a_blank_in_its_name(tmp_path):
    for name, text in (("scripts/setup.sh", ""), (".venv/bin/serve-app", "printf '%s\\n' \"$@\"")):
        command = tmp_path / name
        command.parent.mkdir(parents=True)
        command.write_text(f"#!/bin/sh\n{text}\n")
        command.chmod(0o755)
    serve = [
        "make",
        "--no-print-directory",
        "-f",
        ROOT / "Makefile",
        "serve",
        "GPU=",
        "CONFIG=my config.yaml",
        "PORT=8080",
    ]
    served = subprocess.run(serve, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert served.stdout.endswith("up\nmy config.yaml\n--port\n8080\n")


@pytest.mark.parametrize("made", [(".venv",), (".venv-gpu",), (".venv", ".venv-gpu"), ()])
def test_make_stop_needs_only_one_of_the_environments(tmp_path, made):
    for name in made:
        command = tmp_path / name / "bin" / "serve-app"
        command.parent.mkdir(parents=True)
        command.write_text('#!/bin/sh\necho "$@"\n')
        command.chmod(0o755)
    stop = ["make", "--no-print-directory", "-f", ROOT / "Makefile", "stop", "PORT=8080"]
    stopped = subprocess.run(stop, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert stopped.stdout == ("down --port 8080\n" if made else "")
