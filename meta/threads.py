"""How many threads torch's operations take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Run the block's operations in the calling thread alone.

    For many small ones in turn: to wake a second thread for each costs more than it helps. Other threads keep theirs,
    but for one that uses torch for the first time meanwhile, which stays with one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
