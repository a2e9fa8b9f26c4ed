"""A rollout's controller may be killed, frozen, there twice, or without its store: it harms nothing, and the
rollout goes on where it was. Controllers are real processes, stores are files and a real Redis."""

import asyncio
import itertools
import random
import signal
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest

from serve_app.gateway.rollouts import deployed
from serve_app.rollout.controller import Controller
from serve_app.rollout.figures import Figures
from serve_app.rollout.messages import News
from serve_app.rollout.store import Command, Rollout, Store, Transition, open_store
from tests.processes import rollout_process
from tests.processes.redis_server import RedisServer, needs_redis
from tests.processes.rollout_gateway import Users
from tests.processes.rollout_process import Accident, Process, until

# Guards wait for whole buckets.
BUCKET_S = 1
ENOUGH = 20  # samples, by default


@pytest.fixture(scope="module", autouse=True)
def _fast_gateway() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("serve_app.rollout.counters.BUCKET_S", BUCKET_S)
        patch.setattr("serve_app.gateway.rollouts._EVERY_S", 0.02)
        patch.setattr("serve_app.gateway.rollouts._EXCHANGE_TIMEOUT_S", 1.0)
        yield


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    needs_redis()
    with tempfile.TemporaryDirectory() as folder:
        server = RedisServer(Path(folder), "--appendonly", "yes")
        yield server
        server.kill()


@pytest.fixture(scope="module", params=["sqlite", "redis"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


databases = itertools.count()


@pytest.fixture
def url(kind: str, request: pytest.FixtureRequest, folder: Path) -> str:
    return new_url(kind, request, folder)


def new_url(kind: str, request: pytest.FixtureRequest, folder: Path) -> str:
    """An empty store's."""
    if kind == "sqlite":
        return f"sqlite://{folder}/rollouts.db"
    server: RedisServer = request.getfixturevalue("redis_server")
    return f"redis://127.0.0.1:{server.port}/{next(databases)}"


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rollout") as path:
        yield Path(path)


@pytest.fixture
def begin(url: str, folder: Path) -> Iterator[Any]:
    """Starts controllers' processes."""
    begun: list[Process] = []

    def begin(accident: Accident | None = None, lease_s: float = rollout_process.LEASE_S) -> Process:
        begun.append(Process(url, folder, accident, lease_s))
        return begun[-1]

    (folder / "ready-canary-model").touch()
    yield begin
    for process in begun:
        process.kill()


async def start(users: Users, route: str, **document: Any) -> str:
    """The new rollout's id, from the controller that the users' gateway asks."""
    heard = users.answers
    await until(lambda: users.answers > heard + 1, "a controller that has heard what the gateway serves")
    document = {"stable": "stable", "canary": "canary", "guards": {"error_rate": {}}, **document}
    assert users.controller is not None
    reply = await users.controller.ask(
        "start", {"route": route, **document}, uuid.uuid4().hex, "ann", timeout_s=10
    )
    assert reply.error is None, reply
    return str(reply.body["id"])


def states(store: Store, rollout: str) -> list[str]:
    """All that the rollout ever was, each once it was left for the next."""
    history = store.history(rollout)
    for before, after in itertools.pairwise(history):
        assert before.to_status.removesuffix(" at 0 %") == after.from_status.removesuffix(" at 0 %")
        assert before.version < after.version
    return [entry.to_status for entry in history]


def promoted(steps: Sequence[dict[str, Any]]) -> list[str]:
    """What an undisturbed rollout is, from beginning to end."""
    passed, weight = ["pending", "warming at 0 %"], 0
    for i, step in enumerate(steps):
        ((name, value),) = step.items()
        weight = value if name == "set_weight" else weight
        state = "paused in step" if name == "pause" else "step"
        passed.append(f"{state} {i + 1} of {len(steps)} ({name}) at {weight:g} %")
    return [*passed, "promoted at 100 %"]


def never_back(seen: Sequence[float | None]) -> bool:
    """Whether each weight came after a smaller one, or after there was none."""
    weights = [-1 if weight is None else weight for weight in seen]
    return all(a < b for a, b in itertools.pairwise(weights))


# ---- killed in every state

UP = [{"set_weight": weight} for weight in range(1, 41)]
JUDGED = [{"set_weight": 25}, {"analysis": {}}, {"set_weight": 50}]
PAUSED = [{"set_weight": 25}, {"pause": {}}, {"set_weight": 50}]
DOCUMENTS: dict[str, dict[str, Any]] = {
    "pending": {"steps": [{"set_weight": 10}, {"set_weight": 50}]},
    "warming": {"canary": "cold", "steps": [{"set_weight": 50}]},
    "shadowing": {"shadow": 1.0, "steps": [{"analysis": {}}, {"set_weight": 50}]},
    "set_weight": {"steps": UP},
    "analysis": {"steps": JUDGED},
    "pause": {"steps": [{"set_weight": 25}, {"pause": {"duration_s": 3}}, {"set_weight": 50}]},
    "paused": {"steps": JUDGED},
    "inconclusive": {"steps": [{"set_weight": 25}, {"analysis": {"timeout_s": 0.1}}]},
    "promoted": {"steps": [{"set_weight": 50}]},
    "rolled_back": {"steps": JUDGED},
    "aborted": {"steps": PAUSED},
    # Operators ask while no controller lives.
    "asked": {"steps": PAUSED},
    "refused": {"steps": JUDGED},
}
AT_25 = ["pending", "warming at 0 %", "step 1 of 3 (set_weight) at 25 %"]
IN_ANALYSIS = [*AT_25, "step 2 of 3 (analysis) at 25 %"]
IN_PAUSE = [*AT_25, "paused in step 2 of 3 (pause) at 25 %"]
INCONCLUSIVE = ["step 2 of 2 (analysis) at 25 %", "inconclusive in step 2 of 2 (analysis) at 25 %"]
# Status, step and weight when the controller is killed (None: any), and all that the rollout was in the end.
EXPECTED: dict[str, tuple[tuple[Any, ...], list[str]]] = {
    "pending": (("pending", -1, 0), promoted(DOCUMENTS["pending"]["steps"])),
    "warming": (("warming", -1, 0), promoted(DOCUMENTS["warming"]["steps"])),
    "shadowing": (
        ("shadowing", 0, 0),
        [
            "pending",
            "warming at 0 %",
            "shadowing in step 1 of 2 (analysis) at 0 %",
            "step 2 of 2 (set_weight) at 50 %",
            "promoted at 100 %",
        ],
    ),
    "set_weight": (("step", None, None), promoted(UP)),
    "analysis": (("step", 1, 25), promoted(JUDGED)),
    "pause": (("paused", 1, 25), promoted(DOCUMENTS["pause"]["steps"])),
    "paused": (
        ("paused", 1, 25),
        [
            *IN_ANALYSIS,
            "paused in step 2 of 3 (analysis) at 25 %",
            *IN_ANALYSIS[-1:],
            "step 3 of 3 (set_weight) at 50 %",
            "promoted at 100 %",
        ],
    ),
    "inconclusive": (
        ("inconclusive", 1, 25),
        ["pending", "warming at 0 %", "step 1 of 2 (set_weight) at 25 %", *INCONCLUSIVE, "promoted at 100 %"],
    ),
    "promoted": (("promoted", 0, 100), promoted(DOCUMENTS["promoted"]["steps"])),
    "rolled_back": (("rolled_back", 1, 0), [*IN_ANALYSIS, "rolled back at 0 %"]),
    "aborted": (("aborted", 1, 0), [*IN_PAUSE, "aborted at 0 %"]),
    "asked": (
        ("paused", 1, 25),
        [*IN_PAUSE, "step 3 of 3 (set_weight) at 50 %", "promoted at 100 %"],
    ),
    "refused": (("step", 1, 25), [*IN_ANALYSIS, "aborted at 0 %"]),
}
FINISHED = ("promoted", "rolled_back", "aborted")


@dataclass
class Life:
    """Of one rollout: what was stored and in force when the controller was killed, before another one lived, and
    in the end."""

    id: str
    killed: Rollout
    history: list[Transition]
    in_force: float | None
    between: Rollout | None = None
    in_force_between: float | None = None
    resumed_first: float | None = None
    states: list[str] = field(default_factory=list)
    seen: list[float | None] = field(default_factory=list)
    ended: Rollout | None = None
    history_in_the_end: list[Transition] = field(default_factory=list)
    commands: list[tuple[str, str]] = field(default_factory=list)
    counted: Counter[str] = field(default_factory=Counter)
    stored: Counter[str] = field(default_factory=Counter)


@pytest.fixture(scope="module")
def lives(kind: str, request: pytest.FixtureRequest) -> Iterator[dict[str, Life]]:
    """A rollout in every state, each on its route, under one controller that is killed and replaced."""
    with tempfile.TemporaryDirectory(prefix="rollout") as path:
        folder = Path(path)
        url = new_url(kind, request, folder)
        (folder / "ready-canary-model").touch()
        controllers = [Process(url, folder)]
        try:
            yield asyncio.run(_lived(open_store(url), url, folder, controllers))
        finally:
            for controller in controllers:
                controller.kill()


async def _lived(store: Store, url: str, folder: Path, controllers: list[Process]) -> dict[str, Life]:
    (first,) = controllers
    async with Users(*DOCUMENTS) as users:
        users.controller = first
        ids: dict[str, str] = {}
        await _reach_states(store, users, first, ids)
        await first.freeze()
        ids["pending"] = await _started_by_another(store, users, "pending", **DOCUMENTS["pending"])
        lives = {
            state: Life(id, store.get(id), store.history(id), users.weight(state)) for state, id in ids.items()
        }
        first.kill()
        await _nobody_acts(users)
        for action in ("resume", "undo"):
            store.add_command(Command(ids["asked"], action, action))
        for i, action in enumerate(("resume", "abort", "abort")):
            store.add_command(Command(ids["refused"], f"c{i}", action))
        for state, life in lives.items():
            life.between, life.in_force_between = store.get(life.id), users.weight(state)

        second = Process(url, folder)
        controllers.append(second)
        before = users.answers
        users.controller = second
        await until(lambda: users.answers > before, "the second controller's first answer")
        for state, life in lives.items():
            life.resumed_first = users.weight(state)
        await _reach_ends(store, users, second, ids, folder)
        for state, life in lives.items():
            life.ended, life.history_in_the_end = store.get(life.id), store.history(life.id)
            life.states, life.seen = states(store, life.id), users.seen[state]
            life.commands = [(command.action, command.status) for command in store.commands(life.id)]
            life.counted, life.stored = users.counted[life.id], calls(store, life.id)
        return lives


async def _reach_states(store: Store, users: Users, controller: Process, ids: dict[str, str]) -> None:
    def reached(state: str, status: str, step: int) -> bool:
        found = store.get(ids[state]).state
        return (found["status"], found["step"]) == (status, step)

    async def act(state: str, action: str) -> None:
        reply = await controller.ask("act", ids[state], action, f"{state}-{action}", "ann")
        assert reply.error is None, reply

    for state in DOCUMENTS.keys() - {"pending", "pause", "set_weight"}:
        ids[state] = await start(users, state, **DOCUMENTS[state])
    users.going["rolled_back"] = False
    await until(lambda: reached("paused", "step", 1), "an analysis")
    await act("paused", "pause")
    await until(lambda: reached("aborted", "paused", 1), "a pause")
    await act("aborted", "abort")
    await until(lambda: reached("analysis", "step", 1), "an analysis")
    await _few_calls(store, users, "analysis", ids["analysis"])
    for state, status, step in (
        ("warming", "warming", -1),
        ("shadowing", "shadowing", 0),
        ("inconclusive", "inconclusive", 1),
        ("rolled_back", "rolled_back", 1),
        ("promoted", "promoted", 0),
        ("asked", "paused", 1),
        ("refused", "step", 1),
    ):
        await until(lambda s=state, now=(status, step): reached(s, *now), state)  # type: ignore[misc]
    # These go on by themselves.
    for state in ("pause", "set_weight"):
        ids[state] = await start(users, state, **DOCUMENTS[state])
    await until(lambda: reached("pause", "paused", 1), "a timed pause")
    await until(lambda: store.get(ids["set_weight"]).state["step"] >= 5, "a few steps")
    heard = users.answers
    await until(lambda: users.answers > heard + 1, "the last weights")


async def _started_by_another(store: Store, users: Users, route: str, **document: Any) -> str:
    """Any controller may start a rollout; the lease holder takes it up."""
    another = Controller(store, not_ready=AsyncMock())
    await another.exchange(News("another", deployed(users.settings)))
    document = {"route": route, "stable": "stable", "canary": "canary", **document}
    reply = await another.start(document, uuid.uuid4().hex, "ann")
    assert reply.error is None, reply
    return str(reply.body["id"])


async def _few_calls(store: Store, users: Users, route: str, rollout: str) -> None:
    """Fewer than a guard needs, but more than half."""
    since = store.get(rollout).state["window_from"]
    await until(lambda: time.time() > int(since) + 1 + BUCKET_S and users.weight(route), "a bucket of its own")
    users.call(users.rollouts.of(route)[-1], ENOUGH // 2 + 1)
    counted = users.counted[rollout]
    await until(lambda: calls(store, rollout) == counted, "the figures' way to the store")


async def _nobody_acts(users: Users) -> None:
    """Until a lease has run out for certain."""
    ran_out = time.monotonic() + 2 * rollout_process.LEASE_S
    failed = users.failures
    await until(lambda: time.monotonic() > ran_out and users.failures > failed + 5, "a gateway that asked in vain")


async def _reach_ends(store: Store, users: Users, controller: Process, ids: dict[str, str], folder: Path) -> None:
    async def act(state: str, action: str) -> None:
        reply = await controller.ask("act", ids[state], action, f"{state}-{action}", "ann")
        assert reply.error is None, reply

    await until(lambda: all(c.status != "waiting" for c in store.commands(ids["refused"])), "a controller")
    await _few_calls(store, users, "analysis", ids["analysis"])
    (folder / "ready-cold-model").touch()
    users.going |= {"shadowing": True, "paused": True}
    await act("paused", "resume")
    await act("inconclusive", "promote")
    await until(lambda: not store.active(), "the ends of all")
    users.going.clear()
    # Nothing comes after the end.
    heard = users.answers
    await until(lambda: users.answers > heard + 10, "the last weights")


def calls(store: Store, rollout: str) -> Counter[str]:
    """What the store has counted by side."""
    counted: Counter[str] = Counter()
    for report in store.figures(rollout):
        counted[report.role] += Figures.from_json(report.value).calls
    return counted


@pytest.mark.parametrize("state", DOCUMENTS)
def test_a_controller_killed_in_any_state_is_replaced_by_one_that_goes_on(
    lives: dict[str, Life], state: str
) -> None:
    life = lives[state]
    (status, step, weight), expected = EXPECTED[state]
    found = life.killed.state
    assert found["status"] == status
    assert step in (found["step"], None)
    assert weight in (found["weight"], None)
    # The weights are those of the state all the while, and nobody moves it.
    assert life.between == life.killed
    assert life.in_force == life.in_force_between
    if state != "set_weight":
        # There the gateway may have been a moment behind.
        without_split = status in ("pending", "warming", "rolled_back", "aborted")
        assert life.in_force == (None if without_split else weight)
    # No step is repeated or left out.
    assert life.states == expected
    assert life.history_in_the_end[: len(life.history)] == life.history
    if status in FINISHED:
        assert (life.history_in_the_end, life.ended) == (life.history, life.killed)
        assert life.resumed_first == life.in_force
    if expected[-1] == "promoted at 100 %":
        assert never_back(life.seen), life.seen
        assert life.seen[-1] == 100


def test_a_new_controller_judges_by_the_figures_that_there_were(lives: dict[str, Life]) -> None:
    life = lives["analysis"]
    (passed,) = [entry for entry in life.history_in_the_end if "(analysis)" in entry.from_status]
    verdict = passed.figures["error_rate"]
    assert verdict["canary_samples"] == verdict["stable_samples"] == 2 * (ENOUGH // 2 + 1)
    for one in lives.values():
        assert one.stored == one.counted


def test_what_operators_asked_while_no_controller_lived_is_done_once(lives: dict[str, Life]) -> None:
    assert lives["asked"].commands == [("resume", "applied"), ("undo", "refused")]
    assert lives["refused"].commands == [("resume", "refused"), ("abort", "applied"), ("abort", "refused")]


# ---- killed at any moment

UP_TO_80 = [{"set_weight": weight} for weight in range(1, 81)]
LONG = [
    *UP_TO_80[:20],
    {"analysis": {}},
    *UP_TO_80[20:40],
    {"pause": {"duration_s": 0.2}},
    *UP_TO_80[40:60],
    {"analysis": {}},
    *UP_TO_80[60:80],
]
KILLS = 15


def test_a_controller_killed_at_any_moment_repeats_and_skips_nothing(begin: Any, url: str, kind: str) -> None:
    chance = random.Random(kind)
    methods = ("commit", "renew", "figures", "waiting_commands")

    async def scenario() -> None:
        store = open_store(url)
        async with Users("default") as users:
            users.going["default"] = True
            users.controller = begin()
            rollout = await start(users, "default", steps=LONG)
            users.controller.kill()
            for _ in range(KILLS):
                # At a step of a look, just before the store is asked or just after it has done it; or whenever.
                accident = Accident(
                    signal.SIGKILL, chance.randint(1, 5), chance.choice(methods), chance.random() < 0.5
                )
                moment = chance.uniform(0, 2 * rollout_process.LEASE_S) if chance.random() < 0.3 else None
                users.controller = controller = begin(accident if moment is None else None)
                if moment is not None:
                    await asyncio.sleep(moment)
                    controller.send(signal.SIGKILL)
                await until(lambda c=controller: not c.alive, "its end")  # type: ignore[misc]
                assert store.active(), "finished before it was killed often enough"
            users.controller = begin()
            await until(lambda: not store.active(), "the end of the rollout")
            await until(lambda: users.weight("default") == 100, "the promotion")
            assert states(store, rollout) == promoted(LONG)
            assert never_back(users.seen["default"])
            counted = users.counted[rollout]
            await until(lambda: calls(store, rollout) == counted, "the figures' way to the store")

    asyncio.run(scenario())


# ---- there twice


def test_of_two_controllers_one_acts(begin: Any, url: str) -> None:
    async def scenario() -> None:
        store = open_store(url)
        # Also a machine that is busy with other things lets the holder renew this one in time.
        both = [begin(lease_s=3), begin(lease_s=3)]
        async with Users("default") as users:
            users.going["default"] = True
            users.controller = both[0]
            rollout = await start(users, "default", steps=LONG[:41])
            users.controller = both[1]
            leading = set()
            while store.active():
                leads = [await controller.ask("leads") for controller in both]
                assert sum(leads) <= 1
                leading |= {i for i, leads_ in enumerate(leads) if leads_}
            assert len(leading) == 1
            assert states(store, rollout) == promoted(LONG[:41])
            assert [await controller.ask("refusals") for controller in both] == [[], []]
            await until(lambda: users.weight("default") == 100, "the promotion")
            # Whom gateways ask does not matter.
            assert never_back(users.seen["default"])
            both[leading.pop()].kill()
            assert await leads_soon(*[controller for controller in both if controller.alive])

    asyncio.run(scenario())


async def leads_soon(controller: Process) -> bool:
    deadline = time.monotonic() + 30
    while not await controller.ask("leads"):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    return True


@pytest.mark.parametrize("after", [False, True], ids=["before-a-write", "after-a-write"])
def test_a_controller_frozen_in_a_write_and_woken_later_is_refused(begin: Any, url: str, after: bool) -> None:
    async def scenario() -> None:
        store = open_store(url)
        frozen = begin(Accident(signal.SIGSTOP, 3, "commit", after))
        await until(lambda: frozen.socket.exists(), "a socket")
        assert await leads_soon(frozen)
        async with Users("default") as users:
            users.controller = frozen
            # Not by itself, which may be frozen before it has answered.
            rollout = await _started_by_another(store, users, "default", guards={"error_rate": {}}, steps=PAUSED)
            await until(lambda: frozen.frozen, "the freeze")
            other = begin()
            users.controller = other
            await until(lambda: store.get(rollout).state["status"] == "paused", "the other controller")
            assert await leads_soon(other)
            history = store.history(rollout)
            assert states(store, rollout) == IN_PAUSE
            frozen.send(signal.SIGCONT)
            users.controller = frozen
            heard = users.answers
            await until(lambda: users.answers > heard + 5, "a gateway that asks the woken one")
            refusals = await frozen.ask("refusals")
            # After a write that was done it may try another before it looks who leads.
            assert set(refusals) <= {"StaleLeaseError"}
            assert after or refusals
            assert not await frozen.ask("leads")
            assert store.history(rollout) == history
            # It waits for its turn.
            other.kill()
            assert await leads_soon(frozen)
            reply = await frozen.ask("act", rollout, "resume", "r", "ann")
            assert reply.error is None
            await until(lambda: not store.active(), "the end of the rollout")
            assert states(store, rollout) == promoted(PAUSED)
            await until(lambda: users.weight("default") == 100, "the promotion")
            assert never_back(users.seen["default"])

    asyncio.run(scenario())


# ---- without its store


async def _in_vain(users: Users) -> None:
    """Calls whose figures nobody takes."""
    failed = users.failures
    users.call(users.rollouts.of("judged")[-1])
    await until(lambda: users.failures > failed + 3, "exchanges in vain")


def test_redis_stopped_and_started_during_a_rollout(folder: Path) -> None:
    needs_redis()
    data = folder / "redis"
    data.mkdir()
    server = RedisServer(data, "--appendonly", "yes", "--appendfsync", "always")
    url = f"redis://127.0.0.1:{server.port}"
    (folder / "ready-canary-model").touch()
    controller = Process(url, folder)

    async def scenario() -> None:
        store = open_store(url)
        async with Users("judged", "moving") as users:
            users.controller = controller
            judged = await start(users, "judged", steps=JUDGED)
            await until(lambda: store.get(judged).state["step"] == 1, "an analysis")
            await _few_calls(store, users, "judged", judged)
            moving = await start(users, "moving", steps=UP_TO_80)
            for _ in range(3):
                before = store.get(moving).state["step"]
                await until(lambda b=before: store.get(moving).state["step"] > b, "a step")  # type: ignore[misc]
                server.stop()
                await _in_vain(users)
                weights = users.weight("judged"), users.weight("moving")
                await _in_vain(users)
                assert (users.weight("judged"), users.weight("moving")) == weights
                assert weights[0] == 25
                reply = await controller.ask("show", judged)
                assert reply.error == "unavailable"
                assert "cannot be reached" in reply.message
                server.start()
            await until(lambda: store.get(moving).finished, "the end")
            assert store.get(judged).state["status"] == "step"
            await until(lambda: calls(store, judged) == users.counted[judged], "what had waited")
            users.call(users.rollouts.of("judged")[-1], ENOUGH)
            await until(lambda: store.get(judged).finished, "the end")
            assert states(store, judged) == promoted(JUDGED)
            assert states(store, moving) == promoted(UP_TO_80)
            await until(lambda: users.weight("judged") == users.weight("moving") == 100, "the promotions")
            assert never_back(users.seen["judged"])
            assert never_back(users.seen["moving"])
            assert calls(store, judged) == users.counted[judged]
            (passed,) = [entry for entry in store.history(judged) if "(analysis)" in entry.from_status]
            samples = users.counted[judged]["canary"]
            assert passed.figures["error_rate"]["canary_samples"] == samples

    try:
        asyncio.run(scenario())
    finally:
        controller.kill()
        # Also where it is stopped.
        server.kill()
