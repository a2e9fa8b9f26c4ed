"""`make bench`: what a CPU can measure in some twenty minutes, one table a question; JSON and charts in
bench/results/. Larger models and indexes are the modules' own arguments; `engine`, `startup` and
`rollout` are run by themselves.

python -m bench [NAME ...]
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from bench.charts import draw
from bench.common import RESULTS, machine

# The question that each answers, and its arguments.
BENCHMARKS = {
    "peers": ("Reranking over HTTP beside other servers", ["--shape", "tiny"]),
    "gateway": ("What the gateway adds", []),
    "cache": ("What the score cache saves", []),
    "chunks": ("Chunks on two replicas", []),
    "recall": ("BM25 recall beside other engines", ["--documents", "100000"]),
    "cascade": ("What a cascade costs and loses", ["--queries", "24"]),
}
ROOT = Path(__file__).parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description="Every benchmark that a CPU can run.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)} (default: all)")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(BENCHMARKS):
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}; known: {', '.join(BENCHMARKS)}")
    print(json.dumps(machine(), indent=2), flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    began, failed = time.monotonic(), []
    for name in arguments.names or BENCHMARKS:
        question, options = BENCHMARKS[name]
        started = time.monotonic()
        print(f"\n== {name}: {question}", flush=True)
        # A process each: engines and Ray read their environment once. What they log would bury the tables.
        log = RESULTS / f"{name}.log"
        with log.open("w") as file:
            done = subprocess.run(
                [sys.executable, "-m", f"bench.{name}", *options],
                cwd=ROOT,
                env={**os.environ, "VLLM_LOGGING_STREAM": "ext://sys.stderr"},
                stderr=file,
            )
        if done.returncode:
            failed.append(name)
            print("".join(log.read_text().splitlines(keepends=True)[-20:]) + f"the whole log: {log}")
        print(f"== {name}: {time.monotonic() - started:.0f} s", flush=True)
    for path in draw(RESULTS):
        print(path)
    print(
        f"{(time.monotonic() - began) / 60:.1f} minutes in all"
        + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
