"""Settings of a worker's process: memory, garbage collection, the interpreter lock; and its version."""

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

    By default activations go back to the kernel after each pass and come back as page faults, which costs a fifth of a
    pass's processor time. With another C library nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((M_ARENA_MAX, 1), (M_MMAP_THRESHOLD, 1 << 30), (M_TRIM_THRESHOLD, 1 << 30)):
            mallopt(parameter, value)


def spare_collections() -> None:
    """Exclude all objects that exist now from garbage collection, for as long as the process lives.

    Torch alone has 300,000 objects. A collection that visits them stops all threads for a sixth of a second or more.
    """
    gc.collect()
    gc.freeze()


def switch_often() -> None:
    """Have threads give up the interpreter lock after a millisecond.

    A pass needs the lock for some microseconds between two operations of torch. With Python's default of 5 ms it waits
    longer for the lock than the next operation takes, whenever the loop computes.
    """
    sys.setswitchinterval(SWITCH_S)


def installed_version() -> str:
    """The distribution's version; `unknown` where the code was copied and not installed."""
    try:
        return version("driftkeel")
    except PackageNotFoundError:
        return "unknown"
