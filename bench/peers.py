"""Reranking over HTTP beside what people would use instead: pairs a second, same model, prompts and machine.

    python -m bench.peers [--rounds N] [--shape tiny|25m]

All servers take turns, and those whose turn it isn't are stopped: an idle Ray would take an eighth of two cores
from the others. So does the engine alone, in its own process and with ready-made token ids. Ours has keys,
metrics and HAProxy on, and its score cache off. vLLM's server runs with its defaults, and again tuned: our block
size, batch sizes and eager mode. It gets the model's prompt as a template, so that everybody computes the same
tokens; before anything is timed, scores are compared. sentence-transformers' CrossEncoder, without any HTTP and
one call at a time, gets the same prompts as texts.
"""

import argparse
import asyncio
import contextlib
import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import numpy as np
import psutil

from bench.common import Spread, machine, save, saved, show
from bench.engine import SHAPES, receive
from bench.fleet import HEADERS, config, end, fleet
from serve_app.config import DEFAULT_INSTRUCTION, RerankerArgs, YesNoPrompt
from serve_app.reranker.deployment import prompt_builder
from serve_app.reranker.engine import cpu_has_bf16, prepare_environment
from serve_app.reranker.engine_args import engine_settings
from serve_app.reranker.messages import ScoreRequest
from serve_app.reranker.model import resolve
from serve_app.reranker.scores import sigmoids
from serve_app.reranker.tokens import load_tokenizer
from tests import models

_MAX_MODEL_LEN = 1024
_ENCODER = "CrossEncoder, no HTTP"
_BARE = "bare engine, token ids"
# Pairs a second that no server here exceeds.
_FASTEST = 5000
# What Ray has put off while it was stopped is done by then.
_SETTLE_S = 2.0
_WARM_DOCUMENTS = 20
# Documents a call, calls at once and seconds a block, by shape.
LOADS = {"tiny": ((200, 1, 2.0), (200, 8, 4.0)), "25m": ((200, 1, 8.0), (50, 8, 8.0))}
_OVERRIDES = {
    "architectures": ["Qwen3ForSequenceClassification"],
    "classifier_from_token": ["no", "yes"],
    "is_original_qwen3_reranker": True,
}


def make_model(shape: str, folder: Path) -> Path:
    """Random weights whose scores spread."""
    return models.qwen3(folder, **SHAPES[shape])


def template(folder: Path) -> Path:
    """Qwen3-Reranker's prompt for vLLM's server."""
    prompt = YesNoPrompt()
    path = folder / "template.jinja"
    query = "{{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }}"
    document = "{{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }}"
    pair = f"<Instruct>: {DEFAULT_INSTRUCTION}\n<Query>: {query}\n<Document>: {document}"
    # Jinja drops the last newline of a template.
    path.write_text(prompt.prefix + pair + prompt.suffix + "{{ '' }}")
    return path


def reranker_args(model: Path, dtype: str) -> RerankerArgs:
    return RerankerArgs(
        model=str(model), kind="qwen3-reranker", engine={"max_model_len": _MAX_MODEL_LEN, "dtype": dtype}
    )


def ours(model: Path, dtype: str) -> dict[str, Any]:
    """Our fleet's config."""
    settings = {
        "variants": {"model": {}},
        "pipelines": {"rerank": {"stages": [{"variant": "model"}]}},
        "routes": {"default": {"weights": {"rerank": 100}, "timeout_ms": 60000}},
        "cache": None,
    }
    reranker = {
        "name": "model",
        "import_path": "serve_app.reranker:build",
        "route_prefix": None,
        "args": reranker_args(model, dtype).model_dump(exclude_unset=True),
        "deployments": [{"name": "Reranker", "ray_actor_options": {"num_cpus": os.cpu_count()}}],
    }
    return config(settings, reranker)


@contextlib.contextmanager
def vllm_server(model: Path, dtype: str, folder: Path, *, tuned: bool) -> Iterator[str]:
    from tests.ports import free_port

    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--runner", "pooling", "--hf-overrides", json.dumps(_OVERRIDES), "--dtype", dtype]
    command += ["--chat-template", str(template(folder)), "--max-model-len", str(_MAX_MODEL_LEN)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "model"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if tuned:
        args = reranker_args(model, dtype)
        settings = engine_settings(args, resolve(args), "cpu", 0, cpu_has_bf16())
        command.append("--enforce-eager")
        for name in ("block_size", "max_num_batched_tokens", "max_num_seqs"):
            command.append(f"--{name.replace('_', '-')}={settings[name]}")
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    log = folder / f"vllm-{'tuned' if tuned else 'defaults'}.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
        try:
            give_up_at = time.monotonic() + 240
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).status_code == 200:
                        break
                if process.poll() is not None or time.monotonic() > give_up_at:
                    raise RuntimeError(f"vLLM's server did not start: {log.read_text()[-2000:]}")
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            end(process)


def body(rng: random.Random, documents: int) -> dict[str, Any]:
    """A call of short documents that no cache has seen: about 20 words each."""
    return {
        "model": "model",
        "query": models.text(rng, 5),
        "documents": [models.text(rng, 20) for _ in range(documents)],
    }


async def pairs_per_s(url: str, documents: int, at_once: int, seconds: float) -> float:
    """Of clients that each send the next call when they have the last one's answer; whole calls count."""
    rng = random.Random()
    # Made before the clock starts; a server that is faster than that waits for ours.
    made = [json.dumps(body(rng, documents)) for _ in range(math.ceil(_FASTEST * seconds / documents) + at_once)]
    done = 0
    async with aiohttp.ClientSession(headers={**HEADERS, "Content-Type": "application/json"}) as session:

        async def client() -> None:
            nonlocal done
            while time.monotonic() < give_up_at:
                sent = made.pop() if made else json.dumps(body(rng, documents))
                async with session.post(url, data=sent, timeout=aiohttp.ClientTimeout(total=120)) as answer:
                    text = await answer.text()
                    if answer.status != 200 or text.count('"index"') != documents or "degraded" in text:
                        raise RuntimeError(f"{url} answered {answer.status}: {text[:300]}")
                done += documents

        began = time.monotonic()
        give_up_at = began + seconds
        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(client())
        return done / (time.monotonic() - began)


class Bare:
    """vLLM's engine in a process by itself, given ready-made token ids: what is left for a server to lose."""

    def __init__(self, model: Path, dtype: str) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_bare_engine, args=(str(model), dtype, theirs))
        self._process.start()
        theirs.close()
        receive(self._pipe)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def pairs_per_s(self, documents: int, at_once: int, seconds: float) -> float:
        self._pipe.send((documents, at_once, seconds))
        return float(receive(self._pipe))

    def scores(self, sent: dict[str, Any]) -> list[float]:
        self._pipe.send(sent)
        return list(receive(self._pipe))

    def close(self) -> None:
        self._pipe.close()
        self._process.join(30)
        self._process.kill()


def _bare_engine(model: str, dtype: str, pipe: Connection) -> None:
    prepare_environment(os.cpu_count() or 1)
    from vllm import LLM, PoolingParams, TokensPrompt

    args = reranker_args(Path(model), dtype)
    resolved = resolve(args)
    builder = prompt_builder(args, load_tokenizer(args, resolved), _MAX_MODEL_LEN)
    llm = LLM(**engine_settings(args, resolved, "cpu", 0, cpu_has_bf16()))
    params = PoolingParams(task="classify", use_activation=False)

    def prompts(sent: dict[str, Any]) -> list[TokensPrompt]:
        built = builder.build(ScoreRequest(sent["query"], sent["documents"]))
        return [TokensPrompt(prompt_token_ids=prompt.ids) for prompt in built.prompts]

    def encode(given: list[TokensPrompt]) -> list[float]:
        answered = llm.encode(given, params, pooling_task="classify", use_tqdm=False)
        return [float(answer.outputs.data[0]) for answer in answered]

    pipe.send("ready")
    rng = random.Random()
    with contextlib.suppress(EOFError):
        while True:
            asked = pipe.recv()
            if isinstance(asked, dict):
                pipe.send(sigmoids(np.array(encode(prompts(asked)), np.float32)[:, None])[1])
                continue
            documents, at_once, seconds = asked
            done = took = 0.0
            while took < seconds:
                given = [prompt for _ in range(at_once) for prompt in prompts(body(rng, documents))]
                began = time.perf_counter()
                done += len(encode(given))
                took += time.perf_counter() - began
            pipe.send(done / took)


def server_of(url: str) -> int:
    """The process that was started with the port of `url` in its arguments."""
    port = url.split(":")[2].split("/")[0]
    return next(child.pid for child in psutil.Process().children() if port in " ".join(child.cmdline()))


@contextlib.contextmanager
def stopped(pids: Collection[int]) -> Iterator[None]:
    """Processes and what they have started take no time meanwhile. Seconds only: Ray counts who doesn't answer."""
    roots = [psutil.Process(pid) for pid in pids]
    trees = [member for root in roots for member in (root, *root.children(recursive=True))]
    try:
        for member in trees:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.suspend()
        yield
    finally:
        for member in trees:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.resume()


def scores(url: str, sent: dict[str, Any]) -> list[float]:
    answer = httpx.post(url, json=sent, headers=HEADERS, timeout=120)
    by_index = {
        result["index"]: float(result["relevance_score"]) for result in answer.raise_for_status().json()["results"]
    }
    return [by_index[i] for i in range(len(by_index))]


def cross_encoder(model: Path, dtype: str, folder: Path) -> Callable[[dict[str, Any]], list[float]] | None:
    """The scores of a call's pairs; None where sentence-transformers isn't installed."""
    try:
        import torch
        from sentence_transformers import CrossEncoder
    except ImportError:
        return None
    made = CrossEncoder(
        str(as_classifier(model, folder / "classifier")),
        max_length=_MAX_MODEL_LEN,
        device="cpu",
        model_kwargs={"torch_dtype": getattr(torch, dtype)},
    )
    prompt = YesNoPrompt()

    def score(sent: dict[str, Any]) -> list[float]:
        head = f"{prompt.prefix}<Instruct>: {DEFAULT_INSTRUCTION}\n<Query>: {sent['query']}\n"
        pairs = [(head, f"<Document>: {document}{prompt.suffix}") for document in sent["documents"]]
        return [float(value) for value in made.predict(pairs, batch_size=32, show_progress_bar=False)]

    return score


def as_classifier(model: Path, folder: Path) -> Path:
    """The same model as sentence-transformers reads it: a head of one row, yes minus no."""
    import torch
    from transformers import AutoTokenizer, Qwen3ForCausalLM, Qwen3ForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(model)
    causal = Qwen3ForCausalLM.from_pretrained(model)
    pad = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    made = Qwen3ForSequenceClassification.from_pretrained(model, num_labels=1, pad_token_id=pad)
    rows = causal.get_output_embeddings().weight
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    with torch.no_grad():
        made.score.weight.copy_((rows[yes] - rows[no])[None])
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(rounds: int, shapes: tuple[str, ...] = tuple(LOADS)) -> dict[str, Any]:
    return {shape: _compare(shape, rounds) for shape in shapes}


def _compare(shape: str, rounds: int) -> dict[str, Any]:
    dtype = "bfloat16" if cpu_has_bf16() else "float32"
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        model = make_model(shape, folder / "model")
        servers = {
            "serve-app": fleet(ours(model, dtype)),
            "vLLM's server, tuned": vllm_server(model, dtype, folder, tuned=True),
            "vLLM's server, defaults": vllm_server(model, dtype, folder, tuned=False),
        }
        with ThreadPoolExecutor() as pool:
            bases = pool.map(stack.enter_context, servers.values())
            urls = {peer: f"{base}/v1/rerank" for peer, base in zip(servers, bases, strict=True)}
        sent = body(random.Random(7), 50)
        bare = Bare(model, dtype)
        stack.callback(bare.close)
        encoder = cross_encoder(model, dtype, folder)
        found = {peer: scores(url, sent) for peer, url in urls.items()}
        found[_BARE] = bare.scores(sent)
        if encoder is not None:
            found[_ENCODER] = encoder(sent)
        differences = {
            peer: max(abs(a - b) for a, b in zip(found["serve-app"], theirs, strict=True))
            for peer, theirs in found.items()
        }
        for peer, difference in differences.items():
            if difference > 0.05:
                raise RuntimeError(f"{peer} computes something else: scores differ by up to {difference:.3f}")
        for url in urls.values():
            asyncio.run(pairs_per_s(url, 100, 2, 2.0))
        contenders: dict[str, Callable[[int, int, float], float]] = {
            **{peer: partial(_over_http, url) for peer, url in urls.items()},
            _BARE: bare.pairs_per_s,
        }
        if encoder is not None:
            contenders[_ENCODER] = partial(_one_call, encoder)
        pids = {**{peer: server_of(url) for peer, url in urls.items()}, _BARE: bare.pid}
        rates: dict[str, dict[str, list[float]]] = {peer: {} for peer in contenders}
        for i in range(rounds):
            # Each begins in its turn: what ran before leaves caches and a machine's mood behind.
            names = list(contenders)
            names = names[i % len(names) :] + names[: i % len(names)]
            for documents, at_once, seconds in LOADS[shape]:
                for peer in names:
                    if peer != _ENCODER or at_once == 1:
                        with stopped([pid for other, pid in pids.items() if other != peer]):
                            time.sleep(_SETTLE_S)
                            contenders[peer](_WARM_DOCUMENTS, 1, 0.5)
                            rate = contenders[peer](documents, at_once, seconds)
                        case = f"{at_once} x {documents}"
                        rates[peer].setdefault(case, []).append(rate)
                        print(f"round {i + 1}: {peer}, {case}: {rate:.1f} pairs/s", file=sys.stderr, flush=True)
    cases = [f"{at_once} x {documents}" for documents, at_once, _ in LOADS[shape]]
    result: dict[str, Any] = {
        "dtype": dtype,
        "machine": machine(),
        "rounds": rounds,
        "score_differences": differences,
        "pairs_per_s": {},
        "times_ours": {},
    }
    for peer, measured in rates.items():
        result["pairs_per_s"][peer] = {case: Spread.of(measured[case]) for case in cases if case in measured}
        result["times_ours"][peer] = {
            case: Spread.of(a / b for a, b in zip(rates["serve-app"][case], measured[case], strict=True))
            for case in cases
            if case in measured
        }
    heads = [
        "",
        *(f"pairs/s, {case}" for case in cases),
        *(f"serve-app has so many times, {case}" for case in cases),
    ]
    show(
        f"{shape}, {dtype}: calls at once x documents",
        heads,
        [
            [
                peer,
                *(
                    kind[peer][case].text() if case in kind[peer] else "-"
                    for kind in (result["pairs_per_s"], result["times_ours"])
                    for case in cases
                ),
            ]
            for peer in rates
        ],
    )
    return result


def _over_http(url: str, documents: int, at_once: int, seconds: float) -> float:
    return asyncio.run(pairs_per_s(url, documents, at_once, seconds))


def _one_call(
    encoder: Callable[[dict[str, Any]], list[float]], documents: int, at_once: int, seconds: float
) -> float:
    made = body(random.Random(), documents)
    began = time.monotonic()
    encoder(made)
    return documents / (time.monotonic() - began)


def main() -> int:
    parser = argparse.ArgumentParser(description="Reranking over HTTP beside other servers.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", choices=tuple(LOADS), action="append")
    arguments = parser.parse_args()
    shapes = tuple(arguments.shape or LOADS)
    # What is stopped goes on and what was started ends, also where somebody's `timeout` says so.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    result = run(arguments.rounds, shapes)
    kept = saved("peers")
    result = {shape: kept[shape] for shape in LOADS if shape in kept} | result
    print(save("peers", result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
