"""What bench.gpu runs on the card, in processes of its own that it can end.

    python -m bench.gpu_process ceiling     matrix multiplications of the models' own shapes
    python -m bench.gpu_process replica     one engine with its share of the card

Both read lines of JSON from standard input and answer each with one. A `problem` in an answer is the last.
"""

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.gpu_work import CALLS_AT_ONCE, PAIRS_A_CALL, calls, gemm_flops, gemms
from serve_app.config import RerankerArgs
from serve_app.reranker.engine import Engine, cpu_has_bf16, device, prepare_environment, start
from serve_app.reranker.engine_args import engine_settings
from serve_app.reranker.gpu import STOP_LIMIT_S, Card, turn, visible_cards, wait_for_memory
from serve_app.reranker.memory import CONTEXT_BYTES
from serve_app.reranker.model import Model
from serve_app.reranker.prompt import Prompt

Read = Callable[[], dict[str, Any] | None]
Answer = Callable[[dict[str, Any]], None]

_ROUNDS, _ROUND_S = 5, 0.05


def ceiling(read: Read, answer: Answer) -> None:
    """Each question names a number format, and is answered with FLOP/s by model, none where the card hasn't that
    format: a layer's multiplications over `tokens` tokens, the median of interleaved rounds."""
    while (asked := read()) is not None:
        import torch

        kind = "cuda" if torch.cuda.is_available() else "cpu"
        known = asked["number"] == "bf16" or (kind == "cuda" and torch.cuda.get_device_capability() >= (8, 9))
        card = torch.cuda.get_device_name() if kind == "cuda" else "none"
        rates = _rates(torch, kind, asked) if known else {}
        answer({"flops_per_s": rates, "card": card, "torch": torch.__version__})


def _rates(torch: Any, kind: str, asked: dict[str, Any]) -> dict[str, float]:
    works = {
        (name, shape): _multiplication(torch, kind, asked["number"], shape, asked["tokens"])
        for name, config in asked["configs"].items()
        for shape in gemms(config)
    }
    seconds: dict[Any, list[float]] = {key: [] for key in works}
    for _ in range(_ROUNDS):
        for key, work in works.items():
            seconds[key].append(_seconds(torch, kind, work))
    rates = {}
    for name, config in asked["configs"].items():
        shapes = gemms(config)
        flops = sum(gemm_flops(shape, asked["tokens"]) for shape in shapes)
        rates[name] = flops / sum(sorted(seconds[name, shape])[_ROUNDS // 2] for shape in shapes)
    return rates


def _multiplication(torch: Any, kind: str, number: str, shape: tuple[int, int], tokens: int) -> Callable[[], Any]:
    outputs, inputs = shape
    left = torch.randn(tokens, inputs, device=kind, dtype=torch.bfloat16)
    right = torch.randn(outputs, inputs, device=kind, dtype=torch.bfloat16).t()
    if number == "bf16":
        return lambda: left @ right
    left, right = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn)
    one = torch.ones((), device=kind)
    # vLLM's kernels sum up as fast.
    return lambda: torch._scaled_mm(
        left, right, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _seconds(torch: Any, kind: str, work: Callable[[], Any]) -> float:
    """Of one call, over as many as fill a round; the first one chooses kernels and isn't counted."""
    wait = torch.cuda.synchronize if kind == "cuda" else lambda: None
    work()
    wait()
    times, took = 1, 0.0
    while True:
        began = time.perf_counter()
        for _ in range(times):
            work()
        wait()
        took = time.perf_counter() - began
        if took >= _ROUND_S:
            return took / times
        times *= 2


async def replica(read: Read, answer: Answer) -> None:
    """Starts as a replica of the deployment does. Then each question names calls to prepare, and the next line
    has them scored."""
    asked = read()
    assert asked is not None
    began, name = time.monotonic(), asked["name"]
    prepare_environment(asked["cpus"])
    cards = visible_cards(1) if device() == "gpu" else []
    engine = await asyncio.to_thread(_start, asked, cards)
    try:
        answer({"start_s": time.monotonic() - began, "dtype": engine.dtype})
        while (work := await asyncio.to_thread(read)) is not None:
            prompts = calls(asked["config"]["vocab_size"], work["document_tokens"], work["calls"], work["seed"])
            answer({})
            await asyncio.to_thread(read)
            answer(await _scored(engine, prompts))
    finally:
        with turn(cards, name, STOP_LIMIT_S):
            engine.close()


def _start(asked: dict[str, Any], cards: list[Card]) -> Engine:
    # No tokenizer, as prompts are ids; and no weights, whose values change the work little.
    dummy = {"load_format": "dummy", "skip_tokenizer_init": True, **asked["engine"]}
    args = RerankerArgs(model=asked["folder"], kind="qwen3-reranker", engine=dummy)
    model = Model(Path(asked["folder"]), asked["config"], "dummy")
    card_bytes = cards[0].total_bytes if cards else None
    settings = engine_settings(args, model, device(), asked["share"], cpu_has_bf16(), card_bytes)
    with turn(cards, asked["name"]):
        if card_bytes is not None:
            wait_for_memory(cards, int(settings["gpu_memory_utilization"] * card_bytes) + CONTEXT_BYTES)
        return start(settings, "classify")


async def _scored(engine: Engine, prompts: list[list[list[int]]]) -> dict[str, float]:
    """All calls' pairs, with as many calls at once as a replica takes."""
    room = asyncio.Semaphore(CALLS_AT_ONCE)

    async def one(call: list[list[int]]) -> int:
        async with room:
            return (await engine.pool([Prompt(ids) for ids in call])).cached_tokens

    began = time.perf_counter()
    cached = await asyncio.gather(*map(one, prompts))
    return {
        "seconds": time.perf_counter() - began,
        "pairs": len(prompts) * PAIRS_A_CALL,
        "cached_tokens": sum(cached),
    }


def main(what: str) -> int:
    # vLLM and its kernels write to standard output, which is the parent's.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(found: dict[str, Any]) -> None:
        print(json.dumps(found), file=answers, flush=True)

    def read() -> dict[str, Any] | None:
        line = sys.stdin.readline()
        return json.loads(line) if line else None

    try:
        if what == "ceiling":
            ceiling(read, answer)
        else:
            asyncio.run(replica(read, answer))
    except Exception as error:
        answer({"problem": f"{type(error).__name__}: {error}"})
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
