"""`python -m worker ...` in processes of their own that need not import it: torch alone takes each of them seconds."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# A server that never runs anything imports once, and forks: what it starts is as fresh as what an interpreter starts.
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["tests.forked", "worker.cli.app", "worker.run"])


class Forked:
    """One command, with its own process id and signals; as much of `subprocess.Popen` as tests use."""

    def __init__(self, arguments: Sequence[str], output: Path, errors: Path, **environment: str) -> None:
        for path in (output, errors):
            path.touch()  # They are read before the process has begun.
        started = (list(arguments), str(output), str(errors), {**os.environ, **environment}, os.getcwd())
        self._process = _server.Process(target=_run, args=started, daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(arguments: list[str], output: str, errors: str, environment: Mapping[str, str], folder: str) -> None:
    for number, path in ((1, output), (2, errors)):
        with open(path, "ab") as file:
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["driftkeel", *arguments]
    runpy.run_module("worker", run_name="__main__", alter_sys=True)
