"""What a rollout costs: the split, in microseconds a call, and mirroring, in the latency of live calls.

    python -m bench.rollout [--rounds N]

The split is timed as the gateway runs it on a call's way: naming the plan with a live split, against naming it
without any. Mirroring is timed over HTTP at half of what the fleet answers at most; blocks with and without a
tenth of the calls mirrored alternate. It is done twice: with rerankers that wait instead of computing, as those
with a GPU of their own do for the gateway, and with MiniLM on the CPU, where the canary takes stable's cores.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import yaml

from bench.common import Spread, closed_loop, machine, open_loop, percentile, save, show
from serve_app.config import GatewaySettings
from serve_app.gateway.plan import resolve
from serve_app.gateway.rollouts import Rollouts
from serve_app.rollout.messages import Splits
from serve_app.rollout.split import Split

ROOT = Path(__file__).parents[1]
_CALLS = 20_000
_BLOCK_S = 10.0
# What a call takes in a reranker that waits.
_TAKES_MS = 40


def split_cost(rounds: int) -> dict[str, Spread]:
    """Microseconds a call, by case."""
    config = yaml.safe_load((ROOT / "configs" / "canary.yaml").read_text())
    settings = GatewaySettings.model_validate(config["applications"][0]["deployments"][0]["user_config"])
    users = [f"user-{i}" for i in range(_CALLS)]
    live = Split("default-20260101-000000-abcd", "default", "fused", "next", 25.0, 0.1)
    older = [
        Split(f"older-{i}", "default", stable, canary, 100.0, live=False)
        for i, (stable, canary) in enumerate([("fused", "careless"), ("careless", "next")])
    ]
    newest = Split("newest", "default", "next", "fused", 25.0, 0.1)
    tables = {"no rollout": (), "a rollout": (live,), "a rollout after two promoted ones": (*older, newest)}
    cases = [(name, who) for name in tables for who in ("a user", "no user")]
    took: dict[str, list[float]] = {f"{name}, {who}": [] for name, who in cases}
    counted: list[float] = []
    rollouts = Rollouts(lambda app, method, *arguments, timeout_s: asyncio.sleep(0))
    for _ in range(rounds):
        for name, who in cases:
            rollouts._splits = Splits({"default": tables[name]})
            began = time.perf_counter()
            for user in users:
                resolve(settings, None, None, user if who == "a user" else None, rollouts.of)
            took[f"{name}, {who}"].append((time.perf_counter() - began) / _CALLS * 1e6)
        plan = resolve(settings, "default", None, "user-1", lambda route: (live,))
        assert plan.place is not None
        scores = [random.random() for _ in range(10)]
        began = time.perf_counter()
        for user in users:
            rollouts.answered(plan.place, user, 0.05, scores=scores, searched=True)
        counted.append((time.perf_counter() - began) / _CALLS * 1e6)
        rollouts._searches.clear()
    costs = {name: Spread.of(values) for name, values in took.items()}
    costs["counting an answered call"] = Spread.of(counted)
    return costs


def mirror_cost(rounds: int, own_hardware: bool) -> dict[str, Any]:
    """Live p50 and p95 in ms with and without mirroring, block by block, and their ratios by round."""
    from serve_app.access import ADMIN_KEY
    from serve_app.launch import ENVIRONMENT
    from serve_app.recall.builder import build_index
    from tests.ports import free_port
    from tests.system.conftest import System, serving, wait_for

    os.environ.update(ENVIRONMENT)
    os.environ[ADMIN_KEY] = key = "bench"
    # Replicas import the rerankers that wait.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    config = yaml.safe_load((ROOT / "configs" / "canary.yaml").read_text())
    for pipeline in config["applications"][0]["deployments"][0]["user_config"]["pipelines"].values():
        pipeline["recall_k"] = 5
    if own_hardware:
        path = "tests.rollout.scorers:build"
        waiting = {"import_path": path, "route_prefix": None, "args": {"takes_ms": _TAKES_MS}}
        config["applications"] = [
            {"name": application["name"], **waiting} if application["name"].startswith("minilm") else application
            for application in config["applications"]
        ]
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder) / "index"
        build_index(ROOT / "examples" / "catalog.jsonl", index)
        config["http_options"]["port"] = free_port()
        for application in config["applications"]:
            if application["name"] == "catalogue":
                application["args"]["index"] = str(index)
            if application["name"] == "rollouts":
                application["args"]["store"] = f"sqlite://{folder}/rollouts.sqlite3"
        with serving(System(config)) as system:
            url = f"{system.url}/v1/search"
            operator = httpx.Client(base_url=system.url, headers={"Authorization": f"Bearer {key}"}, timeout=30)
            asyncio.run(closed_loop(url, _searches(), clients=16, seconds=5))
            calls, seconds = asyncio.run(closed_loop(url, _searches(), clients=16, seconds=10))
            most = len(calls) / seconds
            rate = most / 2
            blocks: dict[str, list[list[float]]] = {"off": [], "on": []}
            mirrored = 0
            for i in range(rounds):
                for mode in ("off", "on") if i % 2 else ("on", "off"):
                    rollout = None
                    if mode == "on":
                        document = {
                            "route": "default",
                            "stable": "fused",
                            "canary": "next",
                            "shadow": 0.1,
                            "steps": [{"pause": {}}],
                            "guards": {"error_rate": {}},
                        }
                        started = operator.post("/v1/rollouts", json=document)
                        assert started.status_code == 200, started.text
                        rollout = started.json()["id"]
                        path = f"/v1/rollouts/{rollout}"
                        wait_for(lambda path=path: operator.get(path).json()["status"] == "paused", 60)
                        # The split reaches the gateway within its second.
                        asyncio.run(open_loop(url, _searches(), rate, 3))
                    # The same crowds in both blocks of a round, or their chance would be most of the difference.
                    blocks[mode].append(asyncio.run(open_loop(url, _searches(), rate, _BLOCK_S, seed=i)))
                    if rollout is not None:
                        time.sleep(1.5)
                        shown = operator.get(f"/v1/rollouts/{rollout}").json()
                        mirrored += shown["figures"]["canary"]["mirrored"]
                        operator.post(f"/v1/rollouts/{rollout}/abort")
    result: dict[str, Any] = {"most_calls_per_s": most, "calls_per_s": rate, "mirrored": mirrored}
    for part, share in (("p50", 0.5), ("p95", 0.95)):
        by_round = {mode: [percentile(block, share) * 1e3 for block in found] for mode, found in blocks.items()}
        whole = {mode: percentile([t for block in found for t in block], share) for mode, found in blocks.items()}
        result[part] = {
            **{mode: Spread.of(values) for mode, values in by_round.items()},
            "ratio": Spread.of(on / off for on, off in zip(by_round["on"], by_round["off"], strict=True)),
            "ratio_of_all": whole["on"] / whole["off"],
        }
    return result


def _searches() -> Iterator[dict[str, Any]]:
    """Bodies of searches; a number at the end keeps them from being the same."""
    lines = (ROOT / "examples" / "queries.jsonl").read_text().splitlines()
    texts = [query["text"] for query in map(json.loads, lines) if query["lang"] == "en"]
    for i in itertools.count(random.randrange(10**6)):
        yield {"query": f"{random.choice(texts)} {i}", "user": f"user-{random.randrange(400)}"}


def run(rounds: int, canaries: Sequence[bool]) -> dict[str, Any]:
    """`canaries`: those whose mirrored calls are timed, by whether they have hardware of their own."""
    costs = split_cost(rounds)
    show(
        "The split, µs a call",
        ["", "median (least to most)"],
        [[name, spread.text()] for name, spread in costs.items()],
    )
    result: dict[str, Any] = {"split_us": costs}
    for own_hardware in canaries:
        name = "hardware of its own" if own_hardware else "stable's cores"
        found = result[f"mirroring to {name}"] = mirror_cost(rounds, own_hardware)
        show(
            f"A tenth mirrored to a canary on {name}, {found['calls_per_s']:.0f} calls/s (half of the most)",
            ["", "off", "on", "on / off by round", "on / off of all calls"],
            [
                [
                    f"live {part}, ms",
                    *(found[part][mode].text() for mode in ("off", "on", "ratio")),
                    f"{found[part]['ratio_of_all']:.2f}",
                ]
                for part in ("p50", "p95")
            ],
        )
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description="What a rollout costs.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--own-hardware", action="store_true", help="leave out mirroring on stable's cores")
    arguments = parser.parse_args()
    print(json.dumps(machine()))
    print(save("rollout", run(arguments.rounds, (True,) if arguments.own_hardware else (True, False))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
