"""The Serve deployments of one variant: thin shells around prompts, engine and scores."""

import asyncio
import contextlib
import gc
import logging
import os
import time
from collections.abc import Iterator
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from tokenizers import Tokenizer

from serve_app import __version__, tracing
from serve_app.autoscaling.load import LoadMeter
from serve_app.config import DEFAULT_INSTRUCTION, RerankerArgs, YesNoPrompt
from serve_app.logs import write_soon
from serve_app.reranker.engine import (
    Engine,
    Task,
    cpu_has_bf16,
    device,
    import_vllm_without_compiler,
    leave_out_unused,
    prepare_environment,
    start,
)
from serve_app.reranker.engine_args import check_engine_args, engine_settings
from serve_app.reranker.gpu import STOP_LIMIT_S, Card, turn, visible_cards, wait_for_memory
from serve_app.reranker.memory import CONTEXT_BYTES
from serve_app.reranker.messages import ScoreRequest, ScoreResult
from serve_app.reranker.metrics import report_load
from serve_app.reranker.model import Model, resolve, scoring_fingerprint
from serve_app.reranker.prompt import PairPrompts, TextPrompts, YesNoPrompts
from serve_app.reranker.router import PrefixRouter
from serve_app.reranker.scores import cosines, sigmoids
from serve_app.reranker.share import check_head_rows, find_shape, hub_config, judge
from serve_app.reranker.tokens import load_tokenizer

logger = logging.getLogger("ray.serve")

Builder = YesNoPrompts | PairPrompts | TextPrompts


def application(args: RerankerArgs) -> serve.Application:
    """`Front` as the ingress, `Reranker` below it. Raises ValueError for unknown engine arguments."""
    check_engine_args(args.engine)
    return Front.bind(Reranker.bind(args))  # type: ignore[attr-defined]


@serve.deployment(name="Front", ray_actor_options={"num_cpus": 0}, graceful_shutdown_wait_loop_s=0.1)
class Front:
    """The ingress that Serve asks for. It answers nothing: an ingress can't have a request router, and in
    fast mode it drains for half a minute, which a replica that holds a GPU must not."""

    def __init__(self, reranker: DeploymentHandle) -> None:
        pass


@serve.deployment(
    name="Reranker",
    # More than wait by far: what waits in the callers comes one by one, each after a question to the replica, and
    # the engine starves beside a queue (half the pairs/s at 16). Here it waits by priority.
    max_ongoing_requests=256,
    # The limit is the caller's, and counts all chunks of all its calls at once.
    max_queued_requests=4096,
    health_check_period_s=2,
    health_check_timeout_s=15,
    # Longer than the longest deadline a gateway allows by default (limits.max_timeout_ms).
    graceful_shutdown_timeout_s=65,
    graceful_shutdown_wait_loop_s=1,
    max_constructor_retry_count=3,
    request_router_config=RequestRouterConfig(request_router_class=PrefixRouter),
)
class Reranker:
    """One replica: a model in an engine of its own."""

    async def __init__(self, args: RerankerArgs) -> None:  # type: ignore[misc]
        began = time.monotonic()
        resources = ray.get_runtime_context().get_assigned_resources()
        gpus = resources.get("GPU", 0)
        prepare_environment(resources.get("CPU", 0))
        if not args.engine.get("trust_remote_code"):
            leave_out_unused(on_gpu=gpus > 0)
        self._kind = args.kind
        self._name = serve.get_replica_context().app_name
        tracing.start(self._name, serve.get_replica_context().replica_tag)
        write_soon()
        self._cards = await asyncio.to_thread(_cards, args, gpus)
        self._model = await asyncio.to_thread(resolve, args)
        starting = time.monotonic()
        self._prompts, self._engine = await asyncio.to_thread(
            _load, args, self._model, gpus, self._cards, self._name
        )
        engine_s = time.monotonic() - starting
        self._prompts.max_model_len = self._model.longest(self._engine.max_model_len)
        self._fingerprint = scoring_fingerprint(
            args, self._model, self._engine.dtype, self._prompts.max_model_len, _software()
        )
        self._meter = LoadMeter(self._engine.max_batch_tokens)
        # The first batch is slower than any later one; by the second the engine's watchdog knows how fast it is.
        # Of the same query, the prefix cache would leave little to read; a long text takes a large model seconds.
        for query, document in (("warm", "up"), ("up", "warm " * 20)):
            await self.score(ScoreRequest(query=query, documents=[document], timeout_s=300))
        self._meter = LoadMeter(self._engine.max_batch_tokens)
        self._reporting = asyncio.get_running_loop().create_task(report_load(self._meter))
        logger.info(
            f"Scores with {args.model} ({self._kind}, revision {self._model.revision}, {self._engine.dtype}, "
            f"max_model_len {self._prompts.max_model_len}) after {time.monotonic() - began:.1f} s, "
            f"of which the engine took {engine_s:.1f}."
        )

    async def score(self, request: ScoreRequest) -> ScoreResult:
        """Scores the documents. Raises PromptTooLongError, EngineError, or TimeoutError after
        `request.timeout_s`; then, and when the call is cancelled, its pairs are aborted in the engine."""
        with tracing.continued("Reranker.score", request.traceparent) as span:
            result = await self._score(request)
            span.set(documents=len(result.scores), tokens=result.tokens, cached_tokens=result.cached_tokens)
            return result

    async def _score(self, request: ScoreRequest) -> ScoreResult:
        began = time.monotonic()
        try:
            async with asyncio.timeout(request.timeout_s):
                # On a thread: tokenising would hold up the loop, which in fast mode is the replica's only one.
                built = await asyncio.to_thread(self._prompts.build, request)
                tokens = sum(len(prompt.ids) for prompt in built.prompts)
                with self._meter.call(tokens) as scored:
                    pooled = await self._engine.pool(built.prompts, priority=request.priority, scored=scored)
        except TimeoutError:
            raise TimeoutError(
                f"{len(request.documents)} documents weren't scored within timeout_s = {request.timeout_s}"
            ) from None
        if self._kind == "bi-encoder":
            logits = scores = cosines(pooled.vectors[0], pooled.vectors[1:])
        else:
            logits, scores = sigmoids(pooled.vectors)
        return ScoreResult(
            scores=scores,
            logits=logits,
            tokens=tokens,
            cached_tokens=pooled.cached_tokens,
            truncated=built.truncated,
            revision=self._model.revision,
            took_ms=(time.monotonic() - began) * 1000,
            fingerprint=self._fingerprint,
        )

    async def info(self) -> dict[str, Any]:
        """What runs here, for status pages and tests."""
        return {
            "kind": self._kind,
            "revision": self._model.revision,
            "fingerprint": self._fingerprint,
            "dtype": self._engine.dtype,
            "max_model_len": self._prompts.max_model_len,
            "unfinished": self._engine.unfinished(),
            "pid": os.getpid(),
        }

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve asks for this and hands it to the scaling policy."""
        return self._meter.load().stats()

    async def check_health(self) -> None:
        """Raises if the engine is dead, so that Serve replaces the replica."""
        await self._engine.check_health()

    def __del__(self) -> None:
        # Serve calls this when the replica stops, also after a failed start.
        engine = getattr(self, "_engine", None)
        if engine is not None:
            with contextlib.ExitStack() as stack:
                # Serve kills a replica that takes too long, so that it is better stopped out of turn; as where the
                # locks' folder has gone wrong.
                with contextlib.suppress(OSError):
                    stack.enter_context(turn(self._cards, self._name, STOP_LIMIT_S))
                engine.close()


def _cards(args: RerankerArgs, gpus: float) -> list[Card]:
    """The replica's GPUs. Raises ValueError for a model that can't fit its share of them, before a download."""
    cards = visible_cards(max(1, int(gpus))) if gpus else []
    if not cards:
        return []
    try:
        shape = find_shape(args, hub_config)
    except (OSError, ValueError):
        # `resolve` comes to the same, and says it better.
        return cards
    fit = judge(args, shape, gpus, min(card.total_bytes for card in cards))
    if fit.problem is not None:
        raise ValueError(fit.problem)
    if fit.needs is None:
        logger.warning(f"Whether {args.model} fits num_gpus {gpus:g} isn't known: its architecture is new here.")
    return cards


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Imports make millions of objects that stay; looking for garbage among them is a tenth of their time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@_no_collections()
def _load(args: RerankerArgs, model: Model, gpus: float, cards: list[Card], name: str) -> tuple[Builder, Engine]:
    """Raises ValueError for a prompt or a tokenizer that won't do, before gigabytes are read. How long prompts may
    be is still to be set: the engine says it."""
    if not gpus and args.engine.get("enforce_eager", True):
        # Before transformers, which takes torch along.
        import_vllm_without_compiler()
    tokenizer = load_tokenizer(args, model)
    prompts = prompt_builder(args, tokenizer, 0)
    return prompts, _start(args, model, tokenizer.backend_tokenizer, gpus, cards, name)


def _start(
    args: RerankerArgs, model: Model, tokenizer: Tokenizer, gpus: float, cards: list[Card], name: str
) -> Engine:
    built_for = device()
    if built_for == "cpu" and cards:
        # Not of `gpus` alone: Ray can be told of GPUs that aren't there.
        raise ValueError(
            f"num_gpus is {gpus:g}, but this vLLM is built for CPUs: make serve GPU=1, or leave num_gpus out"
        )
    card_bytes = min((card.total_bytes for card in cards), default=None)
    settings = engine_settings(args, model, built_for, gpus, cpu_has_bf16(), card_bytes)
    check_head_rows(args, model, tokenizer.token_to_id, settings.get("tensor_parallel_size") or 1)
    task: Task = "embed" if args.kind == "bi-encoder" else "classify"
    if built_for == "cpu" or card_bytes is None:
        return start(settings, task)
    with turn(cards, name):
        wait_for_memory(cards, int(settings["gpu_memory_utilization"] * card_bytes) + CONTEXT_BYTES)
        return start(settings, task)


def _software() -> str:
    import vllm

    return f"serve-app {__version__}, vllm {vllm.__version__}"


def prompt_builder(args: RerankerArgs, loaded: Any, max_model_len: int) -> Builder:
    """What makes a kind's prompts, with a tokenizer as `load_tokenizer` gives it."""
    tokenizer = loaded.backend_tokenizer
    if args.kind == "qwen3-reranker":
        instruction = args.instruction or DEFAULT_INSTRUCTION
        return YesNoPrompts(tokenizer, args.prompt or YesNoPrompt(), instruction, max_model_len)
    if args.kind == "cross-encoder":
        return PairPrompts(tokenizer, max_model_len, "token_type_ids" in loaded.model_input_names)
    return TextPrompts(tokenizer, max_model_len, args.query_prefix, args.document_prefix)
