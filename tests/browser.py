"""A real browser for tests: Debian's Chromium, or the one that DRIFTKEEL_TEST_BROWSER names."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest


def chromium_options() -> dict[str, Any]:
    """How to launch the browser; `executable_path` is None where there is none."""
    named = os.environ.get("DRIFTKEEL_TEST_BROWSER")
    found = named or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    # Root, in a container, is refused a sandbox by the kernel; the pages are ours.
    return {"executable_path": found, "args": ["--no-sandbox"] if os.geteuid() == 0 else []}


# Its driver runs an event loop in the test's thread as long as it is open, so a session's browser would break the
# tests of other modules that run a loop of their own.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless browser; the test is skipped where there is none."""
    driver = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'driftkeel[browser]'")
    options = chromium_options()
    if options["executable_path"] is None:
        pytest.skip("no Chromium: apt-get install chromium, or name one with DRIFTKEEL_TEST_BROWSER")
    with driver.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(**options, timeout=120_000)
        yield chromium
        chromium.close()
