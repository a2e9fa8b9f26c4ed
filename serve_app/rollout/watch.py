"""A rollout watched until it is finished: live in a terminal, else a line per change."""

import time

from rich.console import Console
from rich.live import Live

from serve_app.rollout import view
from serve_app.rollout.client import AwayError, Control
from serve_app.rollout.machine import FINISHED

_EVERY_S = 1.0
# A gateway that is away for longer won't come back without help.
_AWAY_LIMIT_S = 300.0


def watch(control: Control, rollout: str, console: Console) -> int:
    """0 once it is promoted, 1 once it is rolled back or aborted. Raises CommandError: AwayError when the gateway
    stays away, others at once."""
    shown, entries = control.show(rollout), control.history(rollout)
    live = Live(view.status(shown, entries), console=console, auto_refresh=False)
    if console.is_terminal:
        live.start(refresh=True)
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
                if not console.is_terminal and gone_at == now:
                    _say(f"{view.clock(time.time())}  {error}; waiting for it")
            else:
                if not console.is_terminal and gone_at is not None:
                    _say(f"{view.clock(time.time())}  {control.url} answers again")
                gone_at = None
            if console.is_terminal:
                live.update(view.status(shown, entries, remark), refresh=True)
            else:
                for entry in entries[known:]:
                    _say(view.change(entry))
    finally:
        live.stop()
    return 0 if shown["status"] == "promoted" else 1


def _say(line: str) -> None:
    print(line, flush=True)
