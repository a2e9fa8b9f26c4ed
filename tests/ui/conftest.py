"""A small fleet with keys and the page, and a headless Chromium that looks at it."""

import io
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from serve_app.access import ADMIN_KEY, API_KEYS
from tests.ports import free_port
from tests.rollout.conftest import scorer, variant
from tests.system.conftest import (
    MINILM,
    ROOT,
    System,
    catalog_index,  # noqa: F401
    reranker,
    serving,
)

KEY, ADMIN = "a-key-for-the-page-0123", "the-operators-key"
# Where `SERVE_APP_SCREENSHOTS=1` has the tests write what they see.
IMAGES = ROOT / "docs" / "images"
# Small enough to be scored at once, however busy the machine.
RECALL_K = 20

expect.set_options(timeout=20_000)


def settings() -> dict[str, Any]:
    def pipeline(name: str, **more: Any) -> dict[str, Any]:
        return {"recall_k": RECALL_K, "stages": [{"variant": name}], **more}

    return {
        "recall": "catalogue",
        "rollout": "rollouts",
        "variants": {"minilm": {"scripts": ["Latin"]}, variant("words"): {}, variant("raises"): {}},
        "pipelines": {
            "bm25": {"recall_k": RECALL_K},
            "fused": pipeline("minilm", fusion={"recall_weight": 0.3}),
            "next": pipeline("minilm", fusion={"recall_weight": 0.2}),
            "words": pipeline(variant("words")),
            "broken": pipeline(variant("raises")),
        },
        "routes": {
            "default": {"weights": {"fused": 100}, "timeout_ms": 20_000},
            "chinese": {"weights": {"words": 100}, "timeout_ms": 20_000},
        },
    }


class Fleet(System):
    """With an API key, which the client brings."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.client.headers["Authorization"] = f"Bearer {KEY}"

    def search(self, query: str, user: str) -> None:
        answer = self.client.post("/v1/search", json={"query": query, "user": user})
        assert answer.status_code == 200, answer.text


@pytest.fixture(scope="session")
def fleet(
    catalog_index: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Fleet]:
    os.environ |= {API_KEYS: f"page:{KEY}", ADMIN_KEY: ADMIN}
    store = f"sqlite://{tmp_path_factory.mktemp('rollouts')}/rollouts.sqlite3"
    others = [
        ("rollouts", "rollout", {"store": store}),
        ("catalogue", "recall", {"index": str(catalog_index)}),
    ]
    config = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": free_port()},
        "applications": [
            {
                "name": "gateway",
                "import_path": "serve_app.gateway:build",
                "route_prefix": "/",
                "deployments": [{"name": "Gateway", "user_config": settings()}],
            },
            {"name": "page", "import_path": "serve_app.ui:build", "route_prefix": "/ui"},
            *(
                {"name": name, "import_path": f"serve_app.{room}:build", "route_prefix": None, "args": args}
                for name, room, args in others
            ),
            reranker("minilm", {**MINILM, "engine": {"max_model_len": 256, "dtype": "float32"}}),
            scorer("words", {"takes_ms": 5}),
            scorer("raises", {"behaviour": "raises"}),
        ],
    }
    with serving(Fleet(config)) as running:
        yield running


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    assert chromium, "there is no chromium on PATH; scripts/install-tools.sh installs it"
    with sync_playwright() as playwright:
        # Tests run as root in containers, where Chromium has no sandbox.
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(fleet: Fleet, browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens the page in a window of its own, with the key given unless `key` is empty. Whatever it fetches comes
    from the fleet, and no script of it fails."""
    contexts, foreign, errors = [], [], []

    def heard(url: str) -> None:
        if not re.match(rf"{re.escape(fleet.url)}/|data:|blob:", url):
            foreign.append(url)

    def open_page(width: int = 1200, height: int = 900, key: str = KEY) -> Page:
        contexts.append(browser.new_context(viewport={"width": width, "height": height}))
        page = contexts[-1].new_page()
        page.on("request", lambda request: heard(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{fleet.url}/ui")
        expect(page.locator("#status")).to_contain_text("wants an API key")
        if key:
            page.locator("#api-key input").fill(key)
            page.keyboard.press("Enter")
            expect(page.locator("#search-query")).to_be_visible()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not foreign, foreign
    assert not errors, errors


WANTS_PICTURES = bool(os.environ.get("SERVE_APP_SCREENSHOTS"))


@pytest.fixture
def picture() -> Callable[..., None]:
    """Writes what the page shows to docs/images, where that was asked for."""

    def picture(page: Page, name: str, full: bool = False) -> None:
        if WANTS_PICTURES:
            IMAGES.mkdir(exist_ok=True)
            taken = Image.open(io.BytesIO(page.screenshot(full_page=full, animations="disabled")))
            taken.convert("RGB").quantize(128).save(IMAGES / f"{name}.png", optimize=True)

    return picture
