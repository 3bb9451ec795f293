import threading

import pytest
import torch

from meta.threads import one_thread


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_threads_are_as_before_after_the_block(two_threads) -> None:
    with one_thread():
        assert torch.get_num_threads() == 1
        with one_thread():
            pass
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with pytest.raises(ValueError, match="broken"), one_thread():
        raise ValueError("broken")
    assert torch.get_num_threads() == 2


def test_other_threads_keep_theirs(two_threads) -> None:
    known, inside, seen = threading.Event(), threading.Event(), []

    def other() -> None:
        seen.append(torch.get_num_threads())
        known.set()
        assert inside.wait(120)
        seen.append(torch.get_num_threads())

    thread = threading.Thread(target=other)
    thread.start()
    assert known.wait(120)
    with one_thread():
        inside.set()
        thread.join(120)
    assert seen == [2, 2]
