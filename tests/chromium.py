"""Pages in a real browser: Chromium from the distribution, without a window, driven through its own protocol by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
# Without these Chromium itself asks its maker's servers for updates and lists.
FLAGS = [f"--{flag}" for flag in ("disable-gpu", "disable-quic", "no-first-run", "disable-component-update")]
FLAGS += [f"--{flag}" for flag in ("disable-background-networking", "disable-sync")]

# Milliseconds from the start of the navigation until the first frame with everything drawn is on the screen.
CLOCK = """addEventListener("load", () => requestAnimationFrame(() => requestAnimationFrame(() => {
  document.documentElement.dataset.drawnAfter = performance.now(); })))"""


def chromium_path() -> str:
    """Where Chromium is. Without one the tests are skipped, in CI they fail."""
    found = next((path for path in map(shutil.which, NAMES) if path), None)
    if found is not None:
        return found
    text = (
        "no Chromium here, so report.html was tried in no browser: apt-get install chromium (or dnf, brew), then again"
    )
    if os.environ.get("CI"):
        pytest.fail(text)
    pytest.skip(text)


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Chromium with a profile of its own, gone afterwards."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=FLAGS, chromium_sandbox=False)
        yield browser
        browser.close()


@dataclass
class Opened:
    """An open page, what it complained of, and what it asked for beside itself."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    @property
    def drawn_after_seconds(self) -> float:
        """From the start of the navigation to the first complete draw, measured inside the page."""
        self.page.wait_for_selector("html[data-drawn-after]")
        return float(self.page.evaluate("document.documentElement.dataset.drawnAfter")) / 1000

    def texts(self, selector: str) -> list[str]:
        """The text of every element that is found, in order."""
        return self.page.locator(selector).all_inner_texts()


@contextmanager
def open_page(browser: Browser, file: Path, **context_options: Any) -> Iterator[Opened]:
    """`file`, opened as a user opens it; `context_options` are Playwright's (viewport, color_scheme, ...)."""
    options: dict[str, Any] = {"viewport": {"width": 1280, "height": 900}} | context_options
    context: BrowserContext = browser.new_context(**options)
    context.add_init_script(CLOCK)
    opened = Opened(context.new_page())
    address = file.resolve().as_uri()
    context.on("request", lambda request: opened.requests.append(request.url) if request.url != address else None)
    opened.page.on("console", lambda message: opened.complaints.append(message.text) if _is_bad(message.type) else None)
    opened.page.on("pageerror", lambda error: opened.complaints.append(str(error)))
    opened.page.on("dialog", lambda dialog: (opened.complaints.append("a dialog: " + dialog.message), dialog.dismiss()))
    opened.page.goto(address)
    yield opened
    context.close()


def _is_bad(kind: str) -> bool:
    return kind in {"error", "warning"}
