"""Reranking over HTTP beside what people would use instead: pairs a second, same model, prompts and machine.

    python -m bench.peers [--rounds N] [--shape tiny|25m]

All servers are up at once and take turns. Ours has keys, metrics and HAProxy on, and its score cache off. vLLM's
server runs with its defaults, and again tuned: our block size, batch sizes and eager mode. It gets the model's
prompt as a template, so that everybody computes the same tokens; before anything is timed, scores are compared.
sentence-transformers' CrossEncoder, without any HTTP and one call at a time, gets the same prompts as texts.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import httpx

from bench.common import Spread, save, show
from bench.engine import SHAPES
from serve_app.access import API_KEYS
from serve_app.config import DEFAULT_INSTRUCTION, YesNoPrompt
from serve_app.launch import ENVIRONMENT, FAST
from serve_app.reranker.engine import cpu_has_bf16
from tests import models

ROOT = Path(__file__).parents[1]
_KEY = "a-key-of-the-benchmark"
_MAX_MODEL_LEN = 1024
_ENCODER = "CrossEncoder, no HTTP"
_BATCH = {"max_num_batched_tokens": 8192, "max_num_seqs": 256}
# Documents a call, calls at once and seconds a block, by shape.
LOADS = {"tiny": ((200, 1, 3.0), (200, 8, 5.0)), "25m": ((200, 1, 4.0), (50, 8, 6.0))}
_OVERRIDES = {
    "architectures": ["Qwen3ForSequenceClassification"],
    "classifier_from_token": ["no", "yes"],
    "is_original_qwen3_reranker": True,
}


def make_model(shape: str, folder: Path) -> Path:
    """Random weights whose scores spread."""
    return models.tiny_qwen3(folder) if shape == "tiny" else models.qwen3(folder, **SHAPES[shape])


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


@contextlib.contextmanager
def ours(model: Path, dtype: str) -> Iterator[str]:
    from tests.system.conftest import free_port

    port = free_port()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    config = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": "gateway",
                "import_path": "serve_app.gateway:build",
                "route_prefix": "/",
                "deployments": [
                    {
                        "name": "Gateway",
                        "user_config": {
                            "variants": {"model": {}},
                            "pipelines": {"rerank": {"stages": [{"variant": "model"}]}},
                            "routes": {"default": {"weights": {"rerank": 100}, "timeout_ms": 60000}},
                            "cache": None,
                        },
                    }
                ],
            },
            {
                "name": "model",
                "import_path": "serve_app.reranker:build",
                "route_prefix": None,
                "args": {
                    "model": str(model),
                    "kind": "qwen3-reranker",
                    "engine": {"max_model_len": _MAX_MODEL_LEN, "dtype": dtype, **_BATCH},
                },
                "deployments": [{"name": "Reranker", "ray_actor_options": {"num_cpus": os.cpu_count()}}],
            },
        ],
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.peers", "--serve", json.dumps(config)],
        env={**os.environ, **ENVIRONMENT, **FAST, API_KEYS: f"bench:{_KEY}", "PYTHONPATH": path},
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if not any(line.strip() == "ready" for line in process.stdout):
            raise RuntimeError(f"our fleet did not start: exit {process.wait()}")
        yield f"http://127.0.0.1:{port}/v1/rerank"
    finally:
        process.stdin.close()
        _end(process)


def serve_until_told(config: dict[str, Any]) -> None:
    """Serves, says `ready` on stdout, and stops at the end of stdin."""
    from tests.system.conftest import System, serving

    system = System(config)
    system.client.headers["Authorization"] = f"Bearer {_KEY}"
    with serving(system):
        print("ready", flush=True)
        sys.stdin.read()


@contextlib.contextmanager
def vllm_server(model: Path, dtype: str, folder: Path, *, tuned: bool) -> Iterator[str]:
    from tests.system.conftest import free_port

    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--runner", "pooling", "--hf-overrides", json.dumps(_OVERRIDES), "--dtype", dtype]
    command += ["--chat-template", str(template(folder)), "--max-model-len", str(_MAX_MODEL_LEN)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "model"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if tuned:
        command += ["--block-size", "32", "--enforce-eager", "--disable-log-requests"]
        command += [f"--{name.replace('_', '-')}={value}" for name, value in _BATCH.items()]
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
            yield f"http://127.0.0.1:{port}/v1/rerank"
        finally:
            process.terminate()
            _end(process)


def _end(process: "subprocess.Popen[Any]") -> None:
    try:
        process.wait(90)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


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
    done = 0
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {_KEY}"}) as session:

        async def client() -> None:
            nonlocal done
            while time.monotonic() < end:
                sent = body(rng, documents)
                async with session.post(url, json=sent, timeout=aiohttp.ClientTimeout(total=120)) as answer:
                    found = await answer.json()
                    if answer.status != 200 or len(found["results"]) != documents or "degraded" in str(found):
                        raise RuntimeError(f"{url} answered {answer.status}: {str(found)[:300]}")
                done += documents

        began = time.monotonic()
        end = began + seconds
        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(client())
        return done / (time.monotonic() - began)


def scores(url: str, sent: dict[str, Any]) -> list[float]:
    answer = httpx.post(url, json=sent, headers={"Authorization": f"Bearer {_KEY}"}, timeout=120)
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
    rates: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        model = make_model(shape, folder / "model")
        urls = {
            "serve-app": stack.enter_context(ours(model, dtype)),
            "vLLM's server, tuned": stack.enter_context(vllm_server(model, dtype, folder, tuned=True)),
            "vLLM's server, defaults": stack.enter_context(vllm_server(model, dtype, folder, tuned=False)),
        }
        sent = body(random.Random(7), 50)
        encoder = cross_encoder(model, dtype, folder)
        found = {peer: scores(url, sent) for peer, url in urls.items()}
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
        for _ in range(rounds):
            for documents, at_once, seconds in LOADS[shape]:
                case = f"{at_once} x {documents}"
                for peer, url in urls.items():
                    rate = asyncio.run(pairs_per_s(url, documents, at_once, seconds))
                    rates.setdefault(peer, {}).setdefault(case, []).append(rate)
                if encoder is not None and at_once == 1:
                    made = body(random.Random(), documents)
                    began = time.monotonic()
                    encoder(made)
                    rates.setdefault(_ENCODER, {}).setdefault(case, []).append(
                        documents / (time.monotonic() - began)
                    )
    cases = [f"{at_once} x {documents}" for documents, at_once, _ in LOADS[shape]]
    result: dict[str, Any] = {
        "dtype": dtype,
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


def main() -> int:
    parser = argparse.ArgumentParser(description="Reranking over HTTP beside other servers.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", choices=tuple(LOADS), action="append")
    parser.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve_until_told(arguments.serve)
        return 0
    print(save("peers", run(arguments.rounds, tuple(arguments.shape or LOADS))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
