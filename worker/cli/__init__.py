"""The command line, `driftkeel ...`. Its imports take half a second, and Ctrl-C during them is no error either."""

from __future__ import annotations

import os
import sys

# Before torch and NumPy are loaded: threads that wait must not spin, or they take the processor from those that work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# NumPy's own threads spin all the same. On a busy machine they make small equations thirty times slower.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def main() -> None:
    """Entry point."""
    try:
        from worker.cli.app import run

        run()
    except KeyboardInterrupt:
        sys.exit(130)
