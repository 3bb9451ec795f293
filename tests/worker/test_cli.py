"""The entry point, as the installed script calls it."""

from __future__ import annotations

import subprocess
import sys

import pytest

INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # Who starts the tests in the background may ignore it.
class Interrupt:
    def find_spec(self, name, *about):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
from worker.cli import main
main()
"""


@pytest.mark.parametrize("loading", ["typer", "schemas.config", "worker.streams_cli"])
def test_ctrl_c_while_it_loads_is_no_error(loading: str) -> None:
    result = subprocess.run([sys.executable, "-c", INTERRUPTED, loading], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (130, "")
