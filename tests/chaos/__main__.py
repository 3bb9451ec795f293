"""`python -m tests.chaos --faults 200 --seed 1 --report out.json`."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from tests.chaos.brokers import BROKERS
from tests.chaos.harness import run
from tests.conftest import make_tiny_bundle

parser = argparse.ArgumentParser(prog="make chaos")
parser.add_argument("--faults", type=int, default=200)
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--report", type=Path)
parser.add_argument(
    *("--broker",),
    choices=list(BROKERS),
    default="own",
    help="tests/broker, the demo's, or the three nodes of tests/cluster",
)
parser.add_argument("--threads", type=int, default=1, help="of each worker")
parser.add_argument("--mode", choices=["always", "on_demand"], default="always", help="adapt.mode of the workers")
parser.add_argument("--beside", type=Path, help="folder of another version, which about half of the workers run")
arguments = parser.parse_args()
chosen = {"open_broker": BROKERS[arguments.broker], "threads": arguments.threads, "mode": arguments.mode}
chosen["beside"] = arguments.beside and arguments.beside.resolve()

with tempfile.TemporaryDirectory(prefix="driftkeel-chaos-") as scratch:
    folder = Path(scratch)
    bundle = folder / "bundle"
    make_tiny_bundle(bundle)
    outcome = None
    try:
        outcome = run(arguments.faults, arguments.seed, bundle, folder, **chosen)
    finally:
        if outcome is None or not outcome.sound:
            for log in sorted(folder.glob("*.log")):
                print(f"--- {log.name}\n{log.read_text()[-3_000:]}", file=sys.stderr)
text = json.dumps(outcome.as_dict(), indent=2)
print(text)
if arguments.report:
    arguments.report.write_text(text + "\n")
if not outcome.sound:
    print(f"not sound; 'make chaos ARGS=\"{' '.join(sys.argv[1:])}\"' draws the same faults")
    sys.exit(1)
