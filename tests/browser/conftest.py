"""A browser, and pages that are watched while they are looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, ViewportSize

from orchestrator.dashboard.app import Dashboard, serve
from tests.browser.screenshot import CHROMIUM, chromium
from tests.support.recorded_operator import RecordedOperator

DESKTOP: ViewportSize = {"width": 1440, "height": 1000}
PHONE: ViewportSize = {"width": 360, "height": 780}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    # Not for the session: while it is open, its event loop runs in this thread, and no test that
    # starts one of its own would work.
    if not Path(CHROMIUM).exists():
        pytest.skip(f"no Chromium at {CHROMIUM}: install it (Debian: chromium)")
    with chromium() as found:
        yield found


class Look:
    """Opens pages; none may say anything on its console, nor ask anyone else for anything.

    Attributes:
        said: What they did say, or ask for.
    """

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self._contexts: list[BrowserContext] = []
        self.said: list[str] = []

    def __call__(self, url: str, *, dark: bool = False, viewport: ViewportSize = DESKTOP) -> Page:
        context = self._browser.new_context(
            viewport=viewport,
            color_scheme="dark" if dark else "light",
            accept_downloads=True,
            reduced_motion="reduce",
        )
        self._contexts.append(context)
        page = context.new_page()
        origin = "/".join(url.split("/")[:3])
        page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        page.on(
            "request",
            lambda request: (
                None
                if request.url.startswith((origin, "blob:"))
                else self.said.append(f"asked {request.url}")
            ),
        )
        page.goto(url)
        return page

    def away(self) -> None:
        """Close the pages."""
        while self._contexts:
            self._contexts.pop().close()


@pytest.fixture
def look(browser: Browser) -> Iterator[Look]:
    look = Look(browser)
    yield look
    look.away()
    assert look.said == []


Show = Callable[[RecordedOperator], AbstractContextManager[Dashboard]]


@pytest.fixture
def show(look: Look) -> Show:
    """Serves an operator's page; whoever looks at it looks away before it ends.

    A page whose server has gone asks for it again, and the browser says that it was refused.
    """

    @contextmanager
    def shown(operator: RecordedOperator) -> Iterator[Dashboard]:
        with serve(operator) as dashboard:
            try:
                yield dashboard
            finally:
                look.away()

    return shown
