"""A published baseline in place of the generator, in the real worker."""

from typing import get_args

import pytest

from meta.baselines import BASELINES
from schemas.config import Method
from tests.conftest import picture
from tests.system.conftest import Site

pytestmark = pytest.mark.usefixtures("full_batches")


def test_the_config_names_every_baseline_but_the_oracle() -> None:
    assert set(get_args(Method)) == {"mgg", *BASELINES} - {"oracle"}


def test_tent_through_the_worker_and_back_to_the_generator(site: Site) -> None:
    worker = site.start(adapt={"method": "tent"})
    ids = site.send([(f"cam-{i % 2}", picture(i)) for i in range(64)])
    site.predictions(ids)
    site.wait_folded(worker, {"cam-0": 32, "cam-1": 32})
    header = site.header("cam-0")
    assert header.method == "tent"
    assert header.step > 0
    (first, *_) = site.events(lambda es: sum(len(e.frames) for e in es) >= 64)
    assert first.decision == "applied"
    assert first.raw_gradient_norm > 0
    assert "the guard sees no collapse of it" in worker.log.read_text()
    assert worker.stop() == 0

    # Another method cannot go on from this state: it restarts from source, and says so.
    worker = site.start()
    site.predictions(site.send([("cam-0", picture(i)) for i in range(16)]))
    site.wait_folded(worker, {"cam-0": 48})
    assert site.header("cam-0").method == "mgg"
    assert worker.log.read_text().count("sees no collapse") == 0
    resets = [e for e in site.events(lambda es: any(e.decision == "reset" for e in es)) if e.decision == "reset"]
    assert "(tent)" in resets[0].reason


@pytest.mark.parametrize("method", ["rotta", "neo"])
def test_methods_with_memories_of_their_own_store_and_restore_them(site: Site, method: str) -> None:
    frames = [("cam", picture(i)) for i in range(24)]
    first = site.start(adapt={"method": method})
    site.predictions(site.send(frames))
    site.wait_folded(first, {"cam": 24})
    assert first.stop() == 0
    second = site.start(adapt={"method": method})
    site.predictions(site.send(frames))
    site.wait_folded(second, {"cam": 48})
    assert site.header("cam").step > 4
    assert "restarts from source" not in second.log.read_text()
