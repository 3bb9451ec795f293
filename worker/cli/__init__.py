"""The command line, `driftkeel ...`. What it loads takes half a second, in which Ctrl-C is no error either."""

from __future__ import annotations

import os
import sys

# Before torch and NumPy are loaded: threads that wait must not spin, or they take the processor from those that work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# NumPy's threads do spin, whatever that says: on a busy machine small equations take thirty times as long with them.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def main() -> None:
    """Entry point."""
    try:
        from worker.cli.app import run

        run()
    except KeyboardInterrupt:
        sys.exit(130)
