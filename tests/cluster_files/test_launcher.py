"""The files for Ray's cluster launcher, as Ray itself checks them before it starts anything."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from serve_app.configfile import load
from serve_app.launch import ENVIRONMENT, FAST, least_resources
from tests.cluster_files.conftest import ROOT

FILES = sorted((ROOT / "cluster" / "ray").glob("*.yaml"))


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def launcher(request: pytest.FixtureRequest) -> dict[str, Any]:
    prepared: dict[str, Any] = prepare_config(yaml.safe_load(request.param.read_text()))
    validate_config(prepared)
    return prepared


def test_ray_takes_the_file_and_starts_with_the_environment(launcher: dict[str, Any]) -> None:
    for commands in (launcher["head_start_ray_commands"], launcher["worker_start_ray_commands"]):
        (command,) = commands
        assert command.index(". cluster/ray/environment") < command.index("ray start")
        subprocess.run(["bash", "-n", "-c", command], check=True, timeout=10)
    assert "--num-cpus=0" in launcher["head_start_ray_commands"][0]


@pytest.mark.parametrize(
    "path", [*FILES, ROOT / "configs" / "fleet.yaml", ROOT / "README.md"], ids=lambda path: path.stem
)
def test_the_config_that_is_deployed_listens_for_other_machines(path: Path, tmp_path: Path) -> None:
    (command,) = re.findall(r"sed .* > \.run/fleet\.yaml", path.read_text())
    (tmp_path / ".run").mkdir()
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True, timeout=10)
    made, source = load(tmp_path / ".run" / "fleet.yaml"), load(ROOT / "configs" / "fleet.yaml")
    assert made.host == "0.0.0.0"
    assert made.applications == source.applications
    assert "serve deploy .run/fleet.yaml" in path.read_text()


def test_the_autoscaler_on_aws_has_boto3_and_no_other_python_does(launcher: dict[str, Any]) -> None:
    commands = [command for command in launcher.get("head_setup_commands", []) if "boto3" in command]
    is_aws = launcher["provider"]["type"] == "aws"
    assert commands == (["serve-app/.venv/bin/pip install -q boto3"] if is_aws else [])


def test_aws_has_room_for_the_fleet() -> None:
    types = yaml.safe_load((ROOT / "cluster" / "ray" / "aws.yaml").read_text())["available_node_types"]
    needed = least_resources(load(ROOT / "configs" / "fleet.yaml"))
    there = {
        kind: sum(t.get("min_workers", 0) * t["resources"].get(kind, 0) for t in types.values())
        for kind in ("CPU", "GPU")
    }
    assert there["CPU"] >= needed["num_cpus"]
    assert there["GPU"] >= needed["num_gpus"]


def test_the_environment_is_serves_and_asks_for_a_token() -> None:
    command = f"cd {ROOT} && env -i PATH=/usr/bin:/bin bash -c '. cluster/ray/environment && env'"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=10)
    environment = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert {**ENVIRONMENT, **FAST, "RAY_AUTH_MODE": "token"}.items() <= environment.items()
    assert environment["SERVE_APP_API_KEYS_FILE"] == f"{ROOT}/keys.yaml"
    assert environment["PATH"].startswith(f"{ROOT}/.venv/bin:")
