"""Replicas that share a real card. Needs one NVIDIA GPU of 16 GiB or more and vLLM's GPU build:
make setup-dev GPU=1 && .venv-gpu/bin/pytest tests/gpu
"""

import importlib.metadata
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from serve_app.config import RerankerArgs
from serve_app.reranker.gpu import _memory, _nvml, visible_cards
from serve_app.reranker.messages import ScoreRequest, ScoreResult
from serve_app.reranker.share import find_shape
from tests import models

REPLICAS = 4
SHARE = 1 / REPLICAS


def _missing() -> str | None:
    if not visible_cards(1):
        return "no NVIDIA GPU here: whether replicas keep to their shares of a card was not tested"
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return "vLLM's GPU build is not installed: whether replicas keep to their shares was not tested"
    return None


pytestmark = pytest.mark.skipif(_missing() is not None, reason=str(_missing()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3-Reranker-0.6B's dimensions with a small tokenizer and no weights."""
    shape = find_shape(RerankerArgs(model="Qwen/Qwen3-Reranker-0.6B", kind="qwen3-reranker"))
    made: Path = tmp_path_factory.mktemp("models") / "qwen3-0.6b"
    made.mkdir()
    (made / "config.json").write_text(json.dumps({**shape.config, "tie_word_embeddings": True}))
    tokenizer = models.qwen_tokenizer()
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    models._save_tokenizer(made, tokenizer, settings)
    return made


@pytest.fixture(scope="module")
def card(monkeypatch_module: pytest.MonkeyPatch) -> Iterator[Any]:
    """One card, with Ray and Serve on it."""
    import ray
    from ray import serve

    (found,) = visible_cards(1)
    monkeypatch_module.setenv("CUDA_VISIBLE_DEVICES", found.uuid)
    ray.init(num_cpus=max(8, os.cpu_count() or 1), num_gpus=1, include_dashboard=False)
    yield found
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def application(folder: Path, replicas: int, num_gpus: float, **engine: Any) -> Any:
    from serve_app.reranker.deployment import Front, Reranker

    args = RerankerArgs(
        model=str(folder),
        kind="qwen3-reranker",
        engine={"load_format": "dummy", "max_model_len": 4096, "max_num_batched_tokens": 4096, **engine},
    )
    options = {"num_cpus": 1, "num_gpus": num_gpus}
    reranker = Reranker.options(num_replicas=replicas, ray_actor_options=options).bind(args)
    return Front.bind(reranker)


def test_four_quarters_of_a_card_keep_to_their_shares(card: Any, folder: Path) -> None:
    from ray import serve

    _, free_before = memory(card.uuid)
    # All four start at once, on the same card: without turns, one's measuring would see another's memory.
    serve.run(application(folder, REPLICAS, SHARE), name="shared", route_prefix=None)
    handle = serve.get_deployment_handle("Reranker", app_name="shared")
    calls = [handle.score.remote(ScoreRequest(f"query {i}", models.SENTENCES * 20)) for i in range(8 * REPLICAS)]
    answers: list[ScoreResult] = [call.result(timeout_s=300) for call in calls]
    assert all(len(answer.scores) == 20 * len(models.SENTENCES) for answer in answers)
    _, free_after = memory(card.uuid)
    taken = free_before - free_after
    by_replica = taken_by_replica(card.uuid)
    print(
        f"\ncard {card.total_bytes / 2**30:.2f} GiB, four replicas {taken / 2**30:.2f} GiB; "
        f"each: {[f'{size / 2**30:.2f}' for size in by_replica.values()]}"
    )
    assert taken <= card.total_bytes
    # In some containers the driver hides processes; then the sum alone is known.
    assert len(by_replica) in (0, REPLICAS)
    for size in by_replica.values():
        assert size <= SHARE * card.total_bytes
        assert size >= 0.5 * SHARE * card.total_bytes
    serve.delete("shared")


def test_a_share_that_is_too_small_is_refused_by_the_replica(card: Any, folder: Path) -> None:
    from ray import serve

    with pytest.raises(RuntimeError):
        serve.run(application(folder, 1, 0.01), name="small", route_prefix=None)
    message = serve.status().applications["small"].deployments["Reranker"].message
    assert "num_gpus is 0.01" in message
    assert "smallest num_gpus that fits" in message
    serve.delete("small")


def memory(uuid: str) -> tuple[int, int]:
    with _nvml() as nvml:
        return _memory(nvml, nvml.nvmlDeviceGetHandleByUUID(uuid))


def taken_by_replica(uuid: str) -> dict[int, int]:
    """Bytes on the card by process id of the replica, whose engine runs in processes below it."""
    with _nvml() as nvml:
        seen = nvml.nvmlDeviceGetComputeRunningProcesses(nvml.nvmlDeviceGetHandleByUUID(uuid))
    taken: dict[int, int] = {}
    for process in seen:
        try:
            line = [psutil.Process(process.pid), *psutil.Process(process.pid).parents()]
        except psutil.NoSuchProcess:
            continue
        for ancestor in line:
            if "Reranker" in " ".join(ancestor.cmdline()):
                taken[ancestor.pid] = taken.get(ancestor.pid, 0) + (process.usedGpuMemory or 0)
                break
    return taken
