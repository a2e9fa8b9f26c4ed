"""`GET /v1/fleet`: what runs where, and how busy it is, from Serve's status and the metrics of all nodes.

Every gateway answers the same: it counts nothing itself. Says names, numbers and Serve's words; no settings, no
addresses, no keys.
"""

import asyncio
import logging
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import ray
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, Field

from serve_app.gateway.errors import ApiError
from serve_app.gateway.openapi import takes
from serve_app.status import details, word

logger = logging.getLogger("ray.serve")

# One look serves everybody who asks within so long; Ray's own figures are up to ten seconds old.
_FRESH_S = 2.0
_METRICS_TIMEOUT_S = 2.0
# Longer nobody waits for a look.
_LOOK_TIMEOUT_S = 5.0
# Of one node's page of metrics.
_MAX_PAGE_BYTES = 32 * 2**20
_KINDS = {
    "Gateway": "gateway",
    "Recall": "catalogue",
    "Reranker": "variant",
    "Rollout": "rollouts",
    "Page": "page",
}
# Operators' questions are no calls.
_NO_CALLS = ("/v1/fleet", "/v1/rollouts", "/v1/events")
_SAMPLE = re.compile(rb"^ray_serve_app_([a-z_]+)\{(.*)\} (\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class DeploymentNow(BaseModel):
    name: str
    status: str = Field(description="Serve's word, e.g. HEALTHY or UPDATING.")
    running: int = Field(description="Replicas that run.")
    target: int = Field(description="Replicas that there should be.")
    states: dict[str, int] = Field(description="Replicas by state, e.g. STARTING.")
    num_cpus: float = Field(description="Of one replica.")
    num_gpus: float = Field(description="Of one replica.")
    nodes: dict[str, int] = Field(description="Replicas by node.")


class ApplicationNow(BaseModel):
    name: str
    kind: str = Field(description="gateway, catalogue, variant, rollouts, page or other.")
    status: str = Field(description="Serve's word, e.g. RUNNING.")
    deployments: list[DeploymentNow]


class NodeNow(BaseModel):
    node: str = Field(description="The beginning of Ray's id.")
    gpus: float
    gpus_used: float = Field(description="What replicas ask for.")
    replicas: int


class VariantNow(BaseModel):
    pending_tokens: float
    tokens_per_s: float = Field(description="While busy, of all replicas; 0 until measured.")
    drain_s: float | None = Field(
        description="pending_tokens / tokens_per_s; null while tokens wait and nothing was ever scored."
    )
    target_drain_s: float | None
    pairs: float = Field(description="Since the start, as the next.")
    cache_hits: float


class CallsNow(BaseModel):
    answered: float = Field(description="Since the start, as the next two.")
    failed: float = Field(description="Of these, with a status of 500 and above.")
    degraded: float = Field(description="Stages that a call went without.")


class FleetAnswer(BaseModel):
    """`variants` and `calls` are null where the metrics of a node could not be read."""

    at: float = Field(description="Seconds since the epoch.")
    nodes: list[NodeNow]
    applications: list[ApplicationNow]
    variants: dict[str, VariantNow] | None
    calls: CallsNow | None


@dataclass(frozen=True, slots=True)
class Node:
    """Of `ray.nodes()`. `metrics_url`: None where it exports none."""

    id: str
    gpus: float
    metrics_url: str | None


@dataclass(frozen=True, slots=True)
class Sample:
    name: str
    labels: Mapping[str, str]
    value: float


class Overview:
    """`look` reads Serve's details and Ray's nodes, and blocks; `scrape` reads all nodes' samples."""

    def __init__(
        self,
        look: Callable[[], tuple[dict[str, Any], list[Node]]] | None = None,
        scrape: Callable[[Sequence[Node]], Awaitable[list[Sample] | None]] | None = None,
    ) -> None:
        self._look = look or _look
        self._scrape = scrape or _scrape
        self._looking: asyncio.Task[dict[str, Any]] | None = None
        self._at = float("-inf")

    async def answer(self) -> dict[str, Any]:
        """The body of `GET /v1/fleet`, at most _FRESH_S old; those who ask meanwhile wait for the same look, which
        goes on without them. Raises ApiError where it takes too long."""
        looking = self._looking
        # While nobody answers, another look would take another of the threads that all share.
        if looking is None or (looking.done() and time.monotonic() - self._at > _FRESH_S):
            looking = self._looking = asyncio.get_running_loop().create_task(self._look_again())
        if not looking.done():
            await asyncio.wait({looking}, timeout=_LOOK_TIMEOUT_S)
        if not looking.done():
            message = f"Serve's controller did not answer within {_LOOK_TIMEOUT_S:g} s"
            raise ApiError("unavailable", message, retry_after_s=5)
        return looking.result()

    async def _look_again(self) -> dict[str, Any]:
        details, nodes = await asyncio.to_thread(self._look)
        answer = summary(details, nodes, await self._scrape(nodes), time.time())
        self._at = time.monotonic()
        return answer


def add_fleet(
    app: FastAPI,
    answer: Callable[..., Awaitable[Response]],
    overview: Overview | None = None,
) -> None:
    """Adds the route to `app`. `answer` checks the key and answers."""
    overview = overview or Overview()

    @app.get("/v1/fleet", **takes(None, FleetAnswer, "What runs, and how busy it is"))
    async def fleet(request: Request) -> Response:
        return await answer(request, None, lambda _: overview.answer(), "fleet")


# ---- pure


def summary(
    details: dict[str, Any], nodes: Sequence[Node], samples: Sequence[Sample] | None, at: float
) -> dict[str, Any]:
    """The answer, of what Serve, Ray and the nodes say. `samples`: None where they could not be read."""
    applications = [_application(name, app) for name, app in sorted(details.get("applications", {}).items())]
    deployments = [deployment for app in applications for deployment in app["deployments"]]
    variants = {app["name"] for app in applications if app["kind"] == "variant"}
    alive = {
        replica["replica_id"]
        for app in details.get("applications", {}).values()
        for deployment in app["deployments"].values()
        for replica in deployment["replicas"]
    }
    return {
        "at": at,
        "nodes": [
            {
                "node": node.id[:8],
                "gpus": node.gpus,
                "gpus_used": round(sum(d["num_gpus"] * d["nodes"].get(node.id[:8], 0) for d in deployments), 4),
                "replicas": sum(d["nodes"].get(node.id[:8], 0) for d in deployments),
            }
            for node in nodes
        ],
        "applications": applications,
        "variants": None if samples is None else _variants(samples, variants, alive),
        "calls": None if samples is None else _calls(samples),
    }


def _application(name: str, app: dict[str, Any]) -> dict[str, Any]:
    kinds = [_KINDS[deployment] for deployment in app["deployments"] if deployment in _KINDS]
    return {
        "name": name,
        "kind": kinds[0] if kinds else "other",
        "status": word(app["status"]),
        "deployments": [
            _deployment(deployment, found)
            for deployment, found in app["deployments"].items()
            # What an application must have and nobody needs to know of.
            if deployment != "Front"
        ],
    }


def _deployment(name: str, found: dict[str, Any]) -> dict[str, Any]:
    states = Counter(word(replica["state"]) for replica in found["replicas"])
    needs = found.get("required_resources") or {}
    return {
        "name": name,
        "status": word(found["status"]),
        "running": states["RUNNING"],
        "target": found["target_num_replicas"],
        "states": dict(states),
        "num_cpus": needs.get("CPU", 0),
        "num_gpus": needs.get("GPU", 0),
        # One that waits for a place is on none yet.
        "nodes": dict(Counter(replica["node_id"][:8] for replica in found["replicas"] if replica.get("node_id"))),
    }


def _variants(samples: Sequence[Sample], variants: Iterable[str], alive: set[str]) -> dict[str, Any]:
    """Gauges of replicas that are gone last for a while, and don't count."""

    def total(name: str, variant: str) -> float:
        return sum(
            sample.value
            for sample in samples
            if sample.name == name
            and sample.labels.get("variant") == variant
            and ("replica" not in sample.labels or sample.labels["replica"] in alive)
        )

    found = {}
    for variant in sorted(variants):
        pending, rate = total("reranker_pending_tokens", variant), total("reranker_tokens_per_second", variant)
        targets = [
            sample.value
            for sample in samples
            if sample.name == "reranker_target_drain_seconds" and sample.labels.get("variant") == variant
        ]
        found[variant] = {
            "pending_tokens": pending,
            "tokens_per_s": rate,
            "drain_s": 0.0 if pending <= 0 else pending / rate if rate > 0 else None,
            "target_drain_s": max(targets, default=None),
            "pairs": total("pairs_total", variant),
            "cache_hits": total("cache_hits_total", variant),
        }
    return found


def _calls(samples: Sequence[Sample]) -> dict[str, float]:
    calls = [
        sample
        for sample in samples
        if sample.name == "calls_total" and not sample.labels.get("path", "").startswith(_NO_CALLS)
    ]
    return {
        "answered": sum(call.value for call in calls),
        "failed": sum(call.value for call in calls if call.labels.get("status", "") >= "500"),
        "degraded": sum(sample.value for sample in samples if sample.name == "degraded_total"),
    }


def parse(lines: Iterable[bytes]) -> list[Sample]:
    """Our samples of a page in Prometheus' text format, without histograms."""
    samples = []
    for line in lines:
        if (found := _SAMPLE.match(line)) is None or found[1].endswith((b"_bucket", b"_sum", b"_count")):
            continue
        labels = dict(_LABEL.findall(found[2].decode("utf-8", "replace")))
        samples.append(Sample(found[1].decode(), labels, float(found[3])))
    return samples


# ---- what is asked


def _look() -> tuple[dict[str, Any], list[Node]]:
    nodes = [
        Node(
            id=node["NodeID"],
            gpus=node["Resources"].get("GPU", 0),
            metrics_url=f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            if node.get("MetricsExportPort")
            else None,
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return details(), nodes


async def _scrape(nodes: Sequence[Node]) -> list[Sample] | None:
    """Of all nodes; None where one of them does not answer: what is added up would be too little."""
    limits = httpx.Limits(max_connections=16)
    async with httpx.AsyncClient(timeout=_METRICS_TIMEOUT_S, limits=limits, trust_env=False) as client:
        pages = await asyncio.gather(*(_page(client, node.metrics_url) for node in nodes if node.metrics_url))
    read = [page for page in pages if page is not None]
    return [sample for page in read for sample in page] if pages and len(read) == len(pages) else None


async def _page(client: httpx.AsyncClient, url: str) -> list[Sample] | None:
    try:
        async with asyncio.timeout(_METRICS_TIMEOUT_S), client.stream("GET", url) as response:
            response.raise_for_status()
            data = bytearray()
            async for chunk in response.aiter_bytes():
                data += chunk
                if len(data) > _MAX_PAGE_BYTES:
                    raise ValueError(f"a page of over {_MAX_PAGE_BYTES} bytes")
            return await asyncio.to_thread(lambda: parse(bytes(data).splitlines()))
    except (httpx.HTTPError, TimeoutError, ValueError) as error:
        logger.warning("%s could not be read: %r", url, error)
        return None
