"""`serve-app up` and its like where something is missing or wrong: one clear line."""

import os
import re
import socket
import subprocess
from pathlib import Path

import pytest

from tests.ports import free_port

ROOT = Path(__file__).parents[2]


@pytest.fixture
def port():
    return free_port()


def serve_app(*arguments, **kwargs):
    command = [str(ROOT / ".venv/bin/serve-app"), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180, **kwargs)


def test_a_taken_port_is_one_clear_line():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        answer = serve_app("up", "configs/local.yaml", "--port", port)
    assert answer.returncode == 1
    assert re.fullmatch(rf"serve-app: port {port} on 127\.0\.0\.1 cannot be used .*\n", answer.stderr), answer


def test_a_taken_port_of_haproxys_is_named_with_its_setting(port):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        taken = holder.getsockname()[1]
        environment = {
            "SERVE_APP_API_KEYS": "shop:0123456789abcdef",
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(taken),
        }
        answer = serve_app("up", "configs/local.yaml", "--port", port, env={**os.environ, **environment})
    assert answer.returncode == 1
    said = rf"serve-app: port {taken} on 0\.0\.0\.0 cannot be used .*, or set RAY_SERVE_HAPROXY_STATS_PORT .*\n"
    assert re.fullmatch(said, answer.stderr), answer


def test_a_missing_index_says_how_to_build_it(tmp_path, port):
    config = tmp_path / "config.yaml"
    config.write_text((ROOT / "configs/local.yaml").read_text().replace(".run/index/catalog", "/nowhere"))
    answer = serve_app("up", config, "--port", port)
    assert answer.returncode == 1
    assert "serve-app index build --input FILE --index /nowhere" in answer.stderr


def test_a_broken_config_is_refused_before_anything_starts(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text((ROOT / "configs/local.yaml").read_text().replace("variant: minilm", "variant: minilmm"))
    for command in ("check", "up"):
        answer = serve_app(command, config)
        assert answer.returncode == 2
        assert "did you mean 'minilm'?" in answer.stderr
        assert "Traceback" not in answer.stderr


def test_a_model_that_cannot_start_ends_the_command_with_the_reason(tmp_path, port):
    config = tmp_path / "config.yaml"
    text = (ROOT / "configs/local.yaml").read_text()
    config.write_text(re.sub(r"sha256: \w+", "sha256: " + "f" * 64, text))
    serve_app("index", "build", "--input", "examples/catalog.jsonl", "--index", ".run/index/catalog")
    answer = serve_app("up", config, "--port", port)
    assert answer.returncode == 1
    assert "minilm did not start" in answer.stderr
    assert "expected ffff" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_fleet_without_its_gpus_is_refused_with_the_numbers(port):
    serve_app("index", "build", "--input", "examples/catalog.jsonl", "--index", ".run/index/catalog")
    answer = serve_app("up", "configs/fleet.yaml", "--port", port, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert answer.returncode == 1
    assert "asks for 1.75 GPUs" in answer.stderr
    assert "this machine has 0" in answer.stderr


def test_a_call_without_a_gateway_says_so(port):
    answer = serve_app("search", "shoes", "--url", f"http://127.0.0.1:{port}")
    assert answer.returncode == 1
    assert "is it up?" in answer.stderr
    assert answer.stderr.count("\n") == 1
