"""The baselines that the generator is compared with, by name.

`build("tent", setup)` gives the method with its published settings; options change them.
"""

from __future__ import annotations

from typing import Any

from meta.baselines.base import Baseline, Setup
from meta.baselines.entropy import Deyo, Eata, Sar, Tent
from meta.baselines.own import Oracle, OwnAdam, OwnSgd
from meta.baselines.plain import BatchStatistics, Lame, Neo, Source
from meta.baselines.roid import Roid
from meta.baselines.teachers import Cotta, Rotta

BASELINES: dict[str, type[Baseline]] = {
    kind.name: kind
    for kind in (Source, BatchStatistics, Tent, Eata, Sar, Deyo, Cotta, Rotta, Roid, Lame, Neo, OwnSgd, OwnAdam, Oracle)
}


def build(name: str, setup: Setup, **options: Any) -> Baseline:
    """A baseline with its published settings, but for `options`. Raises KeyError for an unknown name."""
    return configured(BASELINES[name], setup, **options)


def configured(kind: type[Baseline], setup: Setup, **options: Any) -> Baseline:
    """A method of this kind with its published settings, but for `options`."""
    return kind(setup, **{**kind.published, **options})


__all__ = ["BASELINES", "Baseline", "Setup", "build", "configured"]
