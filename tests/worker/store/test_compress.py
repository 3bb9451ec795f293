import zlib

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meta.bundle import load_bundle
from schemas.config import Frames, Store
from schemas.state import StreamHeader, encode_header
from schemas.state_tensors import encode_tensors
from tests.conftest import SHIPPED_BUNDLE, picture
from worker.decode.image import decode_image
from worker.decode.pixels import normalise_pixels
from worker.store.compress import pack, unpack

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


def test_a_state_of_the_shipped_bundle_takes_at_most_60_percent_of_its_float32_bytes() -> None:
    bundle = load_bundle(SHIPPED_BUNDLE)
    method, preprocess = bundle.method, bundle.manifest.preprocess
    state = method.fresh(1)
    for step in range(20):
        pixels = [decode_image(picture(16 * step + i), Frames(), preprocess) for i in range(16)]
        frames = normalise_pixels(pixels, preprocess)
        state = method.update(method.predict(frames, torch.zeros(16, dtype=torch.long), state)).state
    header = StreamHeader(
        stream="line-3/camera-17",
        bundle=bundle.hash,
        method="mgg",
        positions={"frames/11": 123_456_789},
        frames=320,
        step=20,
        folded="0" * 64,
    )
    tensors = {name: tensor[0] for name, tensor in state.items()}
    raw = 4 * sum(tensor.numel() for tensor in tensors.values())
    wire = len(encode_header(header)) + len(pack(encode_tensors(tensors, 20), Store().compression))
    assert wire <= 0.6 * raw


@given(st.lists(st.tuples(st.sampled_from(["noise", "zeros", "few", "ramp"]), st.integers(0, 90_000)), max_size=5))
@settings(deadline=None, max_examples=40)
def test_every_kind_of_bytes_is_one_stream_that_zlib_reads(kinds: list[tuple[str, int]]) -> None:
    random = np.random.default_rng(len(kinds))
    makes = {
        "noise": lambda n: random.integers(0, 256, n, np.uint8),
        "zeros": lambda n: np.zeros(n, np.uint8),
        "few": lambda n: random.integers(0, 90, n, np.uint8),
        "ramp": lambda n: np.arange(n).astype(np.uint8),
    }
    content = b"".join(makes[kind](count).tobytes() for kind, count in kinds)
    packed = pack(content, "deflate")
    assert unpack(packed, LIMIT) == content
    assert len(zlib.decompress(packed[4:])) == len(content)
    assert len(packed) <= len(content) + 200


def test_what_earlier_versions_packed_is_read() -> None:
    content = np.random.default_rng(0).normal(size=1_000).astype(np.float32).tobytes() + b"123"
    whole = len(content) // 4 * 4
    planes = np.frombuffer(content, np.uint8, whole).reshape(-1, 4).T.tobytes()
    assert unpack(b"DKZ1" + zlib.compress(planes + content[whole:], 1), LIMIT) == content
