"""Decoded frames as the model's input, and whether they are blank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from meta.method import CPU
from schemas.bundle import Preprocess
from worker.decode.image import Pixels

BLANK_DEVIATION, BLANK_PIXELS = 2.0, 1_024  # standard deviation in grey levels, and over about how many pixels


def blank_frames(frames: np.ndarray) -> np.ndarray:
    """(B,) bool: which frames uint8 (B, h, w) or (B, h, w, 3) are nearly one colour."""
    channels = 1 if frames.ndim == 3 else frames.shape[-1]
    some = frames.reshape(len(frames), -1, channels)
    # Pixels of a channel side by side in memory: sums over pixels that lie apart take ten times as long.
    apart = np.ascontiguousarray(some[:, :: max(1, some.shape[1] // BLANK_PIXELS)].swapaxes(1, 2), np.float32)
    count = apart.shape[2]
    apart -= np.add.reduce(apart, 2, keepdims=True) / count
    blank: np.ndarray = (np.einsum("bcn,bcn->bc", apart, apart) < BLANK_DEVIATION**2 * count).all(1)
    return blank


def normalise_pixels(
    pixels: Sequence[Pixels] | np.ndarray, preprocess: Preprocess, device: torch.device = CPU
) -> Tensor:
    """Decoded pixels, uint8 (h, w) or (h, w, 3), to the model's input: float (B, ch, h, w), channels-last.

    They go to a GPU as bytes, from pinned memory, so that the caller need not wait for the copy.
    """
    stacked = torch.from_numpy(pixels if isinstance(pixels, np.ndarray) else np.stack(pixels))
    if device.type != "cpu":
        stacked = stacked.pin_memory().to(device, non_blocking=True)
    images = stacked.unsqueeze(1) if stacked.dim() == 3 else stacked.permute(0, 3, 1, 2)
    mean = torch.tensor(preprocess.mean, device=device).view(1, -1, 1, 1) * 255
    std = torch.tensor(preprocess.std, device=device).view(1, -1, 1, 1) * 255
    return ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last)
