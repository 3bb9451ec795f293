"""The entry point, as the installed script calls it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # Who starts the tests in the background may ignore it.
loading = sys.argv[1]
class Interrupt:
    def find_spec(self, name, *about):
        if name == loading:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
from worker.cli import main
sys.argv = ["driftkeel", "worker"]
main()
"""


@pytest.mark.parametrize(
    ("loading", "code"),
    [
        ("typer", 130),
        ("schemas.config", 130),
        ("worker.cli.streams", 130),
        ("torch", -signal.SIGINT),  # whose own code may lose an exception: the signal itself has to end it
    ],
)
def test_ctrl_c_while_it_loads_is_no_error(loading: str, code: int) -> None:
    result = subprocess.run([sys.executable, "-c", INTERRUPTED, loading], capture_output=True, text=True, timeout=240)
    assert (result.returncode, result.stderr) == (code, "")


def test_sigterm_while_torch_loads_ends_it_with_nothing_to_finish() -> None:
    """By a handler: the first process of a container gets no signal that has none, and would join its group."""
    terminated = INTERRUPTED.replace("SIGINT)\nsys", "SIGTERM)\nsys")
    assert terminated != INTERRUPTED
    result = subprocess.run([sys.executable, "-c", terminated, "torch"], capture_output=True, text=True, timeout=240)
    assert (result.returncode, result.stderr) == (0, "")


def test_numpy_has_no_threads_of_its_own_unless_somebody_says_so() -> None:
    """They spin: equations of two hundred unknowns took thirty times as long where other processes ran as well."""
    threads = "import worker.cli, numpy, pathlib; print(len(list(pathlib.Path('/proc/self/task').iterdir())))"

    def found(**given: str) -> int:
        environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"} | given
        command = [sys.executable, "-c", threads]
        return int(subprocess.run(command, env=environment, capture_output=True, check=True, timeout=240).stdout)

    assert found() == 1
    assert found(OPENBLAS_NUM_THREADS="2") == min(2, len(os.sched_getaffinity(0)))
