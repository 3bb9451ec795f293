import gzip
from pathlib import Path

import numpy as np
import pytest

from meta import data
from schemas.errors import DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DRIFTKEEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fashion-mnist"


def test_nothing_found_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        data.fashion_mnist("test", [tmp_path], home=(tmp_path / "nowhere").as_uri())
    for part in ("apt-get install dataset-fashion-mnist", "cache", str(tmp_path), "not there"):
        assert part in str(caught.value)


def test_a_damaged_copy_is_passed_over_and_named(tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\0" * 7_840_016))
    with pytest.raises(DataError, match="size or checksum differs"):
        data.fashion_mnist("test", [folder], home=(tmp_path / "nowhere").as_uri())


def test_download_is_checked_and_kept(own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    files = {}
    random = np.random.default_rng(0)
    for (split, kind), file in data._FILES.items():
        size = 16 + 3 * 784 if kind == "images" else 8 + 3
        content = random.integers(0, 10, size, np.uint8).tobytes()
        (home / file.name).write_bytes(gzip.compress(content))
        files[split, kind] = data._File(file.name, size, __import__("hashlib").sha256(content).hexdigest())
    monkeypatch.setattr(data, "_FILES", files)
    first = data.fashion_mnist("test", [own_cache], home=home.as_uri())
    assert first.images.shape == (3, 28, 28)
    assert first.labels.dtype == np.int64
    again = data.fashion_mnist("test", [own_cache], home="file:///nowhere")
    assert np.array_equal(first.images, again.images)


def test_parts_do_not_overlap() -> None:
    parts = [data.SOURCE_PART, data.META_PART, data.CALIBRATION_PART]
    assert parts[0][1] <= parts[1][0]
    assert parts[1][1] <= parts[2][0]
    assert parts[2][1] <= 60_000
