"""What a worker asks of its process."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator

import pytest

from worker.process import spare_collections, switch_often


class Node:
    """Something that can be part of a cycle."""

    own: Node


def cycle() -> weakref.ref[Node]:
    node = Node()
    node.own = node
    return weakref.ref(node)


@pytest.fixture
def spared() -> Iterator[None]:
    spare_collections()
    yield
    gc.unfreeze()


def test_collections_pass_over_what_was_there_and_still_find_new_cycles(spared: None) -> None:
    assert gc.get_freeze_count() > 100 * len(gc.get_objects())
    new = cycle()
    gc.collect()
    assert new() is None


def test_what_is_of_no_use_goes_before_the_rest_is_kept() -> None:
    old = cycle()
    spare_collections()
    gc.unfreeze()
    assert old() is None


def test_the_interpreter_changes_hands_quickly() -> None:
    before = sys.getswitchinterval()
    try:
        switch_often()
        assert sys.getswitchinterval() == 0.001
    finally:
        sys.setswitchinterval(before)
