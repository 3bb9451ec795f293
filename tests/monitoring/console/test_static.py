"""The console's own files: readable in both colours, nothing from elsewhere, nothing inline."""

from __future__ import annotations

import hashlib
import json
import re

import pytest

from monitoring.console.app import STATIC
from monitoring.console.series import DECISIONS

OWN = [path for path in STATIC.iterdir() if path.is_file()]
TEXTS = ("ink", "soft", "faint", "good", "watch", "act", "silent")
GROUNDS = ("ground", "paper", "watch-paper", "hover")


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def themes() -> list[dict[str, str]]:
    css = (STATIC / "console.css").read_text()
    blocks = re.findall(r"\{([^{}]*--ground: .*?)\}", css, re.S)
    return [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block)) for block in blocks]


def test_texts_can_be_read_on_every_ground() -> None:
    """WCAG 2.2, level AA: 4.5 to 1."""
    found = themes()
    assert len(found) == 3
    assert found[1] == found[2], "dark by the system's wish and by the button are the same"
    for theme in found:
        pairs = [(text, ground) for text in TEXTS for ground in GROUNDS] + [
            ("act-ink", "act-paper"),
            ("paper", "adapted"),
        ]
        weak = {pair: round(contrast(theme[pair[0]], theme[pair[1]]), 2) for pair in pairs}
        assert {pair: ratio for pair, ratio in weak.items() if ratio < 4.5} == {}


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_nothing_comes_from_elsewhere_and_no_text_becomes_markup(path) -> None:  # type: ignore[no-untyped-def]
    text = path.read_text().replace("http://www.w3.org/2000/svg", "")
    assert "http://" not in text
    assert "https://" not in text
    for way in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        "javascript:",
    ):
        assert way not in text
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\bstyle=\"|\bon\w+=\"", text)


def test_the_chart_library_is_as_published_with_its_licence() -> None:
    """uPlot 1.6.32; an update changes this line, docs/console.md, and nothing else by hand."""
    vendored = hashlib.sha256((STATIC / "vendor" / "uPlot.esm.js").read_bytes()).hexdigest()
    assert vendored == "5dd9b3281aa64b461b42d9945f6adb2649d346502b12281a9ae0d46599a80eba"
    assert "MIT" in (STATIC / "vendor" / "uPlot-LICENSE").read_text()


def test_the_page_knows_every_decision() -> None:
    found = re.search(r"DECISIONS = (\[.*?\])", (STATIC / "stream.js").read_text())
    assert found
    assert tuple(json.loads(found[1])) == DECISIONS
