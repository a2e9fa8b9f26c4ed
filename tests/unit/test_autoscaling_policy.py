"""The scaling policy: by hand, by law, and in a closed loop through the wrapper that Serve puts around it."""

import copy
import itertools
import logging
import math
import random
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import pytest
import ray.serve.autoscaling_policy
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
from ray.serve.autoscaling_policy import _apply_app_level_autoscaling_config, _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from serve_app.autoscaling import DrainTime
from serve_app.autoscaling.load import Load, LoadMeter
from serve_app.autoscaling.policy import Demand

DEPLOYMENT = DeploymentID(name="Reranker", app_name="8b")
START = 1_700_000_000.0
RATE = 1_000.0


class Clock:
    """What Serve's wrapper measures its delays by: `time.time`, not the context's time."""

    now = START

    @classmethod
    def time(cls) -> float:
        return cls.now


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.serve.autoscaling_policy, "time", Clock)


def replica(number: int) -> ReplicaID:
    return ReplicaID(unique_id=f"r{number}", deployment_id=DEPLOYMENT)


def config(**settings: Any) -> AutoscalingConfig:
    return AutoscalingConfig(
        **{"min_replicas": 0, "max_replicas": 100, "upscale_delay_s": 0, "downscale_delay_s": 0, **settings}
    )


def context(**values: Any) -> AutoscalingContext:
    running = values.get("running_replicas", [])
    defaults = {
        "deployment_id": DEPLOYMENT,
        "deployment_name": DEPLOYMENT.name,
        "app_name": DEPLOYMENT.app_name,
        "current_num_replicas": len(running),
        "target_num_replicas": len(running),
        "running_replicas": running,
        "total_num_requests": 0.0,
        "total_queued_requests": 0.0,
        "aggregated_metrics": None,
        "raw_metrics": {},
        "capacity_adjusted_min_replicas": 0,
        "capacity_adjusted_max_replicas": 100,
        "policy_state": {},
        "last_scale_up_time": None,
        "last_scale_down_time": None,
        "current_time": START,
        "config": config(),
    }
    return AutoscalingContext(**{**defaults, **values})


@dataclass
class Controller:
    """What Serve's controller keeps: the last reports, the policy's state, its clock."""

    policy: Callable[[AutoscalingContext], tuple[int, dict[str, Any]]] = field(default_factory=DrainTime)
    config: AutoscalingConfig = field(default_factory=config)
    now: float = START
    state: dict[str, Any] = field(default_factory=dict)
    reports: dict[str, dict[ReplicaID, list[TimeStampedValue]]] = field(default_factory=dict)

    def report(self, number: int, load: Load) -> None:
        for name, value in asdict(load).items():
            self.reports.setdefault(name, {})[replica(number)] = [TimeStampedValue(self.now, value)]

    def look(self, running: Iterable[int], target: int, *, queued: float = 0, requests: float = 0) -> int:
        Clock.now = self.now
        wanted, self.state = self.policy(
            context(
                running_replicas=[replica(n) for n in running],
                target_num_replicas=target,
                total_queued_requests=queued,
                total_num_requests=requests,
                raw_metrics=self.reports,
                policy_state=self.state.copy(),
                current_time=self.now,
                config=self.config,
                capacity_adjusted_max_replicas=self.config.max_replicas,
            )
        )
        return wanted


def wrapped(**settings: Any) -> Controller:
    return Controller(_apply_autoscaling_config(DrainTime()), config(**{"downscale_delay_s": 60, **settings}))


@dataclass
class Steady:
    """Replicas that get `tokens_per_s` each, in calls of 100."""

    controller: Controller
    tokens_per_s: float
    pending: float = 0
    rate: float = RATE
    arrived: float = 0

    def go(self, running: range, target: int, seconds: int, silent: tuple[int, ...] = ()) -> list[int]:
        wanted = []
        for _ in range(seconds):
            self.controller.now += 1
            self.arrived += self.tokens_per_s
            for n in running:
                if n not in silent:
                    load = Load(self.pending, self.arrived, self.arrived / 100, self.rate, 30 if self.rate else 0)
                    self.controller.report(n, load)
            wanted.append(self.controller.look(running, target))
        return wanted


# The arithmetic.


@pytest.mark.parametrize(
    ("backlog", "arrivals", "replicas"),
    [
        (0, 0, 0),
        (1, 0, 1),
        (10_000, 0, 5),  # 10,000 / (1,000 × 2)
        (10_001, 0, 6),
        (0, 4_000, 5),  # 4,000 / (1,000 × 0.8)
        (10_000, 8_000, 10),  # the larger of 5 and 10
        (0, 800 * 1.1 * 3 / 1.1, 3),  # 2640.0000000000005 / 0.88: a hair above is not one more
    ],
)
def test_demand_by_hand(backlog: float, arrivals: float, replicas: int) -> None:
    assert Demand(backlog, arrivals).replicas(RATE, drain_s=2, utilization=0.8) == replicas


amounts = st.floats(0, 1e7)
rates = st.floats(1, 1e5)


@given(amounts, amounts, amounts, rates, st.floats(0.1, 60), st.floats(0.05, 1))
def test_demand_is_the_least_that_does_and_grows_with_the_work(
    backlog: float, arrivals: float, more: float, rate: float, drain_s: float, utilization: float
) -> None:
    n = Demand(backlog, arrivals).replicas(rate, drain_s, utilization)
    busy = max(backlog / drain_s, arrivals / utilization) / rate
    assert busy <= n + 1e-6
    assert n <= 1 or n - 1 < busy
    assert n <= Demand(backlog + more, arrivals).replicas(rate, drain_s, utilization)
    assert n <= Demand(backlog, arrivals + more).replicas(rate, drain_s, utilization)
    assert n >= Demand(backlog, arrivals).replicas(rate * 2, drain_s, utilization)


@pytest.mark.parametrize("name", ["target_drain_s", "max_utilization", "expected_tokens_per_s"])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, "2", True, [1], pytest.param(10**400, id="huge")])
def test_a_bad_argument_is_named_with_its_value_and_what_is_allowed(name: str, value: object) -> None:
    most = ", up to 1" if name == "max_utilization" else ""
    assert DrainTime.problems({name: value, "typo": 1}) == {
        name: f"{name} is {value!r}; allowed: a number above 0{most}",
        "typo": "typo is no setting of serve_app.autoscaling:DrainTime; known: "
        "['target_drain_s', 'max_utilization', 'expected_tokens_per_s']",
    }


def test_utilization_is_at_most_one() -> None:
    assert "max_utilization" in DrainTime.problems({"max_utilization": 1.5})
    assert not DrainTime.problems({"target_drain_s": 5, "max_utilization": 1, "expected_tokens_per_s": None})


@pytest.mark.parametrize(
    "arguments",
    [
        {"target_drain_s": 0},
        {"typo": 1},
        {"self": 1},
        {"max_utilization": None},
        {"expected_tokens_per_s": "fast"},
    ],
)
def test_a_policy_with_bad_arguments_decides_as_with_defaults_and_says_so_once(
    arguments: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "ray.serve"):
        steady = Steady(Controller(DrainTime(**arguments)), tokens_per_s=100, pending=5_000)
        assert steady.go(range(2), 2, 10) == Steady(Controller(), 100, 5_000).go(range(2), 2, 10)
    (record,) = caplog.records
    assert next(iter(arguments)) in record.getMessage()


def test_as_an_application_s_policy_it_leaves_all_as_it_is_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    policy = _apply_app_level_autoscaling_config(DrainTime())
    gateway = DeploymentID(name="Gateway", app_name="8b")
    busy = [replica(n) for n in range(3)]
    contexts = {
        DEPLOYMENT: context(running_replicas=busy, total_num_requests=500.0),
        # Asleep, with a call that waits for it.
        gateway: context(total_num_requests=1.0),
    }
    with caplog.at_level(logging.ERROR, "ray.serve"):
        for _ in range(3):
            wanted, states = policy(contexts)
            assert wanted == {DEPLOYMENT: 3, gateway: 1}
            assert states.keys() == contexts.keys()
    (record,) = caplog.records
    assert "belongs under deployments[].autoscaling_config.policy" in record.getMessage()


# One look after another.


def test_backlog_of_replicas_and_handles_by_hand() -> None:
    controller = Controller()
    steady = Steady(controller, tokens_per_s=100, pending=5_000)
    assert steady.go(range(2), 2, 10)[-1] == 5  # 10,000 / (1,000 × 2)
    # 40 calls of 100 tokens wait: 14,000 / 2,000.
    assert controller.look(range(2), 2, queued=40) == 7


def test_steady_arrivals_by_hand() -> None:
    assert Steady(Controller(), tokens_per_s=900).go(range(4), 4, 40)[-1] == 5  # 3,600 / 800 = 4.5
    assert Steady(Controller(), tokens_per_s=790).go(range(4), 4, 40)[-1] == 4
    # Shrinking leaves 15 % more room: 10 × 300 / 680 = 4.4.
    assert Steady(Controller(), tokens_per_s=300).go(range(10), 10, 40)[-1] == 5


def test_nothing_shrinks_before_the_long_window_has_been_seen() -> None:
    wanted = Steady(Controller(), tokens_per_s=100).go(range(10), 10, 40)
    assert wanted[:30] == [10] * 30
    assert wanted[-1] == 2


def test_without_any_rate_the_number_holds_unless_one_is_stated() -> None:
    assert set(Steady(Controller(), 500, pending=50_000, rate=0).go(range(2), 2, 40)) == {2}
    stated = Controller(DrainTime(expected_tokens_per_s=5_000))
    assert Steady(stated, 0, pending=10_000, rate=0).go(range(2), 2, 3)[-1] == 2
    assert Steady(stated, 0, pending=20_000, rate=0).go(range(2), 2, 3)[-1] == 4


def test_a_just_started_replica_changes_nobody_elses_rate() -> None:
    controller = Controller()
    Steady(controller, 500, pending=4_000).go(range(1), 1, 5)
    controller.report(1, Load(0, 0, 0, 0, 0))
    assert controller.look(range(2), 2) == 2
    controller.report(1, Load(4_000, 4_000, 40, 0, 0.3))
    assert controller.look(range(2), 2) == 4


def test_a_restarted_controller_holds_until_it_knows() -> None:
    controller = Controller()
    assert controller.look([], 7) == 7
    assert controller.look(range(7), 7, queued=1_000, requests=1_000) == 7
    assert isinstance(controller.state, dict)


def test_reports_that_come_in_one_by_one_after_a_restart_are_no_flood() -> None:
    controller = Controller()
    controller.look([], 6)
    wanted = []
    counts = {n: 1e9 + n * 1e7 for n in range(6)}
    for second in range(90):
        controller.now += 1
        for n in counts:
            counts[n] += 500
            # Some had their first report lost, one is being reconfigured for a minute.
            if second >= (0, 3, 9, 14, 29, 60)[n]:
                controller.report(n, Load(0, counts[n], counts[n] / 100, RATE, 30))
        wanted.append(controller.look(range(6 if second >= 50 else 5), 6))
    assert max(wanted) == 6


@pytest.mark.parametrize("silence_s", [5, 20, 60, 600])
@pytest.mark.parametrize("silent", [(0,), (0, 1, 2, 3)])
def test_metrics_that_vanish_and_come_back_are_no_flood(silence_s: int, silent: tuple[int, ...]) -> None:
    steady = Steady(wrapped(), tokens_per_s=600)
    wanted = steady.go(range(4), 4, 40) + steady.go(range(4), 4, silence_s, silent)
    wanted += steady.go(range(4), 4, 60)
    assert set(wanted) == {4}


def test_a_replica_that_is_not_running_for_a_moment_is_not_counted_anew() -> None:
    """Serve takes a replica out of the running ones while it gets a new user_config."""
    steady = Steady(wrapped(), tokens_per_s=600)
    wanted = steady.go(range(4), 4, 600)
    wanted += steady.go(range(3), 4, 3)
    wanted += steady.go(range(4), 4, 60)
    assert set(wanted) == {4}


def test_stale_reports_hold_the_number() -> None:
    controller = Controller()
    steady = Steady(controller, tokens_per_s=100, pending=20_000)
    assert steady.go(range(4), 4, 5)[-1] == 40
    controller.now += 31
    assert controller.look(range(4), 4) == 4
    # One is enough to keep the others from being given up.
    steady.pending = 0
    assert set(steady.go(range(4), 4, 120, silent=(3,))[60:]) == {4}


def test_clocks_set_back_or_forward_make_no_flood_and_are_survived() -> None:
    steady = Steady(wrapped(), tokens_per_s=600)
    wanted = steady.go(range(4), 4, 60)
    for jump_s in (-3_600, 7_200):
        steady.controller.now += jump_s
        wanted += steady.go(range(4), 4, 60)
    assert set(wanted) == {4}
    assert Steady(steady.controller, tokens_per_s=900, arrived=steady.arrived).go(range(4), 4, 60)[-1] == 5


def test_zero_only_when_nothing_has_arrived_and_serve_sees_no_request() -> None:
    controller = Controller()
    steady = Steady(controller, tokens_per_s=10)
    assert steady.go(range(1), 1, 60)[-1] == 1
    steady.tokens_per_s = 0
    wanted = steady.go(range(1), 1, 40)
    assert wanted[:29] == [1] * 29
    assert wanted[-1] == 0
    assert controller.look(range(1), 1, requests=0.01) == 1
    assert controller.look(range(1), 1, queued=0.01) == 1
    steady.pending = 1
    assert steady.go(range(1), 1, 1) == [1]


def test_thousands_of_replicas() -> None:
    steady = Steady(Controller(config=config(max_replicas=10_000)), tokens_per_s=500, pending=4_000)
    assert steady.go(range(3_000), 3_000, 3)[-1] == 6_000


def test_what_is_wanted_beyond_the_most_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    steady = Steady(Controller(), tokens_per_s=500)
    with caplog.at_level(logging.INFO, "ray.serve"):
        for pending in range(10_000, 11_000, 50):
            steady.pending = pending
            wanted = steady.go(range(100), 100, 1) + steady.go(range(100), 99, 1)
    assert wanted == [100, 100]
    assert len(caplog.records) <= 20


loads = st.builds(
    Load,
    st.sampled_from([0, 100, 5_000, 1e6]),
    st.floats(0, 1e6),
    st.floats(0, 1e4),
    st.sampled_from([0, 10, 1_000, 1e5]),
    st.sampled_from([0, 0.5, 30]),
)
histories = st.lists(
    st.tuples(st.dictionaries(st.integers(0, 5), loads), st.sampled_from([0.1, 1, 5, 20]), st.floats(0, 50)),
    min_size=1,
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(histories, st.integers(1, 12))
def test_what_shrinks_would_not_grow_again_and_more_backlog_never_wants_less(
    history: list[tuple[dict[int, Load], float, float]], target: int
) -> None:
    controller = Controller()
    for reports, seconds, queued in history:
        controller.now += seconds
        for n, load in reports.items():
            controller.report(n, load)
        before = copy.deepcopy(controller.state)
        wanted = controller.look(range(6), target, queued=queued)
        assert 0 <= wanted <= 100
        if wanted < target:
            assert controller.look(range(6), max(wanted, 1), queued=queued) <= max(wanted, 1)
        after, controller.state = controller.state, before
        assert controller.look(range(6), target, queued=queued + 10) >= wanted
        controller.state = after


garbage = st.one_of(
    st.none(), st.text(max_size=3), st.booleans(), st.floats(), st.sampled_from([-1, 10**400, 1e308, 5e-324, []])
)
series = st.one_of(garbage, st.lists(st.builds(TimeStampedValue, st.floats(), garbage), max_size=2))
names = [*asdict(Load(0, 0, 0, 0, 0)), "ongoing"]
raw = st.one_of(
    garbage,
    st.dictionaries(
        st.sampled_from(names),
        st.one_of(garbage, st.dictionaries(st.integers(0, 3).map(replica), series)),
    ),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(raw, garbage, garbage, st.floats(-1e3, 1e3), st.integers(0, 4)), max_size=8))
def test_garbage_never_raises_and_never_leaves_the_bounds(looks: list[tuple[Any, Any, Any, float, int]]) -> None:
    policy, state = _apply_autoscaling_config(DrainTime()), {}
    for raw_metrics, queued, requests, seconds, running in looks:
        values = {
            "running_replicas": [replica(n) for n in range(running)],
            "target_num_replicas": 3,
            "raw_metrics": raw_metrics,
            "total_queued_requests": queued,
            # Serve's own wrapper compares it when nothing runs.
            "total_num_requests": requests if running else 0,
            "current_time": START + seconds,
            "policy_state": state,
        }
        wanted, state = policy(context(**values))
        assert isinstance(wanted, int)
        assert 0 <= wanted <= 100
        assert isinstance(state, dict)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1, "many", None])
def test_one_replicas_garbage_leaves_the_number_as_it_is(value: Any) -> None:
    steady = Steady(Controller(), tokens_per_s=600)
    wanted = steady.go(range(4), 4, 40)
    for name in names[:-1]:
        wanted += steady.go(range(4), 4, 1)
        steady.controller.reports[name][replica(1)] = [TimeStampedValue(steady.controller.now, value)]
        wanted.append(steady.controller.look(range(4), 4))
    assert set(wanted) == {4}


# A closed loop.


class Server:
    """A replica that reads its calls one after another, at RATE."""

    def __init__(self, number: int, ready: float, reports: float) -> None:
        self.number, self.ready, self.reports = number, ready, reports
        self.clock = self.free = ready
        self.meter = LoadMeter(500, lambda: self.clock)
        self.calls: deque[tuple[float, int, ExitStack, Callable[[int], None]]] = deque()

    def take(self, now: float, tokens: int) -> None:
        self.clock = now
        stack = ExitStack()
        scored = stack.enter_context(self.meter.call(tokens))
        self.free = max(now, self.free) + tokens / RATE
        self.calls.append((self.free, tokens, stack, scored))

    def work(self, now: float) -> None:
        while self.calls and self.calls[0][0] <= now:
            self.clock, tokens, stack, scored = self.calls.popleft()
            scored(tokens)
            stack.close()
        self.clock = now


class Fleet:
    """Servers, the reports that they push, and what Serve makes of the policy's wishes."""

    def __init__(self, seed: int, servers: int, start_s: float = 5, pushed_s: float = 2, **settings: Any) -> None:
        self.choose, self.start_s, self.pushed_s = random.Random(seed), start_s, pushed_s
        settings = {
            "min_replicas": 1,
            "max_replicas": 20,
            "upscale_delay_s": 2,
            "downscale_delay_s": 30,
            **settings,
        }
        self.controller = wrapped(**settings)
        self.servers: list[Server] = []
        self.numbers = itertools.count()
        self.actions: list[tuple[float, int]] = []
        self._grow(servers, START)

    def _grow(self, servers: int, ready: float) -> None:
        while len(self.servers) < servers:
            reports = ready + self.choose.random() * self.pushed_s
            self.servers.append(Server(next(self.numbers), ready, reports))

    def run(self, seconds: float, utilization_of_one: float, tokens: int = 250) -> list[tuple[float, int]]:
        """Poisson arrivals that would keep so many servers busy. Returns the actions: second and new number."""
        begin, target = self.controller.now, len(self.servers)
        actions = []
        gap_s = tokens / RATE / utilization_of_one if utilization_of_one else math.inf
        arrival = begin + self.choose.expovariate(1) * gap_s
        for tick in range(1, int(seconds * 5) + 1):
            now = self.controller.now = begin + tick / 5
            for server in self.servers:
                server.work(now)
            ready = [server for server in self.servers if server.ready <= now]
            while arrival <= now:
                min(ready, key=lambda server: server.free).take(now, tokens)
                arrival += self.choose.expovariate(1) * gap_s
            for server in ready:
                if server.reports <= now:
                    server.reports += self.pushed_s
                    self.controller.report(server.number, server.meter.load())
            requests = sum(len(server.calls) for server in self.servers)
            wanted = self.controller.look([server.number for server in ready], target, requests=requests)
            bounds = self.controller.config
            wanted = max(bounds.min_replicas, min(bounds.max_replicas, wanted))
            if wanted != target:
                target = wanted
                actions.append((now - begin, wanted))
                self.servers = sorted(self.servers, key=lambda server: (server.ready > now, -server.free))[:wanted]
                self._grow(wanted, now + self.start_s)
        return actions


@pytest.mark.parametrize(("seed", "servers"), [(1, 1), (2, 2), (3, 6)])
def test_constant_load_settles(seed: int, servers: int) -> None:
    fleet = Fleet(seed, servers)
    fleet.run(60, 0.6 * servers)
    actions = fleet.run(150, 0.6 * servers)
    assert len(actions) <= 1
    assert abs(len(fleet.servers) - servers) <= 1


def test_a_step_of_load_is_followed_up_and_down_without_flapping() -> None:
    fleet = Fleet(5, 2)
    fleet.run(60, 1)
    up = [servers for _, servers in fleet.run(45, 6)]
    # 6 / 0.8 = 7.5 for the arrivals, and more for what has piled up while the new ones start.
    assert up == sorted(up)
    assert 8 <= up[-1] <= 20
    settled = [servers for _, servers in fleet.run(150, 6)]
    down = [servers for _, servers in fleet.run(150, 1)]
    assert settled + down == sorted(settled + down, reverse=True)
    assert 8 <= settled[-1] <= 12
    assert 2 <= down[-1] <= 3
