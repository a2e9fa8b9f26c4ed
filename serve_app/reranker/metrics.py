"""What a reranker's replica tells Prometheus of its load; docs/operations.md has the table."""

import asyncio
from typing import Any

from ray import serve
from ray.util.metrics import Gauge

from serve_app.autoscaling import DrainTime
from serve_app.autoscaling.load import LoadMeter

_EVERY_S = 5.0


async def report_load(meter: LoadMeter) -> None:
    """Tells of the replica's load every few seconds, for ever."""
    context = serve.get_replica_context()
    labels = {"variant": context.app_name, "replica": context.replica_tag}
    pending, rate, target = (
        Gauge(f"serve_app_reranker_{name}", description, tag_keys=tuple(labels))
        for name, description in (
            ("pending_tokens", "Prompt tokens accepted and not scored."),
            ("tokens_per_second", "Prompt tokens scored a second, while busy; 0 until that is measured."),
            ("target_drain_seconds", "The drain time that the variant's scaling policy aims at."),
        )
    )
    target_drain_s = _target_drain_s(context._deployment_config)
    while True:
        load = meter.load()
        pending.set(load.pending_tokens, labels)
        rate.set(load.tokens_per_s, labels)
        target.set(target_drain_s, labels)
        await asyncio.sleep(_EVERY_S)


def _target_drain_s(deployment: Any) -> float:
    """The policy's own; its default where the variant has another policy or none."""
    scaling = deployment.autoscaling_config
    settings = (scaling.policy.policy_kwargs if scaling is not None else None) or {}
    stated = {name: value for name, value in settings.items() if name == "target_drain_s"}
    return DrainTime(**stated).target_drain_s
