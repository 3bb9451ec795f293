import struct
import tracemalloc
from datetime import UTC, datetime

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import StateError
from schemas.frame import Position
from schemas.state import DriftWatch, Snapshot, StreamHeader, decode_header, encode_header
from schemas.state_tensors import (
    StreamState,
    decode_file,
    decode_matching,
    decode_snapshot,
    decode_state,
    decode_tensors,
    encode_file,
    encode_tensors,
)

LIMIT = 1 << 20
LIKE = {"affine": torch.zeros(5), "memory": torch.zeros(2, 3), "age": torch.zeros(())}


def header(**changes: object) -> StreamHeader:
    values = {"stream": "cam-1", "bundle": "b" * 16, "method": "mgg", "step": 3, **changes}
    return StreamHeader.model_validate(values)


def with_metadata(content: str) -> bytes:
    head = f'{{"__metadata__":{content}}}'.encode()
    return struct.pack("<Q", len(head)) + head


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensor.shape, generator=random) for name, tensor in LIKE.items()}


@given(
    st.integers(0, 10),
    st.text(min_size=1, max_size=20),
    st.dictionaries(st.sampled_from(["frames/0", "frames/7"]), st.integers(0, 2**62)),
)
def test_round_trip(seed: int, stream: str, positions: dict[str, int]) -> None:
    original = header(stream=stream, positions=positions, frames=12, folded="f" * 64)
    content = tensors(seed)
    state = decode_state(encode_header(original), encode_tensors(content, 3), LIKE, LIMIT)
    assert state.header == original
    for name, tensor in content.items():
        assert torch.equal(state.tensors[name], tensor)


def test_a_state_goes_through_a_file() -> None:
    state = StreamState(header=header(positions={"frames/0": 7}), tensors=tensors())
    content = encode_file(state)
    found = decode_file(content, LIKE, len(content))
    assert found.header == state.header
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in state.tensors.items())
    with pytest.raises(StateError, match="max_state_bytes"):
        decode_file(content, LIKE, len(content) - 1)


def test_a_snapshot_of_another_bundle_is_refused() -> None:
    """Also where its tensors have the right shapes."""
    said = Snapshot(time=datetime(2026, 1, 2, tzinfo=UTC), reason="", header=header()).model_dump_json().encode()
    blob = encode_tensors(tensors(), 3)
    snapshot, found = decode_snapshot(said, blob, LIKE, "b" * 16)
    assert (snapshot.header, set(found)) == (header(), set(LIKE))
    with pytest.raises(StateError, match=f"belongs to bundle {'b' * 16}, this site runs c"):
        decode_snapshot(said, blob, LIKE, "c")


def test_of_tensors_of_another_make_those_are_taken_that_fit() -> None:
    found = {"affine": torch.zeros(6), "memory": torch.zeros(2, 3).half(), "age": torch.tensor(torch.nan)}
    assert decode_matching(encode_tensors(found, 3), 3, LIKE) == {}
    assert set(decode_matching(encode_tensors({**tensors(), "other": torch.zeros(5)}, 3), 3, LIKE)) == set(LIKE)


def known(said: object, place: str = "") -> dict[str, object]:
    """Every place of a document where it says anything."""
    if isinstance(said, dict):
        return {where: what for key, value in said.items() for where, what in known(value, f"{place}.{key}").items()}
    return {place[1:]: said} if said else {}


def test_what_an_earlier_version_did_not_say_is_as_of_a_new_stream() -> None:
    named = {"stream": "a", "bundle": "b", "method": "m"}
    expected = {"version": 1, "guard.trusted": True, "guard.dominant": -1}
    assert known(StreamHeader(**named).model_dump()) == named | expected
    assert known(DriftWatch().model_dump()) == {"adapting": True}


def test_position_says_what_is_folded() -> None:
    state = header(positions={"frames/0": 41})
    assert state.has_folded(Position("frames", 0, 41))
    assert not state.has_folded(Position("frames", 0, 42))
    assert not state.has_folded(Position("frames", 1, 0))
    assert not state.has_folded(Position("other", 0, 0))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda h, t: (h, t[:-3]), "damaged"),
        (lambda h, t: (h, b""), "no tensors"),
        (lambda h, t: (h, b"\xff" * 40), "cut off"),
        (lambda h, t: (h, with_metadata('{"version":Infinity}')), "no tensors"),
        (lambda h, t: (h, with_metadata('{"version":"1","step":"\\ud800"}')), r"of step \?, their header"),
        (lambda h, t: (b"{}", t), "version None"),
        (lambda h, t: (b"\x80\x04pickle", t), "no stream state"),
        (lambda h, t: (b"[" * 100_000, t), "no stream state"),
        (lambda h, t: (h.replace(b'"version":1', b'"version":2'), t), "format version 2, this worker knows 1"),
        (lambda h, t: (h.replace(b'"frames":0', b'"frames":-1', 1), t), "wrong at frames"),
        (lambda h, t: (h.replace(b'"positions":{}', b'"positions":{"f/0":9223372036854775808}'), t), "positions.f/0"),
        (lambda h, t: (h.replace(b'"commands":{}', b'"commands":{"c/0":9223372036854775808}'), t), "commands.c/0"),
        (lambda h, t: (h + b" " * (256 << 10), t), "more than 262144"),
        (lambda h, t: (h, encode_tensors(tensors(), 2)), "of step 2, their header is of step 3"),
        (lambda h, t: (h, encode_tensors({"affine": torch.zeros(5)}, 3)), "has tensors"),
        (lambda h, t: (h, encode_tensors({**tensors(), "affine": torch.zeros(6)}, 3)), r"\(6,\), this bundle needs"),
        (lambda h, t: (h, encode_tensors({**tensors(), "affine": torch.zeros(5).half()}, 3)), "float16"),
        (lambda h, t: (h, encode_tensors({**tensors(), "affine": torch.full((5,), torch.nan)}, 3)), "not finite"),
        (lambda h, t: (h, encode_tensors({**tensors(), "affine": torch.zeros(LIMIT)}, 3)), "max_state_bytes"),
    ],
)
def test_what_is_not_a_state_is_refused(damage, message: str) -> None:
    with pytest.raises(StateError, match=message):
        decode_state(*damage(encode_header(header()), encode_tensors(tensors(), 3)), LIKE, LIMIT)


def test_a_rule_that_a_later_version_has_added_counts_only_where_it_is_set() -> None:
    """To pass over a rule that somebody has set would be to break it."""
    frozen = header(policy={"frozen": True})
    stored = encode_header(frozen)
    assert decode_header(stored.replace(b'"policy":{', b'"policy":{"later":null,')) == frozen
    with pytest.raises(StateError, match=r"wrong at policy\.later"):
        decode_header(stored.replace(b'"policy":{', b'"policy":{"later":0,'))


@pytest.mark.parametrize("shape", ["[4294967296,0,4294967296,4611686018427387904,1]", "[0,18446744073709551615]"])
def test_a_shape_that_no_tensor_has_is_damage(shape: str) -> None:
    said = f'{{"version":"1","step":"3"}},"affine":{{"dtype":"F32","shape":{shape},"data_offsets":[0,0]}}'
    with pytest.raises(StateError, match="damaged"):
        decode_tensors(with_metadata(said), 3, LIKE)


def test_a_description_without_end_is_not_read() -> None:
    """Three bytes become a hundred: of a bomb of 100 KB it was gigabytes."""
    blob = with_metadata('{"version":"1","step":"3"},"x":[' + "[]," * 400_000 + "[]]")
    tracemalloc.start()
    try:
        with pytest.raises(StateError, match="described in 1200"):
            decode_tensors(blob, 3, LIKE)
        assert tracemalloc.get_traced_memory()[1] < len(blob)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("said", ["7", '["{}"]', '"\\ud800"'])
def test_a_file_whose_header_is_no_text_is_refused(said: str) -> None:
    with pytest.raises(StateError):
        decode_file(with_metadata(f'{{"version":"1","step":"3","header":{said}}}'), LIKE, LIMIT)


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_no_bytes_break_the_decoder(first: bytes, second: bytes) -> None:
    with pytest.raises(StateError):
        decode_state(first, second, LIKE, LIMIT)
    with pytest.raises(StateError):
        decode_header(first)


@given(st.data())
def test_flipped_bits_never_give_a_wrong_shape(data: st.DataObject) -> None:
    blob = bytearray(encode_tensors(tensors(), 3))
    blob[data.draw(st.integers(0, len(blob) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        state = decode_state(encode_header(header()), bytes(blob), LIKE, LIMIT)
    except StateError:
        return
    for name, tensor in LIKE.items():
        assert state.tensors[name].shape == tensor.shape
        assert torch.isfinite(state.tensors[name]).all()
