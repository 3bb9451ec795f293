"""The common corruptions: fifteen for testing and four for tuning, at severities 1 to 5.

Source: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
ICLR 2019, with the constants that the authors published for images of 32 pixels (CIFAR-10-C). The library
imagecorruptions 1.1.2 is not used: it has the constants for 224 pixels, refuses images below 32 pixels, and fails on
three of the nineteen with NumPy 2 and present scikit-image.

Known differences: `frost` overlays a generated texture, the authors' code photographs. `spatter` at severities 1 to 3
(water) does not emboss the drops. `glass_blur` copies pixels, as in the authors' code, where the paper exchanges them.
On grey images a coloured overlay has its grey value.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from meta.source import image_tensor

# images float (B, ch, h, w) in [0, 1] with ch 1 or 3, severity 1..5, random numbers -> the same shape.
Corruption = Callable[[Tensor, int, torch.Generator], Tensor]
SEVERITIES = (1, 2, 3, 4, 5)
CHUNK = 1_000
LUMA = (0.299, 0.587, 0.114)


def corrupt(images: np.ndarray, name: str, severity: int) -> np.ndarray:
    """Corrupt images uint8 (N, h, w) or (N, h, w, 3); deterministic.

    Raises KeyError for an unknown name and IndexError for a severity outside 1 to 5.
    """
    corruption = ALL[name]
    if severity not in SEVERITIES:
        raise IndexError(f"severity {severity} is not one of 1 to 5")
    parts = []
    for start in range(0, len(images), CHUNK):
        chunk = image_tensor(images[start : start + CHUNK])
        random = torch.Generator().manual_seed(zlib.crc32(f"{name} {severity} {start}".encode()))
        out = corruption(chunk.float() / 255, severity, random).clamp(0, 1)
        out = (out * 255 + 1e-3).to(torch.uint8)
        parts.append((out.squeeze(1) if images.ndim == 3 else out.permute(0, 2, 3, 1)).numpy())
    return np.concatenate(parts)


# --- helpers -----------------------------------------------------------------------------------------------------


def _normal(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=random)


def _uniform(shape: tuple[int, ...], low: float, high: float, random: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=random)


def _overlay(images: Tensor, colour: tuple[float, float, float]) -> Tensor:
    """A colour (ch, 1, 1) for images with one or three channels."""
    values = colour if images.shape[1] == 3 else (sum(w * c for w, c in zip(LUMA, colour, strict=True)),)
    return torch.tensor(values).view(-1, 1, 1)


def _gaussian(images: Tensor, sigma: float, truncate: float = 4.0, mode: str = "replicate") -> Tensor:
    """Separable Gaussian filter of images (B, ch, h, w)."""
    radius = int(truncate * sigma + 0.5)
    if radius == 0:
        return images
    taps = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (taps / sigma) ** 2)
    kernel = kernel / kernel.sum()
    flat = images.flatten(0, 1).unsqueeze(1)
    flat = F.conv2d(F.pad(flat, (radius, radius, 0, 0), mode=mode), kernel.view(1, 1, 1, -1))
    flat = F.conv2d(F.pad(flat, (0, 0, radius, radius), mode=mode), kernel.view(1, 1, -1, 1))
    return flat.view(images.shape)


def _clipped_zoom(images: Tensor, factor: float) -> Tensor:
    """Magnify about the centre, by bilinear interpolation, and crop to the original size."""
    height, width = images.shape[2:]
    rows, columns = math.ceil(height / factor), math.ceil(width / factor)
    top, left = (height - rows) // 2, (width - columns) // 2
    part = images[:, :, top : top + rows, left : left + columns]
    size = (max(height, round(rows * factor)), max(width, round(columns * factor)))
    out = F.interpolate(part, size, mode="bilinear", align_corners=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return out[:, :, top : top + height, left : left + width]


def _motion(images: Tensor, radius: int, sigma: float, degrees: Tensor) -> Tensor:
    """Blur along a direction per image (B,), with the one-sided Gaussian kernel of ImageMagick."""
    height, width = images.shape[2:]
    steps = torch.arange(2 * radius + 1)
    weights = torch.exp(-0.5 * (steps / sigma) ** 2)
    weights = weights / weights.sum()
    angle = torch.deg2rad(degrees)
    rows, columns = torch.arange(height).view(1, -1, 1), torch.arange(width).view(1, 1, -1)
    flat = images.flatten(2)
    out = torch.zeros_like(flat)
    for step, weight in zip(steps.tolist(), weights.tolist(), strict=True):
        if weight < 1e-5:
            break
        down = torch.ceil(step * torch.sin(angle) - 0.5).long().view(-1, 1, 1)
        right = torch.ceil(step * torch.cos(angle) - 0.5).long().view(-1, 1, 1)
        index = (rows + down).clamp(0, height - 1) * width + (columns + right).clamp(0, width - 1)
        out += weight * flat.gather(2, index.flatten(1).unsqueeze(1).expand_as(flat))
    return out.view(images.shape)


def _plasma(count: int, size: int, decay: float, random: torch.Generator) -> Tensor:
    """Height maps (count, size, size) in [0, 1] by the diamond-square algorithm on a torus."""
    side = 1 << (size - 1).bit_length()
    heights = torch.zeros(count, side, side)
    step, wibble = side, 100.0

    def fill(around: Tensor) -> Tensor:
        return around / 4 + wibble * _uniform(tuple(around.shape), -wibble, wibble, random)

    while step >= 2:
        half = step // 2
        corners = heights[:, ::step, ::step]
        square = corners + corners.roll(-1, 1)
        heights[:, half::step, half::step] = fill(square + square.roll(-1, 2))
        middle = heights[:, half::step, half::step]
        corners = heights[:, ::step, ::step]
        heights[:, ::step, half::step] = fill(middle + middle.roll(1, 1) + corners + corners.roll(-1, 2))
        heights[:, half::step, ::step] = fill(middle + middle.roll(1, 2) + corners + corners.roll(-1, 1))
        step, wibble = half, wibble / decay
    low, high = heights.amin((1, 2), keepdim=True), heights.amax((1, 2), keepdim=True)
    return ((heights - low) / (high - low))[:, :size, :size]


def _through_pillow(images: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    """Apply a function of Pillow images to each image, in 8 bits."""
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    pixels = pixels[..., 0] if pixels.shape[3] == 1 else pixels
    return image_tensor(np.stack([np.asarray(change(Image.fromarray(image))) for image in pixels])).float() / 255


def _coloured(images: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function of RGB images; grey images are converted to RGB for it, and back."""
    if images.shape[1] == 3:
        return change(images)
    out = change(images.expand(-1, 3, -1, -1))
    return (out * torch.tensor(LUMA).view(3, 1, 1)).sum(1, keepdim=True)


# --- the fifteen -------------------------------------------------------------------------------------------------


def gaussian_noise(images: Tensor, severity: int, random: torch.Generator) -> Tensor:
    """Independent normal noise."""
    scale = (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1]
    return images + scale * _normal(images.shape, random)


def shot_noise(images: Tensor, severity: int, random: torch.Generator) -> Tensor:
    """Poisson noise of few photons."""
    photons = (500, 250, 100, 75, 50)[severity - 1]
    return torch.poisson(images * photons, generator=random) / photons


def impulse_noise(images: Tensor, severity: int, random: torch.Generator) -> Tensor:
    """Pixels turned black or white."""
    amount = (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
    draw = torch.rand(images.shape, generator=random)
    return torch.where(draw < amount / 2, 0.0, torch.where(draw < amount, 1.0, images))


def defocus_blur(images: Tensor, severity: int, random: torch.Generator) -> Tensor:
    """A disc of confusion, antialiased."""
    radius, alias = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))[severity - 1]
    reach = math.ceil(radius) + 1
    taps = torch.arange(-reach, reach + 1)
    disc = (taps.view(-1, 1) ** 2 + taps.view(1, -1) ** 2 <= radius**2).float()[None, None]
    smooth = torch.exp(-0.5 * (torch.arange(-1, 2) / alias) ** 2)
    smooth = smooth / smooth.sum()
    kernel = F.conv2d(disc / disc.sum(), torch.outer(smooth, smooth)[None, None], padding=1)
    flat = F.pad(images.flatten(0, 1).unsqueeze(1), (reach,) * 4, mode="reflect")
    return F.conv2d(flat, kernel).view(images.shape)


def glass_blur(images: Tensor, severity: int, random: torch.Generator) -> Tensor:
    """Every pixel but those at the border is taken from one step up or left, or stays; once or twice."""
    sigma, rounds = ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))[severity - 1]
    count, _, height, width = images.shape
    rows, columns = torch.arange(height).view(-1, 1), torch.arange(width).view(1, -1)
    inner = (rows > 1) & (columns > 1)
    flat = _gaussian(images, sigma).flatten(2)
    for _ in range(rounds):
        up, left = torch.randint(0, 2, (2, count, height, width), generator=random)
        index = ((rows - up * inner) * width + columns - left * inner).flatten(1)
        flat = flat.gather(2, index.unsqueeze(1).expand_as(flat))
    return _gaussian(flat.view(images.shape), sigma)


def motion_blur(images: Tensor, severity: int, random: torch.Generator) -> Tensor:
    """A one-sided Gaussian trail in a direction of each image's own."""
    radius, sigma = ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5))[severity - 1]
    return _motion(images, radius, sigma, _uniform((len(images),), -45, 45, random))


def zoom_blur(images: Tensor, severity: int, random: torch.Generator) -> Tensor:
    """The mean over zooms into the centre."""
    factors = [1 + step / 100 for step in range((6, 11, 16, 21, 26)[severity - 1])]
    return (images + sum(_clipped_zoom(images, factor) for factor in factors)) / (len(factors) + 1)


def snow(images: Tensor, severity: int, random: torch.Generator) -> Tensor:
    """Flakes blown in one direction over a whitened picture."""
    mean, deviation, zoom, threshold, radius, sigma, keep = (
        (0.1, 0.2, 1.0, 0.6, 8, 3.0, 0.95),
        (0.1, 0.2, 1.0, 0.5, 10, 4.0, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4.0, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6.0, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12.0, 0.8),
    )[severity - 1]
    flakes = mean + deviation * _normal((len(images), 1, *images.shape[2:]), random)
    flakes = _clipped_zoom(flakes, zoom)
    flakes = torch.where(flakes < threshold, 0.0, flakes).clamp(0, 1)
    flakes = _motion(flakes, int(radius), sigma, _uniform((len(images),), -135, -45, random))
    luma = torch.tensor(LUMA if images.shape[1] == 3 else (1.0,)).view(-1, 1, 1)
    grey = (images * luma).sum(1, keepdim=True)
    bleached = keep * images + (1 - keep) * torch.maximum(images, grey * 1.5 + 0.5)
    return bleached + flakes + flakes.rot90(2, (2, 3))


def frost(images: Tensor, severity: int, random: torch.Generator) -> Tensor:
    """Ice crystals over part of the picture; a generated texture, see above."""
    keep, amount = ((1.0, 0.2), (1.0, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))[severity - 1]
    size = max(images.shape[2:])
    rough, fine = _plasma(len(images), size, 2.0, random), _plasma(len(images), size, 1.5, random)
    crystals = (1 - (2 * rough - 1).abs()) * (0.4 + 0.6 * fine)
    crystals = (0.15 + crystals)[:, None, : images.shape[2], : images.shape[3]]
    return keep * images + amount * crystals.clamp(0, 1) * _overlay(images, (0.85, 0.95, 1.0))


def fog(images: Tensor, severity: int, random: torch.Generator) -> Tensor:
    """A plasma fractal as veil."""
    amount, decay = ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75))[severity - 1]
    veil = _plasma(len(images), max(images.shape[2:]), decay, random)[:, None, : images.shape[2], : images.shape[3]]
    brightest = images.amax((1, 2, 3), keepdim=True)
    return (images + amount * veil) * brightest / (brightest + amount)


def brightness(images: Tensor, severity: int, random: torch.Generator) -> Tensor:
    """Value of HSV raised, hue and saturation kept."""
    more = (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1]
    value = images.amax(1, keepdim=True)
    raised = (value + more).clamp(max=1)
    return torch.where(value > 0, images * raised / value.clamp_min(1e-6), raised)


def contrast(images: Tensor, severity: int, random: torch.Generator) -> Tensor:
    """Pixels pulled towards the mean of their image and channel."""
    keep = (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1]
    mean = images.mean((2, 3), keepdim=True)
    return mean + keep * (images - mean)


def elastic_transform(images: Tensor, severity: int, random: torch.Generator) -> Tensor:
    """A random affine map and a smoothed random displacement of pixels."""
    size = images.shape[3]
    strength, sigma, jitter = (
        (0.0, 0.0, 0.08),
        (0.05, 0.2, 0.07),
        (0.08, 0.06, 0.06),
        (0.1, 0.04, 0.05),
        (0.1, 0.03, 0.03),
    )[severity - 1]
    height, width = images.shape[2:]
    rows, columns = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    # Three corners of a square move at random: that is an affine map, here from output to input.
    middle, reach = size // 2, size // 3
    corners = torch.tensor([[middle + reach, middle + reach], [middle + reach, middle - reach], [middle - reach] * 2])
    corners = corners.float().expand(len(images), 3, 2)
    moved = corners + _uniform((len(images), 3, 2), -jitter * size, jitter * size, random)
    matrix = torch.linalg.solve(torch.cat([moved, torch.ones(len(images), 3, 1)], 2), corners)  # (B, 3, 2)
    mode = "reflect" if 3 * sigma * size < size - 1 else "replicate"
    noise = _uniform((len(images), 2, height, width), -1, 1, random)
    moves = strength * size * _gaussian(noise, sigma * size, truncate=3, mode=mode)
    displaced = [columns + moves[:, 0], rows + moves[:, 1]]
    places = torch.stack([*displaced, torch.ones_like(displaced[0])], 3)
    source = places @ matrix.unsqueeze(1)
    scale = torch.tensor([2 / (width - 1), 2 / (height - 1)])
    return F.grid_sample(images, source * scale - 1, padding_mode="reflection", align_corners=True)


def pixelate(images: Tensor, severity: int, random: torch.Generator) -> Tensor:
    """Shrunk and enlarged again, without smoothing."""
    share = (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1]
    height, width = images.shape[2:]
    small = (int(width * share), int(height * share))
    box = Image.Resampling.BOX
    return _through_pillow(images, lambda image: image.resize(small, box).resize((width, height), box))


def jpeg_compression(images: Tensor, severity: int, random: torch.Generator) -> Tensor:
    """Through JPEG at low quality."""
    quality = (80, 65, 58, 50, 40)[severity - 1]

    def recompress(image: Image.Image) -> Image.Image:
        out = io.BytesIO()
        image.save(out, "JPEG", quality=quality)
        return Image.open(out)

    return _through_pillow(images, recompress)


# --- the four to tune on -----------------------------------------------------------------------------------------


def speckle_noise(images: Tensor, severity: int, random: torch.Generator) -> Tensor:
    """Normal noise in proportion to the pixel."""
    scale = (0.06, 0.1, 0.12, 0.16, 0.2)[severity - 1]
    return images + images * scale * _normal(images.shape, random)


def gaussian_blur(images: Tensor, severity: int, random: torch.Generator) -> Tensor:
    """A Gaussian blur."""
    return _gaussian(images, (0.4, 0.6, 0.7, 0.8, 1.0)[severity - 1])


def spatter(images: Tensor, severity: int, random: torch.Generator) -> Tensor:
    """Drops of water on the lens, or of mud."""
    mean, deviation, sigma, threshold, last, mud = (
        (0.62, 0.1, 0.7, 0.7, 0.5, False),
        (0.65, 0.1, 0.8, 0.7, 0.5, False),
        (0.65, 0.3, 1.0, 0.69, 0.5, False),
        (0.65, 0.1, 0.7, 0.69, 0.6, True),
        (0.65, 0.1, 0.5, 0.68, 0.6, True),
    )[severity - 1]
    liquid = _gaussian(mean + deviation * _normal((len(images), 1, *images.shape[2:]), random), sigma)
    if mud:
        cover = _gaussian((liquid > threshold).float(), last)
        cover = torch.where(cover < 0.8, 0.0, cover)
        return images * (1 - cover) + cover * _overlay(images, (63 / 255, 42 / 255, 20 / 255))
    drops = _gaussian(torch.where(liquid < threshold, 0.0, liquid), 0.7)
    drops = last * drops / drops.amax((1, 2, 3), keepdim=True).clamp_min(1e-6)
    return images + drops * _overlay(images, (175 / 255, 238 / 255, 238 / 255))


def saturate(images: Tensor, severity: int, random: torch.Generator) -> Tensor:
    """Saturation of HSV scaled and raised. Grey has hue 0 (red), as in the usual conversion."""
    times, more = ((0.3, 0.0), (0.1, 0.0), (1.5, 0.0), (2.0, 0.1), (2.5, 0.2))[severity - 1]

    def change(rgb: Tensor) -> Tensor:
        value = rgb.amax(1, keepdim=True)
        saturation = (value - rgb.amin(1, keepdim=True)) / value.clamp_min(1e-6)
        wanted = (saturation * times + more).clamp(0, 1)
        away = torch.where(
            saturation > 1e-4,
            (value - rgb) / saturation.clamp_min(1e-4),
            value * torch.tensor([0.0, 1.0, 1.0]).view(3, 1, 1),
        )
        return value - away * wanted

    return _coloured(images, change)


TEST: dict[str, Corruption] = {
    f.__name__: f
    for f in (
        *(gaussian_noise, shot_noise, impulse_noise, defocus_blur, glass_blur, motion_blur, zoom_blur, snow, frost),
        *(fog, brightness, contrast, elastic_transform, pixelate, jpeg_compression),
    )
}
TUNING: dict[str, Corruption] = {f.__name__: f for f in (speckle_noise, gaussian_blur, spatter, saturate)}
ALL: dict[str, Corruption] = TEST | TUNING
