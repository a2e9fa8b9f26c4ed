"""The setup scripts: what they say when something is missing, where they install from, and where they don't."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("name", ["my shop", "it's", 'a"b', "(1)", "a&b", "a;b", "a$b", "a`b", "a\\b"])
def test_a_folder_that_ray_could_not_start_from_is_one_clear_line(tmp_path, name):
    folder = tmp_path / name
    answer = setup(folder)
    assert answer.returncode == 1
    said = f"setup: Ray can't start from {folder}/project: the path has a blank, .*; move the folder to .*\n"
    assert re.fullmatch(said.replace(str(folder), re.escape(str(folder))), answer.stderr), answer
    assert not (folder / "project" / ".venv").exists()


def test_a_folder_with_chinese_letters_is_none_of_these(tmp_path):
    answer = setup(tmp_path / "商店", PATH=tools(tmp_path))
    assert "needs Python 3.11 to 3.13" in answer.stderr


@pytest.mark.parametrize(
    ("made_in", "is_kept"), [("project/.venv", True), ("before/.venv", False), ("elsewhere", True)]
)
def test_an_environment_that_was_moved_is_made_anew(tmp_path, made_in, is_kept):
    """Its commands name the Python there; those of one that is elsewhere and linked to are right."""
    environment = tmp_path / "project" / ".venv"
    if made_in == "elsewhere":
        (tmp_path / "project").mkdir()
        (tmp_path / "elsewhere").mkdir()
        environment.symlink_to(tmp_path / "elsewhere")
    (environment / "bin").mkdir(parents=True)
    for name, text in (("python", "#!/bin/sh\n"), ("pip", f"#!{tmp_path}/{made_in}/bin/python\n")):
        (environment / "bin" / name).write_text(text)
        (environment / "bin" / name).chmod(0o755)
    sources = ("pyproject.toml", "constraints/gpu.txt", "scripts/setup.sh", "scripts/packages.sh")
    wanted = hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in sources)).hexdigest()[:16]
    (environment / ".made-for-run").write_text(f"gpu {wanted}\n")
    answer = setup(tmp_path, "gpu", CC="/nowhere/cc", PATH=tools(tmp_path), PYTHON=sys.executable)
    assert (answer.returncode == 0) is is_kept, answer
    assert ("needs a C compiler" in answer.stderr) is not is_kept


def install_tools(tmp_path, candidate):
    """scripts/install-tools.sh for root, where nothing is there and apt-get has this chromium: what it says, and
    what was installed."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("bash", "grep", "mktemp", "rm", "tail"):
        (folder / tool).symlink_to(shutil.which(tool))
    asked = tmp_path / "asked"
    for name, does in {
        "id": "echo 0",
        "apt-get": f'echo "$*" >>{asked}',
        "apt-cache": f"echo 'chromium:\n  Candidate: {candidate}'",
    }.items():
        (folder / name).write_text(f"#!{shutil.which('bash')}\n{does}\n")
        (folder / name).chmod(0o755)
    answer = subprocess.run(
        ["bash", ROOT / "scripts" / "install-tools.sh"],
        env={"PATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    update, install = asked.read_text().splitlines()
    assert update == "update"
    return answer, install.partition("--no-install-recommends ")[2]


def test_on_debian_all_tools_are_installed(tmp_path):
    answer, installed = install_tools(tmp_path, "156.0.8078.79-1~deb12u1")
    assert (answer.returncode, answer.stderr) == (0, "")
    assert installed == "redis-server prometheus fonts-wqy-microhei chromium"


def test_where_chromium_is_no_package_the_other_tools_are_installed_and_it_is_said(tmp_path):
    answer, installed = install_tools(tmp_path, "(none)")
    assert installed == "redis-server prometheus fonts-wqy-microhei"
    assert answer.returncode == 1
    assert re.fullmatch(r"install-tools: apt-get has no chromium .*: put a chromium on PATH, .*\n", answer.stderr)


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
