"""Some cameras' heavy pictures, and the others behind them."""

import io
from statistics import median

from PIL import Image

from tests.conftest import picture
from tests.system.conftest import Site, ids_by_stream

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


def test_however_many_send_heavy_pictures_the_others_are_answered_first(site: Site) -> None:
    large = heavy()
    slow = site.send([(f"heavy-{i % 6}", large) for i in range(HEAVY)])
    light = site.send([(f"light-{i % 20}", picture(i)) for i in range(60)])
    site.start()
    found = site.predictions(slow + light)
    waits = {i: predictions[0].wait_seconds for i, predictions in found.items()}
    # Fairness alone would have each light camera wait for a picture of every heavy one.
    assert max(waits[i] for i in light) < sorted(waits[i] for i in slow)[HEAVY // 4], waits


def test_a_worker_that_stops_while_it_decodes_leaves_the_rest_to_the_next(site: Site) -> None:
    frames = [("heavy", heavy())] * 8 + [("heavy" if i % 2 else "light", picture(i)) for i in range(20)]
    ids = site.send(frames)
    first = site.start()
    first.wait_until(lambda: (h := site.header("light")) is not None and h.frames == 10, "the light ones")
    assert first.stop() == 0
    second = site.start()
    # The first may have done all before it stopped; a worker that has just begun knows no SIGTERM yet.
    second.wait_until(lambda: "metrics http://" in second.log.read_text(), "its start")
    site.wait_folded(second, {"heavy": 18, "light": 10})
    assert set(site.predictions(ids)) == set(ids)
    site.assert_folded_once(ids_by_stream(frames, ids))
    assert second.stop() == 0
