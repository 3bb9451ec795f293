"""The number of threads of torch's operations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's operations in this block in the calling thread alone.

    For sequences of small operations, for which waking other threads costs more than it gains. The setting is per
    thread, except that a thread which uses torch for the first time meanwhile keeps a limit of one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
