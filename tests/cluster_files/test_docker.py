"""The Dockerfile, as far as it can be judged without building it."""

import os
import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.cluster_files.conftest import ROOT

DOCKER = ROOT / "cluster" / "docker"
BUILD_TOOLS = (
    "gcc",
    "g++",
    "cc",
    "make",
    "cmake",
    "build-essential",
    "git",
    "libc6-dev",
    "ninja-build",
    "rustc",
    "cargo",
)


def stages() -> dict[str, tuple[str, list[str]]]:
    """By name, what each starts from and its instructions."""
    text = (DOCKER / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    found: dict[str, tuple[str, list[str]]] = {}
    for instruction in "\n".join(lines).replace("\\\n", " ").splitlines():
        if match := re.fullmatch(r"FROM (\S+) AS (\S+)", instruction):
            found[match[2]] = match[1], []
        elif found and instruction.strip():
            found[list(found)[-1]][1].append(" ".join(instruction.split()))
    return found


def layers(target: str) -> list[str]:
    """The instructions that the target's image consists of."""
    start, instructions = stages()[target]
    return [*(layers(start) if start in stages() else []), *instructions]


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_no_build_tools_in_the_last_layers_and_no_root(target: str) -> None:
    installed = [word for line in layers(target) if line.startswith("RUN") for word in line.split()]
    assert not set(installed) & set(BUILD_TOOLS)
    assert not any("setup.sh" in line or "pip " in line for line in layers(target))
    assert [line for line in layers(target) if line.startswith("USER")] == ["USER 1000:1000"]


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_a_container_sees_no_gpu_that_it_was_not_given(target: str) -> None:
    assert not [line for line in layers(target) if "NVIDIA_VISIBLE_DEVICES" in line]


def test_what_is_copied_is_there_and_reaches_the_build() -> None:
    ignored = (DOCKER / "Dockerfile.dockerignore").read_text().split()
    let_in = [line.removeprefix("!") for line in ignored if line.startswith("!")]
    for _, instructions in stages().values():
        for line in instructions:
            if line.startswith("COPY") and "--from" not in line:
                for source in line.split()[1:-1]:
                    assert (ROOT / source).exists(), source
                    assert any(fnmatch(source, pattern) for pattern in let_in), source


def test_what_the_setup_needs_is_copied() -> None:
    copied = [source for _, lines in stages().values() for line in lines for source in line.split()[1:-1]]
    needed = re.findall(r"^\. (\S+)$", (ROOT / "scripts/setup.sh").read_text(), re.M)
    assert needed
    assert not set(needed) - set(copied)


def test_tritons_driver_is_handed_out_and_nothing_else_compiled(tmp_path: Path) -> None:
    compiler = tmp_path / "triton-cc"
    compiler.write_bytes((DOCKER / "triton-cc").read_bytes())
    compiler.chmod(0o755)
    assert os.access(DOCKER / "triton-cc", os.X_OK)
    (tmp_path / "cuda_utils.so").write_text("compiled before")
    made = tmp_path / "made.so"
    # As Triton calls it.
    asked = [
        "/x/triton/backends/nvidia/driver.c",
        "-O3",
        "-shared",
        "-fPIC",
        "-Wno-psabi",
        "-o",
        made,
        "-l:libcuda.so.1",
    ]
    subprocess.run([compiler, *asked], check=True, timeout=10)
    assert made.read_text() == "compiled before"
    refused = subprocess.run([compiler, "/x/kernel.c", "-o", made], capture_output=True, text=True, timeout=10)
    assert refused.returncode == 1
    assert "this image has no compiler, and /x/kernel.c is not Triton's driver.c" in refused.stderr
