"""A worker's process: its version, memory that stays, short pauses, quick turns of the interpreter."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from importlib.metadata import PackageNotFoundError, version

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h
SWITCH_S = 0.001


def keep_freed_memory() -> None:
    """Have glibc keep what a pass frees for the next pass.

    By default activations go back to the kernel after each pass and come again as page faults: a fifth of a pass's
    processor time. Where the C library is another one, nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((M_ARENA_MAX, 1), (M_MMAP_THRESHOLD, 1 << 30), (M_TRIM_THRESHOLD, 1 << 30)):
            mallopt(parameter, value)


def spare_collections() -> None:
    """Leave all that is there now out of garbage collections, for as long as the process lives.

    Torch alone has 300,000 objects. To go over them stops all threads, passes too, for a sixth of a second and more.
    """
    gc.collect()
    gc.freeze()


def switch_often() -> None:
    """Have the interpreter change hands within a millisecond.

    Between two operations of torch a pass needs it for some microseconds. With Python's own 5 ms it waits longer for it
    than the next operation takes, whenever the loop computes.
    """
    sys.setswitchinterval(SWITCH_S)


def installed_version() -> str:
    """The distribution's version; `unknown` where it was not installed but copied."""
    try:
        return version("driftkeel")
    except PackageNotFoundError:
        return "unknown"
