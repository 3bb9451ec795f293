"""Tensors as the bytes of a safetensors file.

The library's own writer asks Python for every tensor's size, address and alias: for the many small tensors of a stream
that costs twenty times as much as copying them. Reading stays with the library, which checks what it reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Size, Tensor

_DTYPES = {  # narrow types first, in the library's order
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
_RANK = {dtype: rank for rank, dtype in enumerate(_DTYPES)}
_ALIGNMENT = 8
_Layout = tuple[tuple[str, torch.dtype, Size], ...]


def write_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The file; tensors are on the CPU. Raises KeyError for a dtype that no state has."""
    order, about = _described(tuple((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()))
    header = f'{{"__metadata__":{json.dumps(metadata, separators=(",", ":"))}{about}}}'.encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    return b"".join((len(header).to_bytes(8, "little"), header, *(_content(tensors[name]) for name in order)))


@lru_cache(64)
def _described(layout: _Layout) -> tuple[list[str], str]:
    """Names in the order of their bytes, and what the header says of them: wide types first, for alignment."""
    order = sorted(layout, key=lambda one: (-_RANK[one[1]], one[0]))
    about, start = [], 0
    for name, dtype, shape in order:
        end = start + dtype.itemsize * shape.numel()
        said = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        about.append(f",{json.dumps(name)}:{json.dumps(said, separators=(',', ':'))}")
        start = end
    return [name for name, _, _ in order], "".join(about)


def _content(tensor: Tensor) -> bytes:
    if tensor.dtype == torch.bfloat16:  # NumPy has no such type.
        tensor = tensor.view(torch.int16)
    content: bytes = tensor.detach().numpy().tobytes()
    return content
