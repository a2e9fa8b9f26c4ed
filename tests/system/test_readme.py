"""Every command in the README is run, here or in tests/commands, and prints what the page says it prints."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from serve_app.gateway.errors import CODES
from tests.system.conftest import ROOT

README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```console\n(.*?)^```", README, re.S | re.M)

# `make serve` is run by tests/commands; the other needs GPUs, and its config is checked below.
ELSEWHERE = {"make serve", "make serve GPU=1 CONFIG=configs/fleet.yaml"}


def commands():
    for block in BLOCKS:
        for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
            command, _, output = part.partition("\n")
            if command not in ELSEWHERE:
                yield command, output


@pytest.mark.parametrize(("command", "shown"), list(commands()), ids=lambda value: value[:40])
def test_a_command_prints_what_the_readme_shows(system, command, shown):
    environment = {
        **os.environ,
        "SERVE_APP_URL": system.url,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = command.replace("http://127.0.0.1:8000", system.url)
    done = subprocess.run(
        command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done
    printed = done.stdout if command.startswith("curl") else done.stderr + done.stdout
    if shown.startswith("{"):
        assert keys(json.loads(printed)) == keys(json.loads(shown))
    elif shown:
        assert words(printed) == words(shown)


def keys(value):
    """The shape of a JSON value: names, not what they hold; of a list, its first entry."""
    if isinstance(value, dict):
        return {name: keys(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [keys(value[0])] if value else []
    return None


def words(text):
    """The words of all lines in any order, without numbers (times, scores) and progress bars."""
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip() and "%|" not in line]
    return sorted(word for line in lines for word in re.findall(r"[A-Za-z][\w-]+", line))


def test_the_readmes_fleet_config_is_valid():
    from serve_app.configfile import load

    load(ROOT / "configs/fleet.yaml")


def test_the_readmes_example_config_is_valid(tmp_path):
    from serve_app.configfile import load

    (example,) = re.findall(r"^```yaml\n(.*?)^```", README, re.S | re.M)
    path = tmp_path / "config.yaml"
    path.write_text(example)
    assert set(load(path).rerankers) == {"small", "large"}


def test_the_readmes_error_table_is_the_gateways():
    rows = re.findall(r"^\| (\d{3}) \| `(\w+)` \|", README, re.M)
    assert {code: int(status) for status, code in rows} == {code: status for code, (status, _) in CODES.items()}
    assert len(rows) == len(CODES)
