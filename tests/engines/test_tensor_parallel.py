"""Scores over two workers equal those of one; on the CPU, where the head is divided as on GPUs."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCORE = """
import asyncio, json, sys
from serve_app.config import RerankerArgs
from serve_app.reranker.engine import prepare_environment, start

def main():
    prepare_environment(1)
    from serve_app.reranker.deployment import prompt_builder
    from serve_app.reranker.engine_args import engine_settings
    from serve_app.reranker.messages import ScoreRequest
    from serve_app.reranker.model import resolve
    from serve_app.reranker.share import check_head_rows
    from serve_app.reranker.tokens import load_tokenizer
    from tests.models import SENTENCES

    workers = int(sys.argv[2])
    engine = {"max_model_len": 1024, "dtype": "float32", "tensor_parallel_size": workers}
    args = RerankerArgs(model=sys.argv[1], kind="qwen3-reranker", engine=engine)
    model = resolve(args)
    tokenizer = load_tokenizer(args, model)
    check_head_rows(args, model, tokenizer.backend_tokenizer.token_to_id, workers)
    running = start(engine_settings(args, model, "cpu", 0), "classify")
    built = prompt_builder(args, tokenizer, 1024).build(ScoreRequest("wireless headphones", SENTENCES))
    pooled = asyncio.run(running.pool(built.prompts))
    print("LOGITS", json.dumps(pooled.vectors[:, 0].tolist()))
    running.close()

if __name__ == "__main__":
    main()
"""


def logits(workers: int, tmp_path: Path, model: Path) -> list[float]:
    script = tmp_path / "score.py"
    script.write_text(SCORE)
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, str(script), str(model), str(workers)],
        capture_output=True, text=True, timeout=540, env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("LOGITS ")]
    read: list[float] = json.loads(line.removeprefix("LOGITS "))
    return read


@pytest.mark.timeout(1200)
def test_two_workers_score_as_one(tmp_path: Path, model_dir: Callable[[str], Path]) -> None:
    one, two = (logits(workers, tmp_path, model_dir("qwen")) for workers in (1, 2))
    worst = max(abs(a - b) for a, b in zip(one, two, strict=True))
    print(f"\n{len(one)} pairs: largest logit difference {worst:.1e}")
    assert max(one) - min(one) > 2
    assert two == pytest.approx(one, abs=1e-4)
