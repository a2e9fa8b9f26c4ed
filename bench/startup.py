"""How long a CPU replica takes from the decision to start it until it answers, and what takes it.

    python -m bench.startup [--rounds N]

Each round deploys MiniLM, and the shape of Qwen3-Reranker-0.6B with dummy weights, on a running Serve, and deletes
it again. The clock runs from the deploy call until Serve calls the application RUNNING, asked every 50 ms.
"""

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.common import Spread, save, show
from bench.fleet import config
from tests import models

# Published dimensions (config.json of Qwen/Qwen3-Reranker-0.6B).
QWEN3_06B = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
_REPORT = re.compile(r"Scores with .* after ([\d.]+) s, of which the engine took ([\d.]+)\.")


def run(rounds: int) -> dict[str, Any]:
    from tests.system.conftest import MINILM, System, reranker, serving

    settings = {"variants": {}, "pipelines": {"rerank": {}}, "routes": {"default": {"weights": {"rerank": 100}}}}
    with tempfile.TemporaryDirectory() as folder:
        shape = models.qwen3_without_weights(Path(folder) / "qwen3-0.6b", **QWEN3_06B)
        variants = {
            "MiniLM": reranker("variant", MINILM),
            "0.6B shape, dummy weights": reranker(
                "variant",
                {
                    "model": str(shape),
                    "kind": "qwen3-reranker",
                    "engine": {"max_model_len": 1024, "load_format": "dummy"},
                },
            ),
        }
        phases: dict[str, dict[str, list[float]]] = {name: {} for name in variants}
        alone = config(settings)
        with serving(System(alone)) as system:
            for _ in range(rounds):
                for name, variant in variants.items():
                    began, at = time.monotonic(), time.time()
                    system.deploy({**alone, "applications": [*alone["applications"], variant]})
                    _wait(lambda: system.statuses().get("variant"), "RUNNING")
                    took = time.monotonic() - began
                    built, engine = _reported(since=at)
                    of = {
                        "in all": took,
                        "process, Ray and imports": took - built,
                        "engine": engine,
                        "model files, tokenizer, first call": built - engine,
                    }
                    for phase, seconds in of.items():
                        phases[name].setdefault(phase, []).append(seconds)
                    system.deploy(alone)
                    _wait(lambda: system.statuses().get("variant"), None)
    result = {
        name: {phase: Spread.of(took) for phase, took in measured.items()} for name, measured in phases.items()
    }
    show(
        "Seconds from the decision to start a replica until it answers",
        ["", *next(iter(result.values()))],
        [[name, *(spread.text() for spread in measured.values())] for name, measured in result.items()],
    )
    return result


def _wait(status: Any, wanted: str | None) -> None:
    give_up_at = time.monotonic() + 120
    while (found := status()) != wanted:
        if found == "DEPLOY_FAILED" or time.monotonic() > give_up_at:
            raise RuntimeError(f"the variant is {found}, not {wanted}")
        time.sleep(0.05)


def _reported(since: float) -> tuple[float, float]:
    """Seconds that the newest replica's constructor and its engine took, as its log says."""
    import ray

    folder = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs" / "serve"
    for path in _newest_first(folder, since):
        if found := _REPORT.search(path.read_text()):
            return float(found[1]), float(found[2])
    raise RuntimeError(f"no replica reported its start in {folder}")


def _newest_first(folder: Path, since: float) -> Iterator[Path]:
    paths = [path for path in folder.glob("replica_variant_Reranker_*.log") if path.stat().st_mtime >= since]
    yield from sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="How long a replica takes to start.")
    parser.add_argument("--rounds", type=int, default=5)
    print(save("startup", run(parser.parse_args().rounds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
