"""Take the README's picture from a running demo, or measure a page with hundreds of cameras."""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.console.fleet import measure
from tests.console.picture import take


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.console", description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command")
    picture = commands.add_parser("picture", help="from a demo at the height of its drift")
    picture.add_argument("output", type=Path, help="a folder: fleet.png, stream.png and others")
    fleet = commands.add_parser("fleet", help="times of a page with many cameras, in headless Chromium")
    fleet.add_argument("--streams", type=int, default=500)
    fleet.add_argument("--seconds", type=float, default=30)
    fleet.add_argument("--report", type=Path)
    given = parser.parse_args()
    if given.command == "picture":
        take(given.output)
    else:
        measure(given.streams, given.seconds, given.report)


if __name__ == "__main__":
    main()
