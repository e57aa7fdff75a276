"""A browser, and pages that are watched while they are looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from tests.browser.screenshot import CHROMIUM, chromium

DESKTOP = {"width": 1440, "height": 1000}
PHONE = {"width": 360, "height": 780}

Look = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    # Not for the session: while it is open, its event loop runs in this thread, and no test that
    # starts one of its own would work.
    if not Path(CHROMIUM).exists():
        pytest.skip(f"no Chromium at {CHROMIUM}: install it (Debian: chromium)")
    with chromium() as found:
        yield found


@pytest.fixture
def look(browser: Browser) -> Iterator[Look]:
    """Opens pages; none may say anything on its console, nor ask anyone else for anything."""
    said: list[str] = []
    contexts = []

    def open_page(url: str, *, dark: bool = False, viewport: dict[str, int] = DESKTOP) -> Page:
        context = browser.new_context(
            viewport=viewport,  # type: ignore[arg-type]
            color_scheme="dark" if dark else "light",
            accept_downloads=True,
            reduced_motion="reduce",
        )
        contexts.append(context)
        page = context.new_page()
        origin = "/".join(url.split("/")[:3])
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on(
            "request",
            lambda request: (
                None
                if request.url.startswith((origin, "blob:"))
                else said.append(f"asked {request.url}")
            ),
        )
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
