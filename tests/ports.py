"""Ports for servers of tests and benchmarks."""

import random
import socket

# Below the ports of outgoing connections, of which one could take a port before its server does, and between those
# that Ray takes for its workers and for replicas.
_FROM, _TO = 20_000, 29_999
# Two test processes that were forked apart must not draw the same.
_random = random.SystemRandom()


def free_port() -> int:
    """A port of 127.0.0.1 on which nobody listens."""
    while True:
        port = _random.randint(_FROM, _TO)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
