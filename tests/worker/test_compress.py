import zlib

import torch
from hypothesis import given
from hypothesis import strategies as st

from schemas.state import encode_tensors
from worker.compress import pack, unpack

LIMIT = 1 << 20


@given(st.binary(max_size=400))
def test_what_goes_in_comes_out(content: bytes) -> None:
    assert unpack(pack(content, "deflate"), LIMIT) == content


@given(st.binary(max_size=200))
def test_anything_else_comes_back_as_it_is(content: bytes) -> None:
    assert unpack(content, LIMIT) == content
    damaged = b"DKZ1" + content
    assert unpack(damaged, LIMIT) in (damaged, b"")


def test_a_bomb_is_not_unpacked() -> None:
    bomb = b"DKZ1" + zlib.compress(bytes(100 * LIMIT))
    assert unpack(bomb, LIMIT) == bomb


def test_tensors_get_smaller() -> None:
    tensors = {"a": torch.randn(4, 448), "b": torch.randn(16, 448).half()}
    content = encode_tensors(tensors, 1)
    packed = pack(content, "deflate")
    assert len(packed) < 0.95 * len(content)
    assert pack(content, "none") == content
