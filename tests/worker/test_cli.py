"""The entry point, as the installed script calls it."""

from __future__ import annotations

import signal
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


CLOSING = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
class Loading:
    def find_spec(self, name, *about):
        if name == "torch":  # whose own code may lose an exception that comes while it is loaded
            os.kill(os.getpid(), signal.SIGINT)
            sys.exit("went on")
sys.meta_path.insert(0, Loading())
from worker.cli import main
sys.argv = ["driftkeel", "worker"]
main()
"""


def test_ctrl_c_ends_a_worker_that_still_loads_torch() -> None:
    result = subprocess.run([sys.executable, "-c", CLOSING], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (-signal.SIGINT, "")
