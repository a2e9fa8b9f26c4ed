"""A fleet in a process of its own, as `serve-app up` would run it: its environment, one API key, metrics.

`python -m bench.fleet CONFIG` serves a config (JSON) until its stdin ends; `fleet` runs that.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from serve_app.access import API_KEYS
from serve_app.launch import ENVIRONMENT, FAST

ROOT = Path(__file__).parents[1]
_KEY = "a-key-of-the-benchmark"
HEADERS = {"Authorization": f"Bearer {_KEY}"}


def config(settings: dict[str, Any], *applications: dict[str, Any]) -> dict[str, Any]:
    """A gateway with `settings`, and other applications, on a free port."""
    from tests.ports import free_port

    gateway = {
        "name": "gateway",
        "import_path": "serve_app.gateway:build",
        "route_prefix": "/",
        "deployments": [{"name": "Gateway", "user_config": settings}],
    }
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": free_port()},
        "applications": [gateway, *applications],
    }


def catalogue(index: Path) -> dict[str, Any]:
    """The recall application `catalogue` over `index`."""
    return {
        "name": "catalogue",
        "import_path": "serve_app.recall:build",
        "route_prefix": None,
        "args": {"index": str(index)},
    }


@contextlib.contextmanager
def fleet(served: dict[str, Any], *, fast: bool = True) -> Iterator[str]:
    """Where it listens. `fast`: with HAProxy, as where there are keys; else with Serve's own proxy."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.fleet", json.dumps(served)],
        env={**os.environ, **ENVIRONMENT, **(FAST if fast else {}), API_KEYS: f"bench:{_KEY}", "PYTHONPATH": path},
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if not any(line.strip() == "ready" for line in process.stdout):
            raise RuntimeError(f"the fleet did not start: exit {process.wait()}")
        yield f"http://127.0.0.1:{served['http_options']['port']}"
    finally:
        process.stdin.close()
        end(process)


def end(process: "subprocess.Popen[Any]") -> None:
    """Waits for a process that has been told to stop."""
    try:
        process.wait(90)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main() -> None:
    from tests.system.conftest import System, serving

    system = System(json.loads(sys.argv[1]))
    system.client.headers.update(HEADERS)
    with serving(system):
        print("ready", flush=True)
        sys.stdin.read()
        # Nothing to drain, which Serve takes half a minute for.
        processes = psutil.Process().children(recursive=True)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, 10)
        os._exit(0)


if __name__ == "__main__":
    main()
