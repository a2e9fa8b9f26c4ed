"""`serve-app simulate`: from the command line's words to traces, a scenario and candidates, and out again."""

import argparse
import logging
import sys
import time
from dataclasses import replace
from pathlib import Path

from serve_app.autoscaling import report, traces
from serve_app.autoscaling.compare import Bench, Comparison
from serve_app.autoscaling.scenario import Candidate, Scenario, read
from serve_app.autoscaling.traces import Trace, TraceError
from serve_app.config import closest
from serve_app.configfile import ConfigError

_DEFAULT_SLO_S = 2.0


class SimulationError(ValueError):
    """What is wrong with the command line, the trace or the config."""


def run(arguments: argparse.Namespace) -> None:
    """Prints the comparison and writes the files that were asked for. Raises SimulationError."""
    # The policy says whenever it wants more: a line a simulated second.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    began = time.monotonic()
    _check_files(arguments)
    try:
        scenario = _scenario(arguments)
        scenario.variant.node.replicas(scenario.variant.num_gpus)
        chosen = [trace.scaled(arguments.scale) for trace in _traces(arguments.trace)]
        comparisons = _compare(arguments, scenario.scaled(arguments.scale), chosen)
    except (TraceError, ConfigError, ValueError) as error:
        raise SimulationError(str(error)) from error
    print(report.table(comparisons))
    print(f"\nsimulated in {time.monotonic() - began:.0f} s", file=sys.stderr)
    if arguments.json:
        arguments.json.write_text(report.as_json(comparisons) + "\n", "utf-8")
    if arguments.png:
        for comparison in comparisons:
            png: Path = arguments.png
            several = len(comparisons) > 1
            report.plot(comparison, png.with_stem(f"{png.stem}-{comparison.trace.name}") if several else png)


def _check_files(arguments: argparse.Namespace) -> None:
    """Before minutes of work, not after."""
    for option in ("json", "png"):
        path: Path | None = getattr(arguments, option)
        if path and not path.parent.is_dir():
            raise SimulationError(f"--{option} is {path}, but there is no folder {path.parent}")
        if path:
            _check_writable(option, path)
    if arguments.png:
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
        except ImportError:
            raise SimulationError("--png needs matplotlib: pip install 'serve-app[simulate]'") from None
        suffix, known = arguments.png.suffix.removeprefix("."), FigureCanvasAgg.get_supported_filetypes()
        if suffix and suffix.lower() not in known:
            raise SimulationError(f"--png is {arguments.png}; allowed endings: {', '.join(sorted(known))}")
    for option, least in (("search", 1), ("gpus_per_node", 1), ("seed", 0)):
        value = getattr(arguments, option)
        if value is not None and value < least:
            raise SimulationError(f"--{option.replace('_', '-')} is {value}; allowed: {least} or more")


def _check_writable(option: str, path: Path) -> None:
    is_new = not path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise SimulationError(f"--{option} is {path}, which cannot be written: {error.strerror}") from None
    if is_new:
        path.resolve().unlink()


def _traces(name: str) -> list[Trace]:
    if name == "all":
        return [make() for make in traces.MADE.values()]
    if name in traces.MADE:
        return [traces.MADE[name]()]
    if not name.lower().endswith(".csv"):
        known = [*traces.MADE, "all"]
        raise TraceError(f"--trace is {name!r}; {closest(name, known)} known: {', '.join(known)}, or a FILE.csv")
    return [traces.from_csv(Path(name))]


def _scenario(arguments: argparse.Namespace) -> Scenario:
    if arguments.variant and not arguments.config:
        raise ConfigError(f"--variant is {arguments.variant!r}, but there is no --config that could have it")
    scenario = read(arguments.config, arguments.variant) if arguments.config else Scenario()
    variant = scenario.variant
    service, node = variant.service, variant.node
    if arguments.tokens_per_s:
        service = replace(service, tokens_per_s=arguments.tokens_per_s)
    if arguments.provision_s:
        node = replace(node, provision_s=arguments.provision_s)
    if arguments.gpus_per_node:
        node = replace(node, gpus=arguments.gpus_per_node)
    variant = replace(variant, service=service, node=node, start_s=arguments.start_s or variant.start_s)
    return replace(scenario, variant=variant)


def _compare(arguments: argparse.Namespace, scenario: Scenario, chosen: list[Trace]) -> list[Comparison]:
    deadline_s = scenario.variant.service.timeout_s
    slo_s = arguments.slo_ms / 1000 if arguments.slo_ms else min(_DEFAULT_SLO_S, deadline_s)
    if slo_s > deadline_s:
        raise SimulationError(
            f"--slo-ms is {slo_s * 1000:g}, but calls end after {deadline_s * 1000:g} ms; allowed: up to that"
        )
    bench = Bench(scenario, slo_s, arguments.seed, search=arguments.search)
    if arguments.policy == "all":
        return bench.compare_all(chosen)
    if arguments.policy == "fixed":
        return [bench.fixed(trace) for trace in chosen]
    return bench.compare(chosen, [_candidate(arguments.policy, scenario)])


def _candidate(policy: str, scenario: Scenario) -> Candidate:
    if policy == "drain-time":
        return scenario.drain_time()
    if policy == "stock":
        return scenario.stock("Serve's policy", scenario.scaling)
    return scenario.imported(policy)
