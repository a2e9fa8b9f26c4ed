"""A rollout watched until it is finished: live in a terminal, else a line per change; or as JSON."""

import json
import sys
import time
from typing import TextIO

from rich.console import Console
from rich.live import Live

from serve_app.rollout import view
from serve_app.rollout.client import AwayError, Control
from serve_app.rollout.machine import FINISHED

_EVERY_S = 1.0
# A gateway that is away for longer won't come back without help.
_AWAY_LIMIT_S = 300.0


def watch(control: Control, rollout: str, console: Console, as_json: bool = False) -> int:
    """0 once it is promoted, 1 once it is rolled back or aborted. `as_json`: what the gateway answers, a line per
    change; remarks go to standard error then. Raises CommandError: AwayError when the gateway stays away, others
    at once."""
    shown, entries = control.show(rollout), control.history(rollout)
    live = Live(view.status(shown, entries), console=console, auto_refresh=False)
    in_place = console.is_terminal and not as_json
    remarks = sys.stderr if as_json else sys.stdout
    if in_place:
        live.start(refresh=True)
    elif as_json:
        _say(json.dumps(shown, ensure_ascii=False))
    else:
        _say(f"{view.clock(time.time())}  {shown['id']}: {shown['state']}")
    gone_at: float | None = None
    try:
        while shown["status"] not in FINISHED:
            time.sleep(_EVERY_S)
            remark = ""
            before, known = shown["updated_at"], len(entries)
            try:
                fresh = control.show(rollout)
                if fresh["updated_at"] != before:
                    entries = control.history(rollout)
                shown = fresh
            except AwayError as error:
                now = time.monotonic()
                gone_at = now if gone_at is None else gone_at
                if now - gone_at > _AWAY_LIMIT_S:
                    raise
                remark = f"away for {now - gone_at:.0f} s: {error}"
                if not in_place and gone_at == now:
                    _say(f"{view.clock(time.time())}  {error}; waiting for it", remarks)
            else:
                if not in_place and gone_at is not None:
                    _say(f"{view.clock(time.time())}  {control.url} answers again", remarks)
                gone_at = None
            if in_place:
                live.update(view.status(shown, entries, remark), refresh=True)
            elif as_json:
                if shown["updated_at"] != before:
                    _say(json.dumps(shown, ensure_ascii=False))
            else:
                for entry in entries[known:]:
                    _say(view.change(entry))
    finally:
        live.stop()
    return 0 if shown["status"] == "promoted" else 1


def _say(line: str, where: TextIO | None = None) -> None:
    print(line, file=where, flush=True)
