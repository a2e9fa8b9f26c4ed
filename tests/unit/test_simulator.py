"""The fleet simulator: its queue against a formula and against every chunk simulated, its laws, its command."""

import functools
import heapq
import json
import math
import time
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy
from ray.serve.config import AutoscalingConfig

from serve_app.autoscaling import DrainTime, compare, report, traces
from serve_app.autoscaling.controller import Controller
from serve_app.autoscaling.nodes import Nodes, NodeType
from serve_app.autoscaling.scenario import SCALING, Scenario, read
from serve_app.autoscaling.simulator import Variant, simulate
from serve_app.autoscaling.traces import Trace
from serve_app.autoscaling.workload import Arrivals, Queue, Service
from serve_app.cli import main
from serve_app.configfile import ConfigError
from serve_app.gateway.scoring import even_chunk

pytestmark = pytest.mark.filterwarnings("ignore")


def steady(seconds, calls_per_s, tokens, pairs=1.0, name="steady"):
    """Calls of the kinds `tokens`, each `calls_per_s`."""
    kinds = [
        np.array([values], dtype=float) for values in (calls_per_s, tokens, np.broadcast_to(pairs, len(tokens)))
    ]
    return Trace(name, seconds, np.zeros(1), *kinds)


def config(**changes):
    return AutoscalingConfig(**{**SCALING, **changes})


def scaled(trace, policy, scaling=None, variant=None, **options):
    return simulate(trace, variant or Variant(), scaling or config(), policy, **options)


# The queue


@pytest.mark.parametrize("tokens", [[1000.0], [250.0, 1750.0]])
def test_one_replica_waits_as_pollaczek_and_khinchine_say(tokens):
    service = Service(tokens_per_s=1000.0, timeout_s=1e6, overhead_s=0.0)
    trace = steady(30_000, [0.6 / len(tokens)] * len(tokens), tokens)
    arrivals = Arrivals(trace, service, 0.1, seed=1)
    queue = Queue(arrivals, service, 0.1)
    queue.advance(0, arrivals.ticks, 1)
    waits = (np.array(queue._first_wait) + np.array(queue._last_wait)) / 2
    mean = (waits * arrivals.calls).sum() / arrivals.calls.sum()
    rate, sizes = arrivals.calls.sum() / trace.seconds, np.array(tokens) / 1000
    counts = arrivals.calls_by_kind.sum(axis=0) / arrivals.calls.sum()
    load, square = rate * (counts * sizes).sum(), rate * (counts * sizes**2).sum()
    assert mean == pytest.approx(square / (2 * (1 - load)), rel=0.07)


def replica_by_replica(trace, service, replicas_at, slo_s, seed):
    """Shares of calls within the SLO and within the deadline, of a first-come queue of chunks over replicas that
    do one chunk at a time."""
    rng = np.random.default_rng(seed)
    calls, events = [], []
    for i, start in enumerate(trace.starts_s):
        end = trace.starts_s[i + 1] if i + 1 < len(trace.starts_s) else trace.seconds
        for kind, rate in enumerate(trace.calls_per_s[i]):
            for at in rng.uniform(start, end, rng.poisson(rate * (end - start))):
                chunks = math.ceil(trace.pairs_per_call[i, kind] / service.pairs_per_call)
                seconds = trace.tokens_per_call[i, kind] / service.tokens_per_s / chunks
                events.append((at, 2, len(calls)))
                calls.append([at, chunks, seconds, False])
    events += [(float(second), 1, 0) for second in range(int(trace.seconds))]
    heapq.heapify(events)
    waiting, idle, running, in_time, met = deque(), replicas_at(0), replicas_at(0), 0, 0
    while events:
        now, what, number = heapq.heappop(events)
        if what == 1:
            idle, running = idle + replicas_at(now) - running, replicas_at(now)
        elif what == 2:
            waiting.extend([number] * calls[number][1])
        else:
            idle += 1
            call = calls[number]
            call[1] -= 1
            call[3] |= now >= call[0] + service.timeout_s
            if not call[1] and not call[3]:
                in_time += 1
                met += now + service.overhead_s - call[0] <= slo_s
        while idle > 0 and waiting:
            number = waiting.popleft()
            call = calls[number]
            if now >= call[0] + service.timeout_s:
                call[3] = True
                continue
            idle -= 1
            heapq.heappush(events, (min(now + call[2], call[0] + service.timeout_s), 0, number))
    return met / len(calls), in_time / len(calls)


def test_overload_ends_as_when_every_chunk_and_replica_is_simulated():
    trace, service, slo_s = traces.flash_sale(240.0), Service(), 2.0

    def replicas_at(now):
        return 12 if now < 100 else 60 if now < 130 else 100

    arrivals = Arrivals(trace, service, 0.1, seed=3)
    queue = Queue(arrivals, service, 0.1)
    for tick in range(0, arrivals.ticks, 10):
        queue.advance(tick, min(tick + 10, arrivals.ticks), replicas_at(tick * 0.1))
    answers = queue.answers(slo_s)
    ours = answers.met.sum() / arrivals.calls.sum(), answers.in_time.sum() / arrivals.calls.sum()
    assert ours == pytest.approx(replica_by_replica(trace, service, replicas_at, slo_s, seed=3), abs=0.02)


@settings(max_examples=40, deadline=None)
@given(
    load=st.floats(0.2, 4.0),
    replicas=st.lists(st.integers(0, 12), min_size=1, max_size=8),
    timeout_s=st.floats(0.2, 20.0),
    seed=st.integers(0, 1000),
)
def test_every_call_is_answered_or_expired_or_still_open(load, replicas, timeout_s, seed):
    service = Service(timeout_s=timeout_s)
    trace = steady(20.0 * len(replicas), [20 * load, load], [600.0, 60_000.0], [5, 200])
    arrivals = Arrivals(trace, service, 0.1, seed)
    queue = Queue(arrivals, service, 0.1)
    for i, count in enumerate(replicas):
        queue.advance(200 * i, 200 * (i + 1), count)
    answers = queue.answers(slo_s=1.0)
    ended = answers.in_time + answers.expired + answers.still_open
    assert ended == pytest.approx(arrivals.calls, abs=1e-6)
    for part in (answers.in_time, answers.met, answers.expired, answers.still_open, answers.in_time - answers.met):
        assert part.min() >= -1e-6
    assert queue.backlog_tokens >= -1e-3
    assert queue.busy_s <= 20 * sum(replicas) + 1e-6


def test_a_calls_largest_chunk_is_an_even_part_of_it_as_the_gateway_cuts():
    service = Service(tokens_per_s=1000.0, pairs_per_call=64)
    pairs = [1, 5, 64, 65, 200, 1000]
    alone = Arrivals(steady(1.0, [1.0] * len(pairs), [float(p) for p in pairs], pairs), service, 0.1, seed=0)
    assert alone.chunk_s[0] * 1000 == pytest.approx([even_chunk(p, 64) for p in pairs])


# Nodes


@pytest.mark.parametrize(
    ("share", "replicas"), [(0.25, 16), (0.3, 12), (0.5, 8), (0.6, 4), (1.0, 4), (2.0, 2), (3.0, 1), (0.1, 40)]
)
def test_a_share_never_spans_two_cards(share, replicas):
    assert NodeType(gpus=4).replicas(share) == replicas


@pytest.mark.parametrize("share", [1.5, 8.0])
def test_a_replica_that_fits_on_no_node_is_refused(share):
    with pytest.raises(ValueError, match=f"num_gpus is {share:g}, but nodes have 4"):
        NodeType(gpus=4).replicas(share)


@settings(max_examples=60, deadline=None)
@given(
    moves=st.lists(
        st.tuples(st.sampled_from(["place", "free", "arrive", "idle"]), st.integers(1, 20)), max_size=40
    )
)
def test_cards_are_never_overpacked_and_only_empty_nodes_go(moves):
    nodes, placed, now = Nodes(NodeType(gpus=2, idle_timeout_s=30.0), 0.3), [], 0.0
    for move, count in moves:
        now += 10.0
        if move == "place":
            for node, taken in nodes.place(count).items():
                placed += [node] * taken
        elif move == "free" and placed:
            nodes.free(placed.pop(), 1, now)
        elif move == "arrive":
            nodes.ask_for(count)
            nodes.arrive(now)
        else:
            nodes.drop_idle(now)
        assert all(0 <= node.used <= node.room == 6 for node in nodes.up)
        assert all(node in nodes.up for node in placed)
        assert sum(node.used for node in nodes.up) == len(placed)


# The controller


class Wish:
    def __init__(self, replicas):
        self.replicas, self.seen = replicas, []

    def __call__(self, ctx):
        self.seen.append((ctx.current_time, ctx.total_num_requests, ctx.total_queued_requests))
        return self.replicas, {}


def test_serves_own_delay_and_bounds_apply():
    controller = Controller(config(upscale_delay_s=5, max_replicas=7), Wish(9))
    targets = [controller.decide(float(now), 2, 2) for now in range(8)]
    assert targets == [2, 2, 2, 2, 2, 7, 2, 2]


def test_a_policy_sees_the_mean_of_what_was_pushed():
    wish = Wish(1)
    controller = Controller(config(look_back_period_s=4.0), wish)
    for now, ongoing in enumerate([0, 0, 8, 8, 8]):
        controller.handle.sample(float(now), {"ongoing": ongoing, "queued": 0})
    controller.decide(4.0, 1, 1)
    controller.handle.push(4.0)
    controller.decide(5.0, 1, 1)
    # From second 1 to second 5: one second of 0, three of 8.
    assert wish.seen == [(4.0, 0.0, 0.0), (5.0, 6.0, 0.0)]


def test_the_real_clock_is_back_after_a_decision():
    from ray.serve import autoscaling_policy

    Controller(config(), Wish(1)).decide(5.0, 1, 1)
    assert autoscaling_policy.time is time


# Runs

SALE = traces.flash_sale(450.0)


@functools.cache
def sale(policy, seed=0):
    make = {"drain-time": lambda: DrainTime(**Scenario().policy_kwargs), "stock": stock}[policy]
    return scaled(SALE, make(), seed=seed)


def stock():
    return replica_queue_length_autoscaling_policy


@pytest.mark.parametrize("policy", ["drain-time", "stock"])
def test_the_same_seed_gives_the_same_run(policy):
    again = scaled(SALE, DrainTime(**Scenario().policy_kwargs) if policy == "drain-time" else stock())
    one = sale(policy)
    assert (again.missed, again.gpu_hours, again.p99_s) == (one.missed, one.gpu_hours, one.p99_s)
    assert np.array_equal(again.timeline.running, one.timeline.running)
    assert sale(policy, seed=1).calls != one.calls


@pytest.mark.parametrize("policy", ["drain-time", "stock"])
def test_replicas_stay_within_bounds_and_start_after_their_cold_start(policy):
    timeline = sale(policy).timeline
    assert timeline.target.min() >= 1
    assert timeline.target.max() <= 200
    assert (timeline.running <= timeline.held).all()
    first = np.argmax(timeline.target > timeline.target[0])
    ready = np.argmax(timeline.running > timeline.running[0])
    assert timeline.seconds[ready] - timeline.seconds[first] >= Variant().start_s


def test_a_sale_needs_new_nodes_so_replicas_wait_for_them_too():
    waits = scaled(SALE, DrainTime(**Scenario().policy_kwargs))
    warm = scaled(SALE, DrainTime(**Scenario().policy_kwargs), variant=Variant(node=NodeType(provision_s=0.1)))
    assert warm.missed < 0.6 * waits.missed
    assert waits.node_gpu_hours >= waits.gpu_hours


def test_gpu_hours_are_shares_times_time():
    result = scaled(steady(1800.0, [10.0], [600.0]), None, config(min_replicas=6, max_replicas=6))
    assert result.gpu_hours == pytest.approx(6 * 0.25 * 0.5)
    # Six quarters fit on one node of four.
    assert result.node_gpu_hours == pytest.approx(4 * 0.5)


@pytest.mark.parametrize("policy", ["drain-time", "stock"])
def test_silence_after_load_ends_at_no_replicas_and_the_next_call_starts_one(policy):
    calls = np.concatenate([np.full(120, 5.0), np.zeros(300), np.full(120, 5.0)])[:, None]
    trace = Trace("pause", 540.0, np.arange(540.0), calls, np.full((540, 1), 7500.0), np.full((540, 1), 50.0))
    make = {"drain-time": lambda: DrainTime(**Scenario().policy_kwargs), "stock": stock}[policy]
    scaling = config(min_replicas=0, downscale_delay_s=30)
    result = scaled(trace, make(), scaling, Variant(node=NodeType(provision_s=1.0), start_s=5.0))
    running = result.timeline.running
    assert running[100] >= 1
    assert running[410] == 0
    assert running[-1] >= 1


def test_drain_time_follows_tokens_where_calls_hardly_change():
    calls = np.full((900, 2), [40.0, 1.0])
    calls[300:, 1] = 6.0
    each = np.ones((900, 2))
    shift = Trace("shift", 900.0, np.arange(900.0), calls, each * [600.0, 60_000.0], each * [5.0, 200.0])
    result = scaled(shift, DrainTime(**Scenario().policy_kwargs))
    assert calls[-1].sum() < 1.15 * calls[0].sum()
    needed = (shift.tokens_per_s / 40_000 / 0.8)[[0, -1]]
    assert result.timeline.target[200] == pytest.approx(needed[0], abs=3)
    assert result.timeline.target[-1] == pytest.approx(needed[1], abs=5)


def test_a_few_reports_decide_as_one_from_each_replica():
    few, each = (scaled(SALE, DrainTime(**Scenario().policy_kwargs), reports=count) for count in (4, 1000))
    apart = np.abs(few.timeline.target - each.timeline.target)
    # A sample that comes a second later can begin Serve's upscale delay a decision later.
    assert apart.mean() <= 0.04 * each.timeline.target.max()
    assert few.missed_share == pytest.approx(each.missed_share, abs=0.01)
    assert few.gpu_hours == pytest.approx(each.gpu_hours, rel=0.03)


def test_deciding_once_a_second_does_as_serve_does_ten_times_a_second():
    often = scaled(SALE, DrainTime(**Scenario().policy_kwargs), decide_every_s=0.1)
    assert often.missed_share == pytest.approx(sale("drain-time").missed_share, abs=0.01)
    assert often.gpu_hours == pytest.approx(sale("drain-time").gpu_hours, rel=0.03)


def test_a_large_fleet_takes_no_longer_than_a_small_one():
    scenario, sale_of_many = Scenario().scaled(100), traces.flash_sale(600.0).scaled(100)
    candidate = scenario.drain_time()
    began = time.process_time()
    result = simulate(sale_of_many, scenario.variant, candidate.config, candidate.make())
    # Two minutes for a day are 0.8 s for ten minutes; fourfold, for slower machines.
    assert result.peak_replicas > 9_000
    assert time.process_time() - began < 3.3


# The command


def test_the_command_prints_a_table_and_writes_json_and_png(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    trace = tmp_path / "mine.csv"
    trace.write_text("seconds,calls_per_s,tokens_per_call\n0,20,3000\n60,60,3000\n120,20,3000\n")
    files = ["--json", str(tmp_path / "o.json"), "--png", str(tmp_path / "o.png")]
    assert main(["simulate", "--trace", str(trace), "--policy", "drain-time", *files]) == 0
    assert "drain-time" in capsys.readouterr().out
    (written,) = json.loads((tmp_path / "o.json").read_text())
    (policy,) = written["policies"]
    assert policy["settings"]["target_drain_s"] == Scenario().policy_kwargs["target_drain_s"]
    assert len(policy["timeline"]["running"]) == len(policy["timeline"]["missed_share_so_far"])
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trace", "flash"], "--trace is 'flash'; did you mean 'flash-sale'?"),
        (["--trace", "none.csv"], "none.csv: cannot be read"),
        (["--policy", "no.such:Policy"], "--policy is 'no.such:Policy', which cannot be imported"),
        (["--variant", "x"], "--variant is 'x', but there is no --config"),
        (["--config", "configs/fleet.yaml", "--variant", "qwen3-9b"], "did you mean"),
        (["--slo-ms", "9000"], "--slo-ms is 9000, but calls end after 5000 ms"),
        (["--json", "no/such/folder/x.json"], "there is no folder no/such/folder"),
        (["--json", "configs"], "--json is configs, which cannot be written: Is a directory"),
        (["--json", "/proc/x.json"], "--json is /proc/x.json, which cannot be written"),
        (["--policy", "math:pi"], "--policy is 'math:pi', which is 3.14"),
        (["--search", "0"], "--search is 0; allowed: 1 or more"),
    ],
)
def test_what_the_command_cannot_do_is_said_by_name_and_value(words, message, capsys):
    assert main(["simulate", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_picture_of_an_unknown_kind_is_refused_before_the_work(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["simulate", "--png", str(tmp_path / "x.foo")]) == 2
    assert "x.foo; allowed endings: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_policy_of_ones_own_runs_by_its_import_path(tmp_path, monkeypatch, capsys):
    (tmp_path / "mypolicy.py").write_text(
        "class Nine:\n    def __call__(self, ctx):\n        return 9, {}\n\n\ndef eight(ctx):\n    return 8, {}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    trace = tmp_path / "mine.csv"
    trace.write_text("seconds,calls_per_s,tokens_per_call\n0,20,3000\n300,20,3000\n")
    for policy in ("mypolicy:Nine", "mypolicy:eight"):
        assert main(["simulate", "--trace", str(trace), "--policy", policy]) == 0
        assert policy in capsys.readouterr().out


def test_a_config_s_own_policy_gets_its_arguments_and_the_others_none_of_them(tmp_path, monkeypatch, capsys):
    (tmp_path / "ownpolicy.py").write_text(
        "class Many:\n    def __init__(self, replicas):\n        self.replicas = replicas\n\n"
        "    def __call__(self, ctx):\n        return self.replicas, {}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    trace = tmp_path / "mine.csv"
    trace.write_text("seconds,calls_per_s,tokens_per_call\n0,20,3000\n60,20,3000\n")
    fleet = yaml.safe_load(Path("configs/fleet.yaml").read_text())
    (application,) = (a for a in fleet["applications"] if a["name"] == "qwen3-4b")
    policy = {"policy_function": "ownpolicy.Many", "policy_kwargs": {"replicas": 3}}
    application["deployments"][0]["autoscaling_config"]["policy"] = policy
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(fleet))
    words = ["simulate", "--config", str(config), "--variant", "qwen3-4b", "--trace", str(trace)]
    assert main([*words, "--policy", "ownpolicy:Many"]) == 0
    assert main([*words, "--policy", "drain-time"]) == 0
    scenario = read(config, "qwen3-4b")
    assert scenario.imported("ownpolicy:Many").make()(None) == (3, {})
    assert scenario.policy_kwargs == Scenario().policy_kwargs


@pytest.mark.parametrize("kwargs", [{}, {"target_drain_s": 3.0, "expected_tokens_per_s": 9000.0}])
def test_a_config_s_drain_time_is_simulated_with_its_own_arguments(tmp_path, kwargs):
    fleet = yaml.safe_load(Path("configs/fleet.yaml").read_text())
    (application,) = (a for a in fleet["applications"] if a["name"] == "qwen3-4b")
    policy = {"policy_function": "serve_app.autoscaling.DrainTime", "policy_kwargs": kwargs}
    application["deployments"][0]["autoscaling_config"]["policy"] = policy
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(fleet))
    scenario = read(tmp_path / "config.yaml", "qwen3-4b")
    made, meant = scenario.drain_time().make(), DrainTime(**kwargs)
    assert (made.target_drain_s, made.expected_tokens_per_s) == (meant.target_drain_s, meant.expected_tokens_per_s)
    assert scenario.variant.service.tokens_per_s == kwargs.get("expected_tokens_per_s", Service().tokens_per_s)


def test_a_config_gives_a_variant_its_limits_and_deadline():
    scenario = read_fleet("qwen3-4b")
    assert scenario.variant.num_gpus == 0.5
    assert scenario.variant.service.pairs_per_call == 32
    # A cascade of three stages within 5 s is what uses it first.
    assert scenario.variant.service.timeout_s == pytest.approx(5 / 3)
    assert scenario.scaling["max_replicas"] == 4
    with pytest.raises(ConfigError, match="did you mean 'qwen3-4b'"):
        read_fleet("qwen3-4")


def read_fleet(variant):
    return read(Path("configs/fleet.yaml"), variant)


def test_the_comparison_says_how_drain_time_stands_beside_the_others():
    scenario, trace = Scenario(), traces.flash_sale(300.0)

    def row(candidate):
        result = simulate(trace, scenario.variant, candidate.config, candidate.make(), reports=candidate.reports)
        return compare.Row(candidate.name, {}, (result,))

    tuned = scenario.stock("Serve, tuned for this trace", {"target_ongoing_requests": 1.0})
    rows = tuple(row(candidate) for candidate in (scenario.drain_time(), tuned, scenario.instant(trace)))
    comparison = compare.Comparison(trace, 2.0, rows)
    text = report.table([comparison])
    assert "drain-time misses" in text
    assert "instant reaction misses" in text
    assert [policy["policy"] for policy in json.loads(report.as_json([comparison]))[0]["policies"]] == [
        row.name for row in rows
    ]
