"""A real browser for tests: Debian's Chromium, or the one that DRIFTKEEL_TEST_BROWSER names."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless browser; the test is skipped where there is none."""
    driver = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'driftkeel[browser]'")
    named = os.environ.get("DRIFTKEEL_TEST_BROWSER")
    path = named or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium: apt-get install chromium, or name one with DRIFTKEEL_TEST_BROWSER")
    with driver.sync_playwright() as playwright:
        # Root, in a container, is refused a sandbox by the kernel; the pages are ours.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        chromium = playwright.chromium.launch(executable_path=path, args=arguments)
        yield chromium
        chromium.close()
