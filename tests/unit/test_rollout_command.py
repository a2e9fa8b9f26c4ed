"""`serve-app rollout …` from its arguments to what it prints, beside a controller in this process."""

import asyncio
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app import cli
from serve_app.access import ADMIN_KEY
from serve_app.gateway.rollouts import deployed
from serve_app.rollout import command, view, watch
from serve_app.rollout.client import CommandError
from serve_app.rollout.controller import Controller
from serve_app.rollout.messages import News
from serve_app.rollout.store import Store, open_store
from tests.processes.rollout_gateway import settings

DOCUMENT = {"route": "a", "stable": "stable", "canary": "canary", "steps": [{"set_weight": 50}]}


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ADMIN_KEY, "secret")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = open_store(f"sqlite://{tmp_path}/rollouts.db")
    yield store
    store.close()


def run(*arguments: str, transport: httpx.BaseTransport | None = None) -> int:
    return command.run(cli._parser().parse_args(["rollout", *arguments]), transport)


def test_watching_as_json_prints_an_object_per_change(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watch, "_EVERY_S", 0)
    asked = itertools.count()

    async def all_ready(variants: Sequence[str]) -> list[str]:
        return []

    with asyncio.Runner() as runner:
        controller = Controller(store, all_ready)
        runner.run(controller.exchange(News("g", deployed(settings(["a"])))))
        rollout = runner.run(controller.start(DOCUMENT, "1", "ann")).body["id"]

        def gateway(request: httpx.Request) -> httpx.Response:
            """Away for once; the rollout moves at every other question."""
            if (n := next(asked)) == 4:
                return httpx.Response(503, json={"message": "no controller", "error": {"code": "unavailable"}})
            if n % 2:
                runner.run(controller.tick())
            ask: Any = controller.history if request.url.path.endswith("/history") else controller.show
            return httpx.Response(200, json=runner.run(ask(rollout)).body)

        code = run("status", rollout, "--watch", "--json", transport=httpx.MockTransport(gateway))
    printed = capsys.readouterr()
    shown = [json.loads(line) for line in printed.out.splitlines()]
    assert code == 0
    assert [one["id"] for one in shown] == [rollout] * len(shown)
    assert shown[0]["status"] == "pending"
    assert shown[-1]["status"] == "promoted"
    assert all(a["updated_at"] != b["updated_at"] for a, b in itertools.pairwise(shown))
    assert "no controller; waiting for it" in printed.err
    assert "answers again" in printed.err


@pytest.mark.parametrize(
    "arguments",
    [("list",), ("status",), ("status", "r1"), ("status", "r1", "--watch"), ("history", "r1"), ("abort", "r1")],
)
def test_another_server_that_speaks_json_is_told_from_a_gateway(arguments: tuple[str, ...]) -> None:
    other = httpx.MockTransport(lambda request: httpx.Response(200, json={"hello": "world"}))
    with pytest.raises(CommandError, match="answered 200 with something that is no JSON object of ours"):
        run(*arguments, transport=other)


@pytest.mark.parametrize(
    "url",
    ["http://[::1", "http://localhost:abc", "localhost:8000", "ftp://localhost", "http://xn--x", "http://a..b"],
)
def test_what_is_no_url_is_named_with_what_is_allowed(url: str) -> None:
    with pytest.raises(CommandError) as refused:
        run("list", "--url", url)
    assert str(refused.value).startswith(f"--url is {url!r}: ")
    assert str(refused.value).endswith("; allowed: http://HOST:PORT")
    assert refused.value.code == 2


def test_a_key_that_no_header_carries_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ADMIN_KEY, "schlüssel")
    with pytest.raises(CommandError, match=f"{ADMIN_KEY} has characters other than printable ASCII"):
        run("list")


@pytest.mark.parametrize(
    ("status", "step", "marks"),
    [
        ("step", 1, ["✓", "▶", ""]),
        ("aborted", 1, ["✓", "✗", "–"]),
        ("promoted", 1, ["✓", "–", "–"]),
        ("promoted", 2, ["✓", "✓", "✓"]),
    ],
)
def test_steps_that_did_not_happen_are_not_marked_as_done(status: str, step: int, marks: list[str]) -> None:
    steps = [{"set_weight": 25}, {"pause": {"duration_s": 60}}, {"set_weight": 50}]
    table: Any = view._steps({"status": status, "step": step, "document": {"steps": steps}})
    assert list(table.columns[0].cells) == marks
