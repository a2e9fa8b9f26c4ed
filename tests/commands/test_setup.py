"""The setup scripts: what they say when something is missing, and where they install from."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


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


def test_an_environment_that_was_cut_short_is_made_anew(tmp_path):
    """As by Ctrl-C, when it has a Python and no pip; the installation then needs a network."""
    project = tmp_path / "project"
    (project / ".venv" / "bin").mkdir(parents=True)
    (project / ".venv" / "bin" / "python").symlink_to("/nowhere/python")
    nowhere = "http://127.0.0.1:9/"
    without_network = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": ""}
    answer = setup(
        tmp_path,
        PIP_INDEX_URL=nowhere,
        TORCH_INDEX=nowhere,
        PIP_RETRIES="0",
        PIP_NO_CACHE_DIR="1",
        **without_network,
    )
    assert "is the network up?" in answer.stderr
    python = str(project / ".venv" / "bin" / "python")
    assert subprocess.run([python, "-m", "pip", "--version"], capture_output=True, timeout=60).returncode == 0


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
