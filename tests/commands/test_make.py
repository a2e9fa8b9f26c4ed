"""The two commands of a newcomer, and what they say when something is missing."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

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


@pytest.mark.parametrize("stops", [(interrupt, terminate), (make_stop, kill_ray)])
def test_make_serve_answers_the_call_it_shows_and_leaves_nothing_behind(tmp_path, stops):
    """Two side by side, each ended in another way."""
    subprocess.run(["make", "index"], cwd=ROOT, check=True, capture_output=True, timeout=600)
    servings = [(Serving(tmp_path / stop.__name__, port := free_port()), port) for stop in stops]
    try:
        # Both first: who starts takes the other's cores, and a call has a deadline.
        lines = [serving.wait_ready() for serving, _ in servings]
        for (serving, _), line in zip(servings, lines, strict=True):
            curl = line.partition("try: ")[2]
            assert curl.startswith("curl ")
            answer = subprocess.run(curl, shell=True, capture_output=True, text=True, timeout=60)
            assert answer.returncode == 0, answer
            assert '"rerank_score":0.' in answer.stdout
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


def setup(tmp_path, device="cpu", **environment):
    """scripts/setup.sh of a copy of the project's packaging files, making an environment of its own."""
    project = tmp_path / "project"
    for name in ("scripts", "constraints"):
        shutil.copytree(ROOT / name, project / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project / name)
    (project / "serve_app").mkdir()
    return subprocess.run(
        ["bash", "scripts/setup.sh", ".venv", device, "run"],
        cwd=project,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def tools(tmp_path):
    """For PATH: what the script needs but Python and compilers."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("bash", "cat", "cut", "dirname", "grep", "sha256sum"):
        (folder / tool).symlink_to(shutil.which(tool))
    return str(folder)


def test_a_missing_interpreter_is_one_clear_line(tmp_path):
    answer = setup(tmp_path, PATH=tools(tmp_path))
    assert answer.returncode == 1
    assert re.fullmatch(r"setup: needs Python 3\.11 to 3\.13 and found none; .*\n", answer.stderr), answer


def test_a_missing_compiler_is_said_before_the_gpu_build_is_installed(tmp_path):
    answer = setup(tmp_path, "gpu", CC="/nowhere/cc", PATH=tools(tmp_path), PYTHON=sys.executable)
    assert answer.returncode == 1
    assert re.fullmatch(r"setup: the GPU build needs a C compiler and .*Python\.h; .*\n", answer.stderr), answer


def test_a_missing_network_is_one_clear_line(tmp_path):
    nowhere = "http://127.0.0.1:9/"
    answer = setup(
        tmp_path,
        PIP_CONFIG_FILE=os.devnull,
        PIP_INDEX_URL=nowhere,
        PIP_FIND_LINKS="",
        PIP_EXTRA_INDEX_URL="",
        PIP_RETRIES="0",
        PIP_NO_CACHE_DIR="1",
        TORCH_INDEX=nowhere,
    )
    assert answer.returncode == 1
    assert "is the network up?" in answer.stderr
    assert "Traceback" not in answer.stderr


def sourced(tmp_path, settings, script):
    """What `script` prints after scripts/packages.sh, where pip has these settings; pip says what it is asked, and
    uv fails."""
    folder = tmp_path / "venv" / "bin"
    folder.mkdir(parents=True)
    (tmp_path / "settings").write_text(settings)
    pip = f'case "$*" in *list) cat {tmp_path}/settings ;; *) echo "$@" ;; esac'
    for name, what in (("python", pip), ("uv", "exit 1")):
        (folder / name).write_text(f"#!/bin/sh\n{what}\n")
        (folder / name).chmod(0o755)
    return subprocess.run(
        ["bash", "-euc", f". scripts/packages.sh\n{script}"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "venv": str(tmp_path / "venv"), "UV_HTTP_TIMEOUT": "7"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout


def test_uv_is_set_as_pip_is(tmp_path):
    settings = """:env:.find-links='/wheels /more'
global.default-timeout='180'
global.extra-index-url='\\nhttps://a/simple\\nhttps://b/simple'
global.find-links='/others'
global.index-url='https://mirror/simple'
install.index-url='https://installs/simple'
"""
    found = dict(line.split("=", 1) for line in sourced(tmp_path, settings, "env | grep ^UV_").splitlines())
    del found["UV_CACHE_DIR"]
    assert found == {
        "UV_DEFAULT_INDEX": "https://installs/simple",
        "UV_INDEX": "https://a/simple https://b/simple",
        "UV_FIND_LINKS": "/wheels,/more",
        "UV_HTTP_TIMEOUT": "7",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }


def test_what_uv_cannot_install_is_pips(tmp_path):
    sourced(tmp_path, "", "install --no-deps some==1.0")
    assert (tmp_path / "venv" / "install.log").read_text().endswith(" --no-compile --no-deps some==1.0\n")
