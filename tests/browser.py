"""A real Chromium without a window, for pages; tests that need it skip where there is none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def chromium() -> str:
    """Path of the browser; RISTUNE_REQUIRE_CHROMIUM=1 turns a skip into a failure."""
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if found is None:
        if os.environ.get("RISTUNE_REQUIRE_CHROMIUM") == "1":
            pytest.fail("RISTUNE_REQUIRE_CHROMIUM=1, but there is no chromium on PATH")
        pytest.skip("no chromium on PATH")
    return found


@dataclass
class Opened:
    """A page, with what it complained of and asked for."""

    page: Any  # of playwright
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@contextmanager
def opened(path: Path, *, width: int, dark: bool) -> Iterator[Opened]:
    """A page of the disk in a browser that has no network, once its charts are drawn."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium(),
            # As root, in a container, there is no sandbox.
            args=["--no-sandbox", "--disable-dev-shm-usage"],
        )
        try:
            context = browser.new_context(
                viewport={"width": width, "height": 900},
                color_scheme="dark" if dark else "light",
                offline=True,
            )
            page = context.new_page()
            found = Opened(page)
            page.on("console", lambda message: found.complaints.append(message.text))
            page.on("pageerror", lambda error: found.complaints.append(str(error)))
            page.on("request", lambda request: found.requests.append(request.url))
            page.goto(path.as_uri())
            page.wait_for_function(
                "document.documentElement.dataset.drawn === 'all'", timeout=120_000
            )
            yield found
        finally:
            browser.close()
