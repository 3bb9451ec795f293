"""Pictures of the console while the demo runs."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from tests.browser import chromium_options

FRAMES = 9_000
WHEN = 0.45  # of the demo: all of its cameras but one have drifted, none has healed


def take(folder: Path) -> None:
    """Run the demo and write pictures of both pages into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        demo = subprocess.Popen(
            [
                sys.executable,
                "-u",
                "-m",
                "worker",
                "demo",
                "--no-view",
                "--frames",
                str(FRAMES),
                "--html",
                f"{scratch}/r.html",
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        browser = playwright.chromium.launch(**chromium_options())
        try:
            url = _wait_for_drift(demo)
            for scheme in ("light", "dark"):
                _both_pages(browser, url, folder, scheme)
            _phone(browser, url, folder)
        finally:
            browser.close()
            demo.terminate()
            demo.wait(30)


def _wait_for_drift(demo: subprocess.Popen[str]) -> str:
    """The console's address, once the demo is far enough."""
    url = ""
    assert demo.stdout is not None
    for line in demo.stdout:
        print(line, end="")
        if found := re.match(r"console: (\S+)", line):
            url = found[1]
        if (found := re.match(r"(\d+)/(\d+) frames", line)) and int(found[1]) > WHEN * int(found[2]):
            assert url, "the demo has not printed the console's address"
            return url
    raise SystemExit("the demo ended before its cameras had drifted")


def _both_pages(browser: Browser, url: str, folder: Path, scheme: str) -> None:
    context = browser.new_context(color_scheme=scheme, viewport={"width": 1280, "height": 500})  # type: ignore[arg-type]
    page = context.new_page()
    page.goto(url)
    page.locator(".tile img.there").nth(5).wait_for()
    page.wait_for_timeout(2_500)  # the order settles every two seconds
    page.screenshot(path=folder / f"fleet-{scheme}.png")
    page.set_viewport_size({"width": 1280, "height": 900})
    page.locator("a.tile").first.click()
    page.locator("img.frame[src]").wait_for()
    page.wait_for_timeout(1_500)
    page.screenshot(path=folder / f"stream-{scheme}.png")
    context.close()


def _phone(browser: Browser, url: str, folder: Path) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844})
    page = context.new_page()
    page.goto(url)
    page.locator(".tile img.there").nth(3).wait_for()
    page.screenshot(path=folder / "fleet-phone.png")
    page.locator("a.tile").first.click()
    page.locator("img.frame[src]").wait_for()
    page.wait_for_timeout(1_500)
    page.screenshot(path=folder / "stream-phone.png", full_page=True)
    context.close()
