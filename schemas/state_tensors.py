"""A stream's whole state: the header of `schemas.state`, and its tensors, as safetensors bytes in store and files."""

from __future__ import annotations

import json
import struct
from typing import Any, Final

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from schemas.errors import StateError
from schemas.state import FORMAT_VERSION, Snapshot, StreamHeader, check_version, decode_header, read_snapshot
from schemas.tensor_file import write_tensors

MAX_DESCRIPTION_BYTES: Final = 1 << 20  # of tensors; some hundred bytes each, in a file also the header


class StreamState(BaseModel):
    """A stream's state: header, and the method's tensors without their stream dimension."""

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    header: StreamHeader
    tensors: dict[str, Tensor]


def encode_tensors(tensors: dict[str, Tensor], step: int, **more: str) -> bytes:
    """The tensors' bytes for the store; they change only when `step` does, so they are written only then."""
    return write_tensors(tensors, {"version": str(FORMAT_VERSION), "step": str(step), **more})


def encode_file(state: StreamState) -> bytes:
    """A whole state as one safetensors file, to carry it elsewhere."""
    return encode_tensors(state.tensors, state.header.step, header=state.header.model_dump_json())


def decode_file(content: bytes, like: dict[str, Tensor], max_bytes: int) -> StreamState:
    """What `encode_file` wrote, checked like a stored state. Raises StateError."""
    header = _tensor_metadata(content).get("header")
    if not isinstance(header, str):
        raise StateError("the file has no stream header; export it with 'driftkeel streams export'")
    return decode_state(header.encode(errors="replace"), content, like, max_bytes)


def decode_state(header: bytes, blob: bytes, like: dict[str, Tensor], max_bytes: int) -> StreamState:
    """A stored state; its tensors must have the names, shapes and dtypes of `like` and finite values.

    Raises StateError for anything else: too large, damaged, another version, another architecture, or tensors
    that belong to another step than the header.
    """
    if len(blob) > max_bytes:
        raise StateError(f"the stored state has {len(blob)} bytes, more than store.max_state_bytes = {max_bytes}")
    parsed = decode_header(header)
    return StreamState(header=parsed, tensors=decode_tensors(blob, parsed.step, like))


def decode_snapshot(
    content: bytes, blob: bytes, like: dict[str, Tensor], bundle: str
) -> tuple[Snapshot, dict[str, Tensor]]:
    """A kept snapshot of a stream under `bundle` and its tensors, checked like a state. Raises StateError."""
    snapshot = read_snapshot(content)
    if snapshot.header.bundle != bundle:
        raise StateError(f"the snapshot belongs to bundle {snapshot.header.bundle}, this site runs {bundle}")
    return snapshot, decode_tensors(blob, snapshot.header.step, like)


def decode_tensors(blob: bytes, expected_step: int, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stored tensors of that step, with the names, shapes and dtypes of `like` and finite values. Raises StateError."""
    tensors = _loaded(blob, expected_step)
    if set(tensors) != set(like):
        raise StateError(f"the stored state has tensors {sorted(tensors)}, this bundle needs {sorted(like)}")
    for name, expected in like.items():
        found = tensors[name]
        if found.shape != expected.shape or found.dtype != expected.dtype:
            raise StateError(
                f"stored tensor {name!r} is {found.dtype} {tuple(found.shape)}, "
                f"this bundle needs {expected.dtype} {tuple(expected.shape)}"
            )
        if not bool(torch.isfinite(found).all()):
            raise StateError(f"stored tensor {name!r} has values that are not finite")
    return tensors


def decode_matching(blob: bytes, expected_step: int, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the stored tensors of that step that have the name, shape and dtype of one of `like`, and finite values.

    Raises StateError where the bytes are not tensors of that step.
    """
    return {
        name: tensor
        for name, tensor in _loaded(blob, expected_step).items()
        if name in like
        and tensor.shape == like[name].shape
        and tensor.dtype == like[name].dtype
        and bool(torch.isfinite(tensor).all())
    }


def _loaded(blob: bytes, expected_step: int) -> dict[str, Tensor]:
    step = _tensor_metadata(blob).get("step")
    if step != str(expected_step):
        raise StateError(f"the stored tensors are of step {step}, their header is of step {expected_step}")
    try:
        return dict(safetensors.torch.load(blob))
    # The last two: the library lets shapes pass that are too large for torch, where they have no elements.
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise StateError(f"the stored tensors are damaged: {error}") from error


def _tensor_metadata(blob: bytes) -> dict[str, Any]:
    try:
        (length,) = struct.unpack_from("<Q", blob)
        if length > len(blob) - 8:
            raise StateError("the stored tensors are cut off")
        if length > MAX_DESCRIPTION_BYTES:
            raise StateError(f"the stored tensors are described in {length} bytes, more than {MAX_DESCRIPTION_BYTES}")
        metadata = json.loads(blob[8 : 8 + length])["__metadata__"]
        version = int(metadata["version"])
    except (struct.error, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise StateError(f"the stored bytes are no tensors of a stream state: {error}") from error
    check_version(version)
    return dict(metadata)
