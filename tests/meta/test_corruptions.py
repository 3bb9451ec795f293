import numpy as np
import pytest

from meta.benchmark.corruptions import ALL, SEVERITIES, TEST, TUNING, corrupt


def pictures(channels: int, side: int = 32, count: int = 12) -> np.ndarray:
    """Smooth blobs on a dark ground, as different from each other as photographs are."""
    random = np.random.default_rng(0)
    grid = np.linspace(0, 1, side)
    centres = random.uniform(0.2, 0.8, (count, 2, channels))
    rows = (grid[None, :, None, None] - centres[:, None, None, 0]) ** 2
    columns = (grid[None, None, :, None] - centres[:, None, None, 1]) ** 2
    images = (40 + 180 * np.exp(-20 * (rows + columns))).astype(np.uint8)
    return images[..., 0] if channels == 1 else images


def test_fifteen_to_test_and_four_to_tune() -> None:
    assert (len(TEST), len(TUNING)) == (15, 4)
    assert not set(TEST) & set(TUNING)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ALL)
def test_shape_type_and_bytes_are_the_same_every_time(name: str, channels: int) -> None:
    for side in (28, 32):
        images = pictures(channels, side)
        for severity in SEVERITIES:
            out = corrupt(images, name, severity)
            assert (out.shape, out.dtype) == (images.shape, np.uint8)
            np.testing.assert_array_equal(out, corrupt(images, name, severity))
        assert out.std() > 2


# Saturation of a grey picture stays 0 up to severity 3; elastic at 1 and the spatter kinds are not ordered by design.
@pytest.mark.parametrize("name", sorted(set(ALL) - {"saturate", "elastic_transform", "spatter"}))
def test_severity_5_changes_more_than_severity_1(name: str) -> None:
    images = pictures(3).astype(float)

    def change(severity: int) -> float:
        return np.abs(corrupt(pictures(3), name, severity) - images).mean()

    assert change(5) > 1.3 * change(1) >= 0


def test_noise_has_the_published_size() -> None:
    grey = np.full((20, 32, 32), 128, np.uint8)
    assert corrupt(grey, "gaussian_noise", 5).std() == pytest.approx(0.10 * 255, rel=0.05)
    assert corrupt(grey, "shot_noise", 5).std() == pytest.approx((0.5 / 50) ** 0.5 * 255, rel=0.05)
    assert corrupt(grey, "speckle_noise", 5).std() == pytest.approx(0.2 * 128, rel=0.05)
    hit = corrupt(grey, "impulse_noise", 5)
    assert (hit != 128).mean() == pytest.approx(0.07, rel=0.1)
    assert (hit == 255).sum() == pytest.approx((hit == 0).sum(), rel=0.2)


def test_contrast_and_brightness_by_hand() -> None:
    images = pictures(1)
    mean = images.mean((1, 2), keepdims=True)
    np.testing.assert_allclose(corrupt(images, "contrast", 5), mean + 0.15 * (images - mean), atol=1)
    np.testing.assert_allclose(corrupt(images, "brightness", 5), np.minimum(images + 0.3 * 255, 255), atol=1)


def test_saturation_by_hand() -> None:
    red = np.zeros((1, 32, 32, 3), np.uint8)
    red[..., 0], red[..., 1:] = 200, 100  # saturation 0.5
    out = corrupt(red, "saturate", 1)[0, 0, 0]
    np.testing.assert_allclose(out, [200, 200 * 0.85, 200 * 0.85], atol=1)


@pytest.mark.parametrize("name", ["gaussian_blur", "defocus_blur", "motion_blur", "zoom_blur", "glass_blur"])
def test_blurs_keep_a_flat_picture(name: str) -> None:
    flat = np.full((3, 28, 28), 90, np.uint8)
    np.testing.assert_allclose(corrupt(flat, name, 5), 90, atol=1)


def test_unknown_names_and_severities() -> None:
    with pytest.raises(KeyError):
        corrupt(pictures(1), "rain", 1)
    with pytest.raises(IndexError, match="severity 6"):
        corrupt(pictures(1), "fog", 6)
