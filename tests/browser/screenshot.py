"""A picture of a page of the dashboard, from any address.

python -m tests.browser.screenshot URL FILE [--dark] [--phone] [--full] [--width N] [--height N]

Chromium is the system's: FARFLUNG_CHROMIUM, or /usr/bin/chromium.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, Page, expect, sync_playwright

CHROMIUM = os.environ.get("FARFLUNG_CHROMIUM", "/usr/bin/chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-domain-reliability",
    "--disable-extensions",
    "--disable-sync",
    "--metrics-recording-only",
    "--no-first-run",
    "--no-pings",
]
DESKTOP = (1440, 1000)
PHONE = (360, 780)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless browser that talks to nobody but the pages it is shown."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


def drawn(page: Page, url: str) -> None:
    """Opens a page and waits until it has drawn what it knows."""
    page.goto(url)
    expect(page.locator("#view > *").first).to_be_attached()
    expect(page.locator("#link")).to_have_attribute("data-live", "true")
    # Two frames: the first draws, the second shows that it was drawn.
    page.evaluate(
        "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("file")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--phone", action="store_true")
    parser.add_argument("--full", action="store_true", help="the whole page, not the first screen")
    parser.add_argument("--width", type=int)
    parser.add_argument("--height", type=int)
    parser.add_argument("--scale", type=float)
    options = parser.parse_args()
    width, height = PHONE if options.phone else DESKTOP
    with chromium() as browser:
        page = browser.new_page(
            viewport={"width": options.width or width, "height": options.height or height},
            color_scheme="dark" if options.dark else "light",
            device_scale_factor=options.scale or (2 if options.phone else 1.5),
        )
        page.on("console", lambda message: print(f"console: {message.text}"))
        page.on("pageerror", lambda error: print(f"error: {error}"))
        drawn(page, options.url)
        page.screenshot(path=options.file, full_page=options.full)


if __name__ == "__main__":
    main()
