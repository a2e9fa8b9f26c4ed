"""`/v1/fleet` while Serve's controller is away; what it makes of its answers is in test_ui_fleet_overview.py."""

import asyncio
import threading

import pytest

from serve_app.gateway import overview
from serve_app.gateway.errors import ApiError
from serve_app.gateway.overview import Overview


async def scrape(nodes):
    return None


def test_a_controller_that_does_not_answer_holds_one_thread_whoever_asks(monkeypatch):
    monkeypatch.setattr(overview, "_LOOK_TIMEOUT_S", 0.01)
    looks, back = [], threading.Event()

    def look():
        looks.append(threading.current_thread())
        assert back.wait(30)
        return {}, []

    async def scenario():
        found = Overview(look, scrape)
        gone = asyncio.create_task(found.answer())
        await asyncio.sleep(0)
        gone.cancel()
        for _ in range(3):
            with pytest.raises(ApiError, match="did not answer within") as refused:
                await found.answer()
            assert (refused.value.status, refused.value.code) == (503, "unavailable")
        assert len(looks) == 1
        back.set()
        await asyncio.wait({found._looking})
        assert (await found.answer())["applications"] == []
        assert len(looks) == 1

    try:
        asyncio.run(scenario())
    finally:
        back.set()


def test_a_look_that_failed_is_no_answer_to_the_next_question():
    looks = []

    def look():
        looks.append(True)
        if len(looks) == 1:
            raise RuntimeError("the controller is being restarted")
        return {}, []

    async def scenario():
        found = Overview(look, scrape)
        with pytest.raises(RuntimeError):
            await found.answer()
        assert (await found.answer())["applications"] == []
        assert (await found.answer())["applications"] == []
        assert len(looks) == 2

    asyncio.run(scenario())
