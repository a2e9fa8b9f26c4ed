"""Rerankers of the published shapes on one GPU: pairs/s, and how much of the card that is.

    make bench-gpu
    python -m bench.gpu [--smoke | --case NAME ...]

Qwen3-Reranker-0.6B, 4B and 8B by their published dimensions with dummy weights (their scores mean nothing; their
speed is the real one, but for FP8), in bf16 and FP8, through the engine and the GPU shares that the deployment
uses. Prompts are token ids in Qwen3's layout, 64 pairs a call with one query. A round is a second of calls, of
which a replica has up to 16 at once; where those are fewer than four it is four calls, or as many as fit into ten
seconds. The share of the ceiling is the operations that were computed, without what the prefix cache saved, over
those that matrix multiplications of the model's own shapes reach by themselves. Every case has a limit, and all
end after eight minutes, which isn't enough for all of them: one bf16 replica of each shape comes first, and what
is left out is named and can be asked for with `--case`. Results are written after each case; those of earlier
runs stay, each with its own machine and ceiling. The exit code is 1 unless the first three, what was asked for
and what was begun with all its time were measured at all lengths. `--smoke` runs all of it with a tiny model, on
the CPU where there is no GPU.

FP8's gain is flattered: dummy weights are within 1e-3 of zero, so that what enters the MLP's last multiplication,
a quarter of 8B's operations, is too small for FP8 and becomes zeros, which the card multiplies faster.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from bench.common import RESULTS, Spread, machine, save, saved, show
from bench.gpu_work import ROUNDS, Case, allowed_s, calls_and_rounds, pairs_flops, prompt_tokens
from serve_app.config import RerankerArgs
from serve_app.reranker.engine import line
from serve_app.reranker.gpu import visible_cards
from serve_app.reranker.share import find_shape

ROOT = Path(__file__).parents[1]
LOGS = ROOT / ".run" / "bench" / "gpu"
MODELS = LOGS / "models"

LIMIT_S = 8 * 60
_CEILING_LIMIT_S = 90
_STOP_S = 10
DOCUMENT_TOKENS = (64, 256, 1024)
_WARM_CALLS = 8
FP8 = "fp8_per_tensor"
# What matters most comes first.
CASES: tuple[Case, ...] = (
    Case("0.6B"),
    Case("4B"),
    Case("8B"),
    Case("0.6B", replicas=4),
    Case("0.6B", replicas=2),
    Case("8B", FP8),
    Case("4B", FP8),
    Case("0.6B", FP8),
)
CONFIGS: dict[str, dict[str, Any]] = {
    size: find_shape(RerankerArgs(model=f"Qwen/Qwen3-Reranker-{size}", kind="qwen3-reranker")).config
    for size in ("0.6B", "4B", "8B")
}
# As in configs/fleet.yaml.
_ENGINE = {"max_model_len": 8192}
SMOKE_CASES = (Case("tiny"), Case("tiny", replicas=2))
_TINY = {
    **CONFIGS["0.6B"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 2048,
}


class CaseError(Exception):
    """A process on the card failed; the message is the first line of why."""


class Child:
    """A `bench.gpu_process`, with its log in `LOGS`."""

    @classmethod
    async def start(cls, what: str, name: str) -> "Child":
        LOGS.mkdir(parents=True, exist_ok=True)
        log = LOGS / f"{name.replace(' ', '-')}.log"
        with log.open("w") as stream:
            # In a session of its own, so that the engine's processes can be ended with it.
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "bench.gpu_process", what),
                cwd=ROOT,
                # Also without a GPU the engine that one takes, which has processes of its own.
                env={"VLLM_ENABLE_V1_MULTIPROCESSING": "1", **os.environ},
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=stream,
                start_new_session=True,
            )
        return cls(process, log)

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self._log = log

    async def ask(self, **question: Any) -> dict[str, Any]:
        """Raises CaseError."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            await self._process.stdin.drain()
        line = await self._process.stdout.readline()
        if not line:
            raise CaseError(f"ended with {await self._process.wait()}; see {self._log.relative_to(ROOT)}")
        answer: dict[str, Any] = json.loads(line)
        if "problem" in answer:
            raise CaseError(f"{answer['problem'].splitlines()[0]}; see {self._log.relative_to(ROOT)}")
        return answer

    async def stop(self) -> None:
        """At the end of its input the process closes its engine; what is left after a while is killed."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), _STOP_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()


def model_folder(model: str, config: dict[str, Any]) -> Path:
    """A folder with the model's config.json. Always the same one, as vLLM keeps what it compiled by the path."""
    folder = MODELS / model
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / f"config.json.{os.getpid()}"
    fresh.write_text(json.dumps(config))
    fresh.replace(folder / "config.json")
    return folder


async def _ceiling(configs: dict[str, dict[str, Any]], tokens: int, result: dict[str, Any]) -> None:
    """Fills `result` by number format: FP8's failure leaves what bf16 has."""
    child = await Child.start("ceiling", "ceiling")
    try:
        async with asyncio.timeout(_CEILING_LIMIT_S):
            for number in ("bf16", "fp8"):
                answer = await child.ask(configs=configs, tokens=tokens, number=number)
                rates = answer.pop("flops_per_s")
                if result["ceiling"] is None:
                    result["ceiling"] = answer | {"flops_per_s": {model: {} for model in configs}}
                for model, rate in rates.items():
                    result["ceiling"]["flops_per_s"][model][number] = rate
    finally:
        await child.stop()


async def _case(case: Case, config: dict[str, Any], found: dict[str, Any]) -> None:
    """Fills `found` as figures come, so that a case that is cut off leaves what it had."""
    engine = _ENGINE | ({"quantization": case.quantization} if case.quantization else {})
    share = {
        "config": config,
        "folder": str(model_folder(case.model, config)),
        "engine": engine,
        "share": 1 / case.replicas,
        "cpus": max(1, len(os.sched_getaffinity(0)) // (2 * case.replicas)),
    }
    names = [f"{case.name} {i}" for i in range(case.replicas)]
    children: list[Child] = []
    try:
        for name in names:
            children.append(await Child.start("replica", name))
        starts = await asyncio.gather(
            *(child.ask(name=name, **share) for child, name in zip(children, names, strict=True))
        )
        found["start_s"] = max(start["start_s"] for start in starts)
        found["dtype"] = starts[0]["dtype"]
        seeds = map(str, itertools.count())
        calls, rounds = {}, {}
        for tokens in DOCUMENT_TOKENS:
            # The first run compiles what is still to be compiled. A call by itself is slower than one of many.
            await _round(children, tokens, 1, seeds)
            warm = await _round(children, tokens, 1, seeds)
            if calls_and_rounds(warm["pairs_per_s"], case.replicas)[0] > _WARM_CALLS:
                warm = await _round(children, tokens, _WARM_CALLS, seeds)
            calls[tokens], rounds[tokens] = calls_and_rounds(warm["pairs_per_s"], case.replicas)
        for i in range(ROUNDS):
            for tokens in DOCUMENT_TOKENS:
                if i >= rounds[tokens]:
                    continue
                found["rounds"].setdefault(str(tokens), []).append(
                    await _round(children, tokens, calls[tokens], seeds)
                )
    finally:
        await asyncio.gather(*(child.stop() for child in children))


async def _round(children: Sequence[Child], tokens: int, calls: int, seeds: Any) -> dict[str, float]:
    """All replicas score as many calls each, beginning at once."""
    await asyncio.gather(*(child.ask(document_tokens=tokens, calls=calls, seed=next(seeds)) for child in children))
    answers = await asyncio.gather(*(child.ask() for child in children))
    pairs = sum(answer["pairs"] for answer in answers)
    return {
        "calls": calls,
        "pairs_per_s": pairs / max(answer["seconds"] for answer in answers),
        "cached_tokens_a_pair": sum(answer["cached_tokens"] for answer in answers) / pairs,
    }


def figures(case: Case, config: dict[str, Any], rounds: dict[str, list[dict[str, float]]], ceiling: Any) -> Any:
    """By document length: pairs/s, and the share of what the card's matrix multiplications reach."""
    found = {}
    for tokens, measured in rounds.items():
        length = prompt_tokens(int(tokens))
        rates = [
            (one["pairs_per_s"], pairs_flops(config, length, one["cached_tokens_a_pair"])) for one in measured
        ]
        most = (
            (ceiling or {}).get("flops_per_s", {}).get(case.model, {}).get("fp8" if case.quantization else "bf16")
        )
        found[tokens] = {
            "rounds": len(measured),
            "calls_a_round": measured[0]["calls"],
            "pairs_per_s": Spread.of(rate for rate, _ in rates),
            "tokens_per_s": Spread.of(rate * length for rate, _ in rates),
            "cached_tokens_a_pair": Spread.of(one["cached_tokens_a_pair"] for one in measured),
            "flops_per_s": Spread.of(rate * flops for rate, flops in rates),
            "share_of_ceiling": Spread.of(rate * flops / most for rate, flops in rates) if most else None,
        }
    return found


async def _measure(
    cases: Sequence[Case], configs: dict[str, dict[str, Any]], tokens: int, limit_s: float, name: str
) -> dict[str, Any]:
    end = time.monotonic() + limit_s
    kept = saved(name)
    result: dict[str, Any] = {"limit_s": limit_s, "ceiling": None, "cases": [], "left_out": []}
    try:
        await _ceiling(configs, tokens, result)
    except TimeoutError:
        result["ceiling_problem"] = f"cut off after {_CEILING_LIMIT_S} s"
    except Exception as error:
        result["ceiling_problem"] = _said(error)
    save(name, with_kept(result, kept))
    for i, case in enumerate(cases):
        allowed = time_of(cases, i, end - time.monotonic())
        if allowed is None:
            result["left_out"].append(case.name)
            continue
        print(f"{case.name}, {end - time.monotonic():.0f} s left", flush=True)
        found: dict[str, Any] = {"rounds": {}}
        problem = None
        try:
            async with asyncio.timeout(allowed):
                await _case(case, configs[case.model], found)
        except TimeoutError:
            problem = f"cut off after {allowed:.0f} s"
            if allowed < case.limit_s:
                result["left_out"].append(case.name)
        except Exception as error:
            problem = _said(error)
        measured = figures(case, configs[case.model], found.pop("rounds"), result["ceiling"])
        of = {"case": case, "name": case.name, "machine": machine(), "ceiling": result["ceiling"], **found}
        result["cases"].append({**of, "lengths": measured, "problem": problem})
        save(name, with_kept(result, kept))
    result["took_s"] = limit_s - (end - time.monotonic())
    save(name, with_kept(result, kept))
    return result


def time_of(cases: Sequence[Case], i: int, left_s: float) -> float | None:
    """Seconds for the case at `i`; None if it isn't to be begun. What stops it comes out of its time, and plain
    cases after it get the least that they need."""
    later_s = sum(case.least_s + _STOP_S for case in cases[i + 1 :] if case.is_plain)
    return allowed_s(cases[i], left_s - _STOP_S - later_s)


def with_kept(result: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """Cases stay of which this run measured nothing, or fewer lengths."""
    cases = {case["name"]: case for case in before.get("cases", [])}
    for case in result["cases"]:
        kept = cases.get(case["name"])
        if kept is None or len(case["lengths"]) >= len(kept["lengths"]):
            cases[case["name"]] = case
    return {**result, "cases": list(cases.values())}


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, CaseError) else line(error)


def complete(result: dict[str, Any], wanted: Collection[str]) -> bool:
    """Whether each case was measured at all lengths, but for those without time that aren't `wanted`."""
    excused = set(result["left_out"]) - set(wanted)
    whole = {case["name"] for case in result["cases"] if len(case["lengths"]) == len(DOCUMENT_TOKENS)}
    return set(wanted) | {case["name"] for case in result["cases"]} <= whole | excused


def _show(result: dict[str, Any], lengths: Sequence[int]) -> None:
    if result["ceiling"]:
        show(
            f"GEMMs, TFLOP/s ({result['ceiling']['card']})",
            ["", "bf16", "fp8"],
            [
                [model, *(f"{rates[number] / 1e12:.3g}" if number in rates else "-" for number in ("bf16", "fp8"))]
                for model, rates in result["ceiling"]["flops_per_s"].items()
            ],
        )
    if "ceiling_problem" in result:
        print(f"Ceiling: {result['ceiling_problem']}\n")
    plain = {case["case"].model: case["lengths"] for case in result["cases"] if case["case"].is_plain}
    heads = [f"{n:,} tokens" for n in lengths]
    rows, shares = [], []
    for case in result["cases"]:
        of, base = case["lengths"], plain.get(case["case"].model, {})
        cells = []
        for n in map(str, lengths):
            if n not in of:
                cells.append("-")
                continue
            cell = of[n]["pairs_per_s"].text()
            if n in base and base is not of:
                cell += f", x {of[n]['pairs_per_s'].median / base[n]['pairs_per_s'].median:.2f}"
            cells.append(cell)
        rows.append([case["name"], *cells, f"{case['start_s']:.0f}" if "start_s" in case else "-"])
        shares.append([case["name"], *(_percent(of.get(str(n))) for n in lengths)])
    show("Pairs/s: median (least to most), x one bf16 replica", ["", *heads, "start s"], rows)
    show("Share of the GEMMs' rate", ["", *heads], shares)
    if any(case["case"].quantization for case in result["cases"]):
        print("FP8 gains less with real weights: of dummy ones much rounds to zeros, which multiply faster.")
    for case in result["cases"]:
        if case["problem"]:
            print(f"{case['name']}: {case['problem']}")
    if left_out := result["left_out"]:
        asked = shlex.join([part for name in left_out for part in ("--case", name)])
        print(f"Left out, no time: {', '.join(left_out)}. To measure them: {sys.executable} -m bench.gpu {asked}")


def _percent(of: dict[str, Any] | None) -> str:
    share = of and of["share_of_ceiling"]
    return f"{share.median:.1%} ({share.low:.1%} to {share.high:.1%})" if share else "-"


def draw(result: dict[str, Any], path: Path) -> None:
    """Pairs/s of each case, and its share of its ceiling, by document length. `result` is what was saved."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = [case for case in result["cases"] if case["lengths"]]
    if not cases:
        return
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4), layout="constrained")
    for axis, (name, title) in zip(
        axes, {"pairs_per_s": "pairs/s", "share_of_ceiling": "share of the ceiling"}.items(), strict=True
    ):
        for case in cases:
            points = [(int(n), of[name]["median"]) for n, of in case["lengths"].items() if of[name]]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=case["name"])
        axis.set(title=title, xlabel="tokens a document", xscale="log")
        axis.set_xticks(DOCUMENT_TOKENS, [f"{n:,}" for n in DOCUMENT_TOKENS])
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    axes[0].set(yscale="log")
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[1].yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)


def run(smoke: bool = False, names: Sequence[str] | None = None) -> dict[str, Any]:
    """`names`: of the cases; None: all."""
    configs, tokens = CONFIGS, 16_384
    cases = tuple(case for case in CASES if names is None or case.name in names)
    if smoke:
        cases, configs, tokens = SMOKE_CASES, {"tiny": _TINY}, 512
    result = asyncio.run(_measure(cases, configs, tokens, LIMIT_S, "gpu-smoke" if smoke else "gpu"))
    _show(result, DOCUMENT_TOKENS)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description="Rerankers of the published shapes on one GPU.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--smoke", action="store_true", help="a tiny model, also without a GPU")
    names = [case.name for case in CASES]
    which.add_argument("--case", choices=names, action="append", help="only this one; may be repeated")
    arguments = parser.parse_args()
    if not arguments.smoke and not visible_cards(1):
        print("No NVIDIA GPU here, so nothing was measured; --smoke tries the benchmark itself.", file=sys.stderr)
        return 2
    print(json.dumps(machine()))
    result = run(arguments.smoke, arguments.case)
    name = "gpu-smoke" if arguments.smoke else "gpu"
    draw(saved(name), RESULTS / f"{name}.png")
    print(RESULTS / f"{name}.json")
    wanted = arguments.case or [case.name for case in CASES if case.is_plain]
    return 0 if complete(result, [case.name for case in SMOKE_CASES] if arguments.smoke else wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
