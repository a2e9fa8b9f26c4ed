"""A real fleet (gateway, recall, rollouts, store) whose rerankers need no engine, and clients that load it."""

import itertools
import json
import os
import random
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.access import ADMIN_KEY
from tests.ports import free_port
from tests.system.conftest import (
    ROOT,
    System,
    catalog_index,  # noqa: F401
    serving,
    wait_for,
)

KEY = "the-operators-key"
# Deadline of the routes' calls.
TIMEOUT_MS = 3000
# By pipeline, the arguments of tests/rollout/scorers.py for its variant. `good` is deployed later, by a test.
# Long beside what a busy machine adds to a call.
STABLE_MS = 100
SCORERS = {
    "stable": {"takes_ms": STABLE_MS},
    "raises": {"behaviour": "raises"},
    "hangs": {"behaviour": "hangs"},
    "slow": {"takes_ms": 4 * STABLE_MS},
    "shuffles": {"takes_ms": STABLE_MS, "behaviour": "shuffles"},
    "dies": {"takes_ms": STABLE_MS},
}


def variant(pipeline: str) -> str:
    return f"{pipeline}-model"


def scorer(pipeline: str, args: dict[str, Any]) -> dict[str, Any]:
    """The application of the pipeline's variant."""
    path = "tests.rollout.scorers:build"
    return {"name": variant(pipeline), "import_path": path, "route_prefix": None, "args": args}


def settings(pipelines: Iterable[str]) -> dict[str, Any]:
    """The gateway's. Routes default, second and third are all `stable`'s."""
    pipelines = list(pipelines)
    return {
        "recall": "catalogue",
        "rollout": "rollouts",
        "variants": {variant(name): {} for name in pipelines},
        "pipelines": {name: {"recall_k": 20, "stages": [{"variant": variant(name)}]} for name in pipelines},
        "routes": {
            name: {"weights": {"stable": 100}, "timeout_ms": TIMEOUT_MS} for name in ("default", "second", "third")
        },
    }


class Operator:
    """What an operator sees and asks over HTTP."""

    def __init__(self, url: str) -> None:
        self.client = httpx.Client(
            base_url=url, timeout=30, headers={"Authorization": f"Bearer {KEY}", "X-Operator": "tests"}
        )

    def start(self, **document: Any) -> str:
        return str(self._asked("POST", "", json=document)["id"])

    def act(self, rollout: str, action: str) -> httpx.Response:
        return self.client.post(f"/v1/rollouts/{rollout}/{action}")

    def show(self, rollout: str) -> dict[str, Any]:
        return self._asked("GET", f"/{rollout}")

    def recent(self, route: str) -> list[dict[str, Any]]:
        rollouts: list[dict[str, Any]] = self._asked("GET", "", params={"route": route})["rollouts"]
        return rollouts

    def history(self, rollout: str) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = self._asked("GET", f"/{rollout}/history")["history"]
        return entries

    def wait(self, rollout: str, *, limit_s: float = 60, **wanted: Any) -> dict[str, Any]:
        """Until the rollout shows what is wanted, e.g. `status="paused"`."""

        def shown() -> dict[str, Any] | None:
            answer = self.client.get(f"/v1/rollouts/{rollout}")
            # Where a disk keeps the store waiting.
            if answer.status_code == 503:
                return None
            assert answer.status_code == 200, answer.text
            found: dict[str, Any] = answer.json()
            return found if wanted.items() <= found.items() else None

        found: dict[str, Any] = wait_for(shown, limit_s, 0.3, f"{wanted} of {rollout}")
        return found

    def _asked(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        """Asks again while the answer is 503, as where a disk keeps the store waiting."""

        def answered() -> httpx.Response | None:
            answer = self.client.request(method, f"/v1/rollouts{path}", **more)
            return None if answer.status_code == 503 else answer

        answer = wait_for(answered, 30, what=f"another answer than 503 to {method} {path}")
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found


@dataclass(frozen=True, slots=True)
class Call:
    """`started` and `ended` are wall-clock times, as in a rollout's history."""

    path: str
    user: str | None
    started: float
    took_s: float
    status: int
    body: dict[str, Any]

    @property
    def ended(self) -> float:
        return self.started + self.took_s

    @property
    def meta(self) -> dict[str, Any]:
        meta: dict[str, Any] = self.body["meta"]
        return meta

    @property
    def placed(self) -> str | None:
        """The side that the split chose, whoever answered; None without a rollout."""
        if "rollout" not in self.meta:
            return None
        role: str = "canary" if self.meta["why"] == "fallback" else self.meta["rollout"]["role"]
        return role


class Load:
    """Clients that call a route until stopped, about `rate` times a second; a fifth of the calls names no user, a
    fifth brings its own documents. A user's calls come one after the other."""

    def __init__(self, url: str, route: str = "default", rate: float = 60, users: int = 400, clients: int = 16):
        self.url, self.route = url, route
        self.calls: list[Call] = []
        self.errors: list[str] = []
        self._every_s = clients / rate
        self._stop = threading.Event()
        names = [f"user-{i}" for i in range(users)]
        self._threads = [threading.Thread(target=self._run, args=(i, names[i::clients])) for i in range(clients)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, seed: int, users: Sequence[str]) -> None:
        rng = random.Random(seed)
        with httpx.Client(base_url=self.url, timeout=30) as client:
            self._stop.wait(rng.random() * self._every_s)
            while not self._stop.is_set():
                user = None if rng.random() < 0.2 else rng.choice(users)
                began = time.monotonic()
                try:
                    self.calls.append(self._call(client, rng, user))
                except (httpx.HTTPError, ValueError) as error:
                    self.errors.append(repr(error))
                self._stop.wait(max(0.0, self._every_s - (time.monotonic() - began)))

    def _call(self, client: httpx.Client, rng: random.Random, user: str | None) -> Call:
        query = rng.choice(QUERIES)
        path, body = "/v1/search", {"query": query, "route": self.route}
        if rng.random() < 0.2:
            path, body = "/v1/rerank", {"query": query, "model": self.route, "documents": QUERIES[:10]}
        if user is not None:
            body["user"] = user
        started, began = time.time(), time.monotonic()
        answer = client.post(path, json=body)
        return Call(path, user, started, time.monotonic() - began, answer.status_code, answer.json())

    def placed(self, side: str) -> int:
        """Calls answered so far that the split gave to that side."""
        return sum(call.status == 200 and call.placed == side for call in list(self.calls))

    def check_no_client_paid(self) -> None:
        """Every call was answered, in full: the gateway found time for stable after the canary. The deadline is
        the gateway's; what a busy machine adds to it is not judged here, a client left waiting is."""
        assert not self.errors, self.errors[:3]
        failed = [call for call in self.calls if call.status != 200]
        assert not failed, failed[:3]
        degraded = [(call.took_s, call.meta["degraded"]) for call in self.calls if "degraded" in call.meta]
        assert not degraded, f"{len(degraded)} of {len(self.calls)}: {degraded[:3]}"
        late = [call for call in self.calls if call.took_s > 2 * TIMEOUT_MS / 1e3]
        assert not late, late


QUERIES = [
    query["text"]
    for query in map(json.loads, (ROOT / "examples" / "queries.jsonl").read_text().splitlines())
    if query["lang"] == "en"
]


class RolloutSystem(System):
    """The fleet, an operator of it, and the store's file."""

    def __init__(self, config: dict[str, Any], store: str) -> None:
        super().__init__(config)
        self.store = store
        self.operator = Operator(self.url)

    def search(self, **body: Any) -> dict[str, Any]:
        answer = self.client.post("/v1/search", json={"query": next(_some_query), **body})
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found


_some_query = itertools.cycle(QUERIES)


@pytest.fixture(scope="session")
def fleet(
    catalog_index: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[RolloutSystem]:
    os.environ[ADMIN_KEY] = KEY
    store = f"sqlite://{tmp_path_factory.mktemp('rollouts')}/rollouts.sqlite3"
    config = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": free_port()},
        "applications": [
            {
                "name": "gateway",
                "import_path": "serve_app.gateway:build",
                "route_prefix": "/",
                "deployments": [{"name": "Gateway", "user_config": settings(SCORERS)}],
            },
            {
                "name": "rollouts",
                "import_path": "serve_app.rollout:build",
                "route_prefix": None,
                "args": {"store": store},
            },
            {
                "name": "catalogue",
                "import_path": "serve_app.recall:build",
                "route_prefix": None,
                "args": {"index": str(catalog_index)},
            },
            *(scorer(name, args) for name, args in SCORERS.items()),
        ],
    }
    with serving(RolloutSystem(config, store)) as running:
        yield running
