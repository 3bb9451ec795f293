"""The short form of `make chaos`: about a minute."""

from pathlib import Path

import pytest

from tests.chaos.brokers import BROKERS
from tests.chaos.harness import run


@pytest.mark.chaos
@pytest.mark.long
@pytest.mark.parametrize("kind", ["own", "cluster"])
def test_a_dozen_faults(tiny_bundle_path: Path, tmp_path: Path, kind: str) -> None:
    outcome = run(12, 11, tiny_bundle_path, tmp_path, BROKERS[kind], longest_outage_s=3)
    assert outcome.sound, outcome.as_dict()
    assert outcome.frames > 300
    assert outcome.updates > 20
