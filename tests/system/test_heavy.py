"""One camera's heavy pictures, and the others behind them."""

import io
from statistics import median

from PIL import Image

from tests.conftest import picture
from tests.system.conftest import Site

HEAVY = 24


def heavy() -> bytes:
    """Some kilobytes that take as long as thousands of others."""
    content = io.BytesIO()
    Image.new("RGB", (4_800, 4_800)).save(content, "WEBP", lossless=True, quality=0)
    return content.getvalue()


def test_heavy_pictures_of_one_camera_do_not_hold_up_the_others(site: Site) -> None:
    large = heavy()
    slow = site.send([("heavy", large)] * HEAVY)
    light = site.send([(f"light-{i}", picture(i)) for i in range(20)])
    behind = [i for i in light if i.rsplit("/", 1)[0] == slow[0].rsplit("/", 1)[0]]
    assert behind
    site.start()
    found = site.predictions(slow + light)
    # They came together, and how long they waited is the order in which they were answered.
    waits = {i: predictions[0].wait_seconds for i, predictions in found.items()}
    assert max(waits[i] for i in behind) < median(waits[i] for i in slow), waits
