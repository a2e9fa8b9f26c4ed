"""Bad canaries under traffic: each rolls back soon after there are enough samples, and no client pays for it."""

import contextlib
import os
import signal
import threading

import pytest

from tests.rollout.conftest import Load, variant
from tests.system.conftest import wait_for

ROUTE = "second"
LIMIT_S = 30.0
# Split changes may take this long to reach a gateway.
REACH_S = 2.0
AT_25 = {"steps": [{"set_weight": 25}, {"analysis": {}}, {"set_weight": 50}]}


@pytest.fixture
def load(fleet):
    with Load(fleet.url, ROUTE) as load:
        wait_for(lambda: len(load.calls) >= 50 or load.errors, 60, what="calls before the rollout")
        yield load


def rolled_back(fleet, load, canary, document):
    """Runs the rollout to its end and says what failed: the guards' verdicts and the share of users' calls."""
    rollout = fleet.operator.start(route=ROUTE, stable="stable", canary=canary, **document)
    looks = []

    def finished():
        looks.append(fleet.operator.show(rollout))
        return looks[-1]["status"] not in ("pending", "warming", "shadowing", "step")

    wait_for(finished, 90, 0.25, f"the end of {canary}")
    *_, last = fleet.operator.history(rollout)
    assert looks[-1]["status"] == "rolled_back", last
    # Stable has the route again.
    wait_for(lambda: load.calls[-1].started > last["at"] + REACH_S, 30, what="calls after the rollback")
    wait_for(lambda: sum(call.started > last["at"] + REACH_S for call in load.calls) >= 50, 30)
    after = [call.meta for call in load.calls if call.started > last["at"] + REACH_S]
    assert {(meta["pipeline"], meta["why"], "rollout" in meta) for meta in after} == {("stable", "split", False)}

    failed = [verdict for verdict in last["figures"].values() if verdict["outcome"] == "fail"]
    assert failed, last
    took_s = min(last["at"] - enough_at(fleet, rollout, load, verdict) for verdict in failed)
    metrics = ", ".join(verdict["metric"] for verdict in failed)
    print(
        f"\n{canary}: rolled back by {metrics} {took_s:.1f} s after there were samples enough; {last['reason']}; "
        f"{load.placed('canary')} canary calls, {load.placed('stable')} stable, of {len(load.calls)} in all; "
        f"slowest {max(call.took_s for call in load.calls):.2f} s"
    )
    assert took_s <= LIMIT_S
    return failed


def enough_at(fleet, rollout, load, verdict):
    """When the last call ended that made the guard's samples enough: as clients saw it, so that what the gateway
    and the controller take their time with counts."""
    needed = verdict["min_samples"]
    calls = [call for call in list(load.calls) if call.meta.get("rollout", {}).get("id") == rollout and call.ended]
    if verdict["stable_samples"] and verdict["stable"] is None:
        # Mirrored calls are samples of both sides, and nearly all of stable's calls are mirrored.
        ends = sorted(call.ended for call in calls)
        return ends[needed - 1]
    sides = []
    for side in ("canary", "stable"):
        counted = [call for call in calls if call.placed == side]
        if verdict["metric"].startswith("latency"):
            counted = [call for call in counted if call.meta["why"] == "split"]
        sides.append(sorted(call.ended for call in counted)[needed - 1])
    return max(sides)


def fallbacks(load):
    return sum(call.meta["why"] == "fallback" for call in load.calls)


def test_one_that_raises(fleet, load):
    failed = rolled_back(fleet, load, "raises", AT_25)
    assert [verdict["metric"] for verdict in failed] == ["degraded_rate"]
    assert fallbacks(load) == load.placed("canary") > 0
    load.check_no_client_paid()


def test_one_that_hangs(fleet, load):
    failed = rolled_back(fleet, load, "hangs", AT_25)
    assert [verdict["metric"] for verdict in failed] == ["degraded_rate"]
    assert fallbacks(load) == load.placed("canary") > 0
    load.check_no_client_paid()


def test_one_four_times_slower(fleet, load):
    failed = rolled_back(fleet, load, "slow", AT_25)
    assert {verdict["metric"] for verdict in failed} <= {"latency_p50_ratio", "latency_p95_ratio"}
    load.check_no_client_paid()


def test_one_that_shuffles_is_caught_before_it_answers_anybody(fleet, load):
    document = {"shadow": 1.0, "steps": [{"analysis": {}}, {"set_weight": 25}, {"analysis": {}}]}
    failed = rolled_back(fleet, load, "shuffles", document)
    assert {verdict["metric"] for verdict in failed} <= {"rbo", "kendall_tau"}
    assert load.placed("canary") == 0
    load.check_no_client_paid()


def test_one_whose_replica_keeps_dying(fleet, load):
    over = threading.Event()

    def kill():
        wait_for(lambda: load.placed("canary") >= 10, 60, what="a canary that answers")
        while not over.is_set():
            for pid in fleet.replica_pids(variant("dies"), "Reranker").values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            over.wait(0.5)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        failed = rolled_back(fleet, load, "dies", AT_25)
    finally:
        over.set()
        killer.join()
    assert "degraded_rate" in {verdict["metric"] for verdict in failed}
    assert fallbacks(load) > 0
    load.check_no_client_paid()
