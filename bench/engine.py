"""Ways to drive vLLM's engine, measured in turns: pairs a second from ready-made token ids, on a model that is all
overhead and on one that computes.

    python -m bench.engine [--rounds 5] [--shape tiny]
"""

import argparse
import asyncio
import itertools
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bench.common import Spread, machine, percentile, save, saved, show
from serve_app.config import RerankerArgs
from serve_app.reranker.engine import Engine, cpu_has_bf16, prepare_environment
from serve_app.reranker.engine_args import engine_settings
from serve_app.reranker.model import resolve
from serve_app.reranker.prompt import Prompt
from tests import models

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
    },
    "25m": {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
}
WAYS = {
    "bare": "LLM.encode, one list of all calls",
    "public": "B: AsyncLLM.encode for each pair",
    "async": "C: batches to the core, apart",
    "inprocess": "E: batches to the core, in process",
}
# Pairs of a call.
PAIRS = {"tiny": 200, "25m": 50}
AT_ONCE, SECONDS = (1, 8), 1.5
_HEAD, _QUERY, _DOCUMENT, _SUFFIX = 62, 8, 35, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: all; results of others stay")
    args = parser.parse_args()
    result = run(args.rounds, args.shape or tuple(SHAPES))
    for shape, found in result["pairs_per_s"].items():
        _show(shape, found["ways"])
    print(save("engine", with_kept(result, saved("engine"))))


def run(rounds: int, shapes: Sequence[str] = tuple(SHAPES)) -> dict[str, Any]:
    """Every way in a process of its own, all of them loaded, and one at a time working."""
    with tempfile.TemporaryDirectory() as folder:
        return {
            "pairs_per_s": {
                shape: {"machine": machine(), "rounds": rounds, "ways": _compare(Path(folder), shape, rounds)}
                for shape in shapes
            }
        }


def with_kept(result: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """Shapes that weren't measured this time stay, with the machine and the rounds of their own run."""
    kept = {
        # Shapes had no machine of their own once: theirs is the file's.
        shape: found
        if "ways" in found
        else {"machine": before["machine"], "rounds": before["rounds"], "ways": found}
        for shape, found in before.get("pairs_per_s", {}).items()
    }
    return {**result, "pairs_per_s": kept | result["pairs_per_s"]}


def _show(shape: str, ways: dict[str, Any]) -> None:
    heads = [
        "way",
        *(f"{n} x {PAIRS[shape]} pairs" for n in AT_ONCE),
        "of bare",
        "loop's lag, p99 ms",
    ]
    rows = []
    for way, found in ways.items():
        shares = zip(found["rates"], ways["bare"]["rates"], strict=True)
        rows.append(
            [
                WAYS[way],
                *(spread.text(4) for spread in found["rates"]),
                " / ".join(f"{mine.median / bare.median:.2f}" for mine, bare in shares),
                f"{found['lag_p99_ms']:.1f}",
            ]
        )
    show(f"{shape}, pairs a second", heads, rows)


def _compare(root: Path, shape: str, rounds: int) -> dict[str, Any]:
    folder = models.qwen3_without_weights(root / shape, **SHAPES[shape])
    spawn = multiprocessing.get_context("spawn")
    workers: dict[str, tuple[Any, Connection]] = {}
    rates: dict[str, list[list[float]]] = {way: [[] for _ in AT_ONCE] for way in WAYS}
    lags: dict[str, list[float]] = {way: [] for way in WAYS}
    try:
        for way in WAYS:
            here, there = spawn.Pipe()
            process = spawn.Process(target=_work, args=(way, str(folder), PAIRS[shape], there))
            process.start()
            workers[way] = process, here
        for _, here in workers.values():
            receive(here)
        names = list(WAYS)
        for n, (i, calls) in itertools.product(range(rounds), enumerate(AT_ONCE)):
            # Another begins each round.
            for way in names[n % len(names) :] + names[: n % len(names)]:
                workers[way][1].send(calls)
                rate, lag_ms = receive(workers[way][1])
                rates[way][i].append(rate)
                lags[way].append(lag_ms)
    finally:
        for process, pipe in workers.values():
            pipe.close()
            process.join(30)
            process.kill()
    return {
        way: {
            "rates": [Spread.of(found) for found in rates[way]],
            "lag_p99_ms": statistics.median(lags[way]),
        }
        for way in WAYS
    }


def receive(pipe: Connection) -> Any:
    if not pipe.poll(240):
        raise TimeoutError("a worker says nothing for 240 s")
    answer = pipe.recv()
    if isinstance(answer, Exception):
        raise answer
    return answer


def _work(way: str, folder: str, pairs: int, pipe: Connection) -> None:
    prepare_environment(os.cpu_count() or 1)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    args = RerankerArgs(
        model=folder, kind="qwen3-reranker", engine={"max_model_len": 1024, "load_format": "dummy"}
    )
    model = resolve(args)
    settings = engine_settings(args, model, "cpu", 0, cpu_has_bf16())
    random.seed(way)
    if way == "bare":
        measure, close = _bare(settings, pairs)
    else:
        measure, close = _ours(way, settings, pairs)
    measure(1)
    pipe.send("ready")
    try:
        while True:
            pipe.send(measure(pipe.recv()))
    except EOFError:
        close()


def _bare(settings: dict[str, Any], pairs: int) -> tuple[Callable[[int], tuple[float, float]], Callable[[], None]]:
    from vllm import LLM, PoolingParams, TokensPrompt

    llm = LLM(**settings)
    params = PoolingParams(task="classify", use_activation=False)

    def measure(calls: int) -> tuple[float, float]:
        done = took = 0.0
        while took < SECONDS:
            batch = [TokensPrompt(prompt_token_ids=p.ids) for _ in range(calls) for p in _prompts(pairs)]
            began = time.perf_counter()
            answered = llm.encode(batch, params, pooling_task="classify", use_tqdm=False)
            took += time.perf_counter() - began
            done += len(answered)
        return done / took, 0.0

    return measure, lambda: None


def _ours(
    way: str, settings: dict[str, Any], pairs: int
) -> tuple[Callable[[int], tuple[float, float]], Callable[[], None]]:
    from serve_app.reranker.async_engine import AsyncEngine
    from serve_app.reranker.inprocess_engine import InProcessEngine
    from serve_app.reranker.public_engine import PublicEngine

    kinds: dict[str, Any] = {
        "public": PublicEngine,
        "async": AsyncEngine,
        "inprocess": InProcessEngine,
    }
    engine: Engine = kinds[way](settings, "classify")
    runner = asyncio.Runner()

    async def batch(calls: int) -> tuple[float, list[float]]:
        given = [_prompts(pairs) for _ in range(calls)]
        lags: list[float] = []
        probe = asyncio.create_task(_probe(lags))
        began = time.perf_counter()
        await asyncio.gather(*map(engine.pool, given))
        took = time.perf_counter() - began
        probe.cancel()
        return took, lags

    def measure(calls: int) -> tuple[float, float]:
        done, took, lags = 0, 0.0, [0.0]
        while took < SECONDS:
            seconds, more = runner.run(batch(calls))
            took, done, lags = took + seconds, done + calls * pairs, lags + more
        return done / took, percentile(lags, 0.99) * 1000

    return measure, engine.close


async def _probe(lags: list[float]) -> None:
    """How late the loop comes to what is due."""
    while True:
        due = time.perf_counter() + 0.005
        await asyncio.sleep(0.005)
        lags.append(time.perf_counter() - due)


_ids: Iterator[int] = iter(lambda: random.randrange(5, 1000), None)
_head = list(itertools.islice(_ids, _HEAD))


def _prompts(count: int) -> list[Prompt]:
    """A call's: the same head as all calls', a query of its own, and documents that weren't seen before."""
    head = _head + list(itertools.islice(_ids, _QUERY))
    return [Prompt(head + list(itertools.islice(_ids, _DOCUMENT + _SUFFIX))) for _ in range(count)]


if __name__ == "__main__":
    main()
