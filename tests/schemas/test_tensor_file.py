"""Files of tensors are what the library itself would have written."""

import json
import struct

import pytest
import safetensors.torch
import torch

from schemas.tensor_file import write_tensors

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16)
SMALL = (torch.int8, torch.uint8, torch.bool)


def many() -> dict[str, torch.Tensor]:
    """Every dtype, every kind of shape, not sorted."""
    found = {"scalar": torch.tensor(3.5), "none": torch.zeros(0, 4), 'täg"s': torch.arange(5).half()}
    for dtype in (*SMALL, *DTYPES):
        found[f"z-{dtype}"] = torch.arange(12).reshape(3, 4).to(dtype)
        found[f"a-{dtype}"] = torch.ones(3).to(dtype)
    return found


def split(content: bytes) -> tuple[dict[str, object], bytes]:
    (length,) = struct.unpack_from("<Q", content)
    assert length % 8 == 0
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def test_the_bytes_are_the_librarys() -> None:
    metadata = {"version": "1", "step": "7"}
    assert split(write_tensors(many(), metadata)) == split(safetensors.torch.save(many(), metadata))


def test_the_library_reads_them() -> None:
    tensors = many()
    found = safetensors.torch.load(write_tensors(tensors, {}))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_views_and_learned_tensors_are_written_as_they_read() -> None:
    rows = torch.arange(12.0).reshape(3, 4)
    tensors = {"row": rows[1], "column": rows[:, 2], "learned": torch.ones(2, requires_grad=True)}
    tensors["turned"] = rows.to(torch.bfloat16).T
    found = safetensors.torch.load(write_tensors(tensors, {}))
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name


def test_the_same_names_with_other_shapes_are_another_file() -> None:
    for size in (1, 2, 1):
        assert safetensors.torch.load(write_tensors({"a": torch.zeros(size)}, {}))["a"].shape == (size,)


def test_a_dtype_that_no_state_has_is_refused() -> None:
    with pytest.raises(KeyError):
        write_tensors({"a": torch.zeros(1, dtype=torch.complex64)}, {})
