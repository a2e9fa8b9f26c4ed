"""What constraints/gpu.txt pins; that it resolves only an index can say, and its header has the command."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "constraints" / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def test_the_gpu_build_is_resolved_for_a_torch_that_has_cuda() -> None:
    gpu = pins("gpu.txt")
    # torch's CPU build names none of these, and was once what the file was resolved with.
    assert {"torch", "triton", "nvidia-cudnn-cu13", "nvidia-nccl-cu13", "nvidia-cublas"} <= set(gpu)
    toolkit = re.match(r"\d+\.\d+", gpu["cuda-toolkit"])
    assert toolkit is not None
    # A newer compiler than the headers breaks what is compiled when an engine starts.
    for part in ("cuda-nvcc", "cuda-crt", "cuda-nvrtc", "cuda-runtime", "nvvm"):
        assert gpu[f"nvidia-{part}"].startswith(toolkit[0])
