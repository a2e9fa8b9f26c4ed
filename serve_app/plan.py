"""`serve-app plan`: what a config's rerankers need of GPUs of a given size. Needs neither GPUs nor the models."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from serve_app.config import RerankerArgs
from serve_app.configfile import ConfigFile, scaling_of
from serve_app.reranker.memory import GIB, gib
from serve_app.reranker.share import Fit, Shape, find_shape, hub_config, judge, shown

# Ray counts a GPU in ten thousandths.
_WHOLE = 10_000


@dataclass(frozen=True, slots=True)
class VariantPlan:
    """One variant on its share of a GPU; memory is a single GPU's. None where it isn't known, or on the CPU."""

    variant: str
    model: str
    # Where the model's dimensions come from.
    source: str | None
    num_gpus: float
    min_replicas: int
    initial_replicas: int
    max_replicas: int
    share_gib: float
    budget_gib: float | None
    # Of weights, KV cache and workspace.
    needs_gib: tuple[float, float, float] | None
    total_needs_gib: float | None
    # What the KV cache holds, and how many prompts of the longest allowed length that is.
    kv_tokens: int | None
    prompts: int | None
    smallest_num_gpus: float | None
    problem: str | None


@dataclass(frozen=True, slots=True)
class Plan:
    """All variants, and how many GPUs the whole file takes at its least, first and most replicas."""

    gpu_memory_gib: float
    variants: list[VariantPlan]
    gpus_at_min: int
    gpus_at_start: int
    gpus_at_max: int

    @property
    def fits(self) -> bool:
        return all(variant.problem is None for variant in self.variants)

    def json(self) -> str:
        """Everything, for programs."""
        return json.dumps({"fits": self.fits, **asdict(self)}, indent=2)

    def table(self) -> str:
        """For people: a line a variant, then what doesn't fit and why, then the GPUs."""
        heads = ["variant", "num_gpus", "share GiB", "needs GiB = weights + KV + workspace"]
        heads += ["KV tokens", "prompts", "a GPU", "replicas", "fits"]
        parts = [_lined_up([heads, *(_cells(variant) for variant in self.variants)])]
        parts += [f"{v.variant}: {v.problem}" for v in self.variants if v.problem is not None]
        sources: dict[str, list[str]] = {}
        for variant in self.variants:
            if variant.source is not None:
                sources.setdefault(variant.source, []).append(variant.model)
        parts += [
            f"Dimensions of {', '.join(dict.fromkeys(names))}: {source}." for source, names in sources.items()
        ]
        start = f", {self.gpus_at_start} at first" if self.gpus_at_start != self.gpus_at_min else ""
        parts.append(
            f"GPUs of {self.gpu_memory_gib:g} GiB, fractions packed: {self.gpus_at_min} at the least replicas"
            f"{start}, {self.gpus_at_max} at the most."
        )
        return "\n".join(parts)


def plan(config: ConfigFile, gpu_memory_gib: float) -> Plan:
    """Compares every reranker of the file with its share of GPUs that have so much memory."""
    card = int(gpu_memory_gib * GIB)
    hub = _Hub()
    variants = []
    for application, deployment in _deployments(config):
        args = config.rerankers.get(application)
        if args is not None and deployment["name"] == "Reranker":
            replicas = replica_counts(deployment)
            variants.append(_variant(application, args, _num_gpus(deployment), replicas, card, hub))
    return Plan(gpu_memory_gib, variants, *_gpus(config))


def gpus_at_start(config: ConfigFile) -> int:
    """GPUs for the first replicas of all deployments: a share is never split over two."""
    return _gpus(config)[1]


def _gpus(config: ConfigFile) -> tuple[int, int, int]:
    """For the least, first and greatest number of replicas of all deployments."""
    shares = [
        (round(_num_gpus(deployment) * _WHOLE), replica_counts(deployment))
        for _, deployment in _deployments(config)
    ]
    least, first, most = (packed([share for share, counts in shares for _ in range(counts[i])]) for i in range(3))
    return least, first, most


def _num_gpus(deployment: dict[str, Any]) -> float:
    return float((deployment.get("ray_actor_options") or {}).get("num_gpus") or 0)


def replica_counts(deployment: dict[str, Any]) -> tuple[int, int, int]:
    """Least, first and greatest number of replicas, with Serve's defaults."""
    scaling = scaling_of(deployment)
    if scaling is None:
        count = int(deployment.get("num_replicas") or 1)
        return count, count, count
    least, first = int(scaling["min_replicas"]), scaling.get("initial_replicas")
    return least, least if first is None else int(first), int(scaling["max_replicas"])


def packed(shares: list[int]) -> int:
    """GPUs for these shares, in ten thousandths: a fraction is never split over two, and the largest go first
    (first fit decreasing: the fewest for shares that divide each other, and otherwise few more)."""
    whole = sum(share // _WHOLE for share in shares if share >= _WHOLE)
    free: list[int] = []
    for share in sorted((share for share in shares if 0 < share < _WHOLE), reverse=True):
        for i, left in enumerate(free):
            if left >= share:
                free[i] -= share
                break
        else:
            free.append(_WHOLE - share)
    return whole + len(free)


def _deployments(config: ConfigFile) -> Iterator[tuple[str, dict[str, Any]]]:
    """Application name and deployment; of rerankers also when the file says nothing of it."""
    for application in config.applications:
        deployments = application.get("deployments") or []
        named = {deployment["name"] for deployment in deployments}
        if application["name"] in config.rerankers and "Reranker" not in named:
            deployments = [*deployments, {"name": "Reranker"}]
        for deployment in deployments:
            yield application["name"], deployment


def _variant(
    name: str, args: RerankerArgs, gpus: float, replicas: tuple[int, int, int], card: int, hub: "_Hub"
) -> VariantPlan:
    shape: Shape | None = None
    fit: Fit | None = None
    problem = None
    if gpus:
        try:
            shape = find_shape(args, hub.config)
            fit = judge(args, shape, gpus, card)
            problem = fit.problem
            if fit.needs is None:
                problem = f"what {shape.config.get('model_type')!r} models need isn't known here"
        except (ValueError, OSError) as error:
            problem = str(error)
    needs = fit.needs if fit is not None else None
    return VariantPlan(
        variant=name,
        model=args.model,
        source=shape.source if shape is not None else None,
        num_gpus=gpus,
        min_replicas=replicas[0],
        initial_replicas=replicas[1],
        max_replicas=replicas[2],
        share_gib=min(gpus, 1) * card / GIB,
        budget_gib=fit.budget_bytes / GIB if fit is not None else None,
        needs_gib=(needs.weights / GIB, needs.kv_cache / GIB, needs.workspace / GIB) if needs else None,
        total_needs_gib=needs.total / GIB if needs else None,
        kv_tokens=fit.kv_tokens if fit is not None and needs else None,
        prompts=fit.kv_tokens // fit.max_model_len if fit is not None and needs and fit.max_model_len else None,
        smallest_num_gpus=fit.smallest if fit is not None else None,
        problem=problem,
    )


class _Hub:
    """Asks the hub until it can't be reached once: every further try would cost its seconds again."""

    def __init__(self) -> None:
        self._down: ConnectionError | None = None

    def config(self, name: str, revision: str | None) -> dict[str, Any]:
        if self._down is not None:
            raise self._down
        try:
            return hub_config(name, revision)
        except ConnectionError as error:
            self._down = error
            raise


def _cells(variant: VariantPlan) -> list[str]:
    replicas = f"{variant.min_replicas}"
    if variant.max_replicas != variant.min_replicas:
        replicas += f" to {variant.max_replicas}"
    if variant.initial_replicas != variant.min_replicas:
        replicas += f", first {variant.initial_replicas}"
    if not variant.num_gpus:
        return [variant.variant, "CPU", "-", "-", "-", "-", "-", replicas, "-"]
    needs = "not known"
    if variant.needs_gib is not None:
        parts = " + ".join(gib(int(part * GIB)) for part in variant.needs_gib)
        needs = f"{gib(int((variant.total_needs_gib or 0) * GIB))} = {parts}"
    share = max(1, round(variant.num_gpus * _WHOLE))
    verdict = "no" if variant.problem is not None else "yes"
    if variant.smallest_num_gpus is not None:
        verdict += f", from {shown(variant.smallest_num_gpus)}"
    return [
        variant.variant,
        f"{variant.num_gpus:g}",
        f"{variant.share_gib:.2f}",
        needs,
        "-" if variant.kv_tokens is None else f"{variant.kv_tokens:,}",
        "-" if variant.prompts is None else f"{variant.prompts:,}",
        str(_WHOLE // share) if share <= _WHOLE else f"1 on {variant.num_gpus:g}",
        replicas,
        verdict,
    ]


def _lined_up(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
