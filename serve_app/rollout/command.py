"""`serve-app rollout …`: what operators ask of a running gateway. Speaks HTTP only."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console, RenderableType

from serve_app.rollout import view
from serve_app.rollout.client import Body, CommandError, Control
from serve_app.rollout.document import parse
from serve_app.rollout.machine import FINISHED
from serve_app.rollout.watch import watch


def run(arguments: argparse.Namespace, transport: httpx.BaseTransport | None = None) -> int:
    """Does `arguments.action` and prints what came of it; the exit code. Raises CommandError."""
    # Where nobody looks, no line is broken or cut.
    console = Console(highlight=False, emoji=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, emoji=False, markup=False, width=10_000)

    def tell(answer: Any, shown: Callable[[], RenderableType]) -> int:
        if arguments.json:
            print(json.dumps(answer, ensure_ascii=False, indent=2))
        else:
            view.out(console, shown())
        return 0

    if arguments.action == "start":
        document = _read(arguments.file)
        started = Control(arguments.url, transport).start(document)
        return tell(started, lambda: view.started(started))
    control = Control(arguments.url, transport)
    if arguments.action == "list":
        found = control.recent(arguments.route)
        return tell({"rollouts": found}, lambda: view.listed(found))
    rollout = arguments.id or _obvious(control.recent(arguments.route), arguments.action)
    if arguments.action == "history":
        entries = control.history(rollout)
        return tell({"id": rollout, "history": entries}, lambda: view.history(rollout, entries))
    if arguments.action == "status":
        if arguments.watch:
            return watch(control, rollout, console, as_json=arguments.json)
        shown = control.show(rollout)
        return tell(shown, lambda: view.status(shown, control.history(rollout)))
    done = control.act(rollout, arguments.action)
    return tell(done, lambda: view.line(done))


def _read(path: Path) -> Body:
    """The document in `path`, with its defaults."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"{path}: {error}", 2) from None
    try:
        document = parse(text)
    except ValueError as error:
        raise CommandError(f"{path}:\n{error}", 2) from None
    return document.model_dump(mode="json", exclude_none=True)


def _obvious(rollouts: Sequence[Body], action: str) -> str:
    """The rollout that is meant where none is named, of those given, newest first."""
    if not rollouts:
        raise CommandError("there is no rollout yet; start one: serve-app rollout start FILE")
    if action == "undo":
        kind, fitting = "promoted", [r for r in rollouts if r["status"] == "promoted"]
    else:
        kind, fitting = "unfinished", [r for r in rollouts if r["status"] not in FINISHED]
    # Who only looks may well mean one that has ended.
    looking = action in ("status", "history")
    if not fitting and not looking:
        newest = rollouts[0]
        raise CommandError(f"no rollout is {kind}; the newest, {newest['id']}, is {newest['state']}")
    if not looking and len({r["route"] for r in fitting}) > 1:
        listed = ", ".join(sorted({r["route"] for r in fitting}))
        raise CommandError(f"routes {listed} have {kind} rollouts; say which: --route ROUTE, or an id of `list`")
    chosen: str = (fitting or rollouts)[0]["id"]
    return chosen
