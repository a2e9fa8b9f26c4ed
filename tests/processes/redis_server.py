"""A real Redis server for tests (`scripts/install-tools.sh` installs one)."""

import ctypes
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.ports import free_port


class RedisServer:
    """A server of the test's own, with its files in `folder`."""

    def __init__(self, folder: Path, *settings: str) -> None:
        self.port = free_port()
        own = {"--port": str(self.port), "--bind": "127.0.0.1", "--dir": str(folder), "--save": ""}
        self.settings = [*(word for setting in own.items() for word in setting), *settings]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            ["redis-server", *self.settings], stdout=subprocess.DEVNULL, preexec_fn=die_with_the_tests
        )
        deadline = time.monotonic() + 60
        while True:
            try:
                with socket.create_connection(("127.0.0.1", self.port), 1) as connection:
                    connection.sendall(b"PING\r\n")
                    # Or that it wants a password.
                    if connection.recv(100).startswith((b"+PONG", b"-NOAUTH")):
                        return
            except OSError:
                pass
            assert self.process.poll() is None
            assert time.monotonic() < deadline, "redis-server did not start"
            time.sleep(0.02)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def die_with_the_tests() -> None:
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def needs_redis() -> None:
    if not shutil.which("redis-server"):
        pytest.skip("redis-server is not installed (scripts/install-tools.sh)")
