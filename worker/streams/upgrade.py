"""What becomes of a stream's state when the worker runs another bundle than the one that wrote it.

`reset` starts the stream from the new source model. `carry` keeps its parameters where they mean the same under the new
bundle: method, network, weights, preprocessing and labels are the same, and only the generator or the calibration is
new. Elsewhere it resets. `shadow` does the same as `carry`, and has the source model answer at first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from meta.bundle_folder import MGG_NAME, read_manifest
from meta.method import State
from schemas.bundle import Manifest
from schemas.config import Bundle as BundleSettings
from schemas.errors import BundleError, StateError
from schemas.state import GuardState, RunningProxies, StreamHeader
from schemas.state_tensors import decode_matching, decode_tensors
from worker.engine.engine import Engine

# The tensors of `mgg` that only the generator that wrote them can use: its memory, and gradients in its units.
GENERATORS_OWN = frozenset({"memory_weight", "memory_bias", "first_moment", "second_moment", "age"})


@dataclass(frozen=True)
class Moved:
    """A stream's header under the new bundle, its tensors where they were carried over, and `why`, for the event."""

    header: StreamHeader
    tensors: State | None
    why: str


class Upgrade:
    """Moves states to the bundle that `engine` runs. `settings` name the bundles that states may come from.

    `max_distance` from source is what the guard allows. A state beyond it is reset: the guard would let it only go back
    towards source, while the shift that it has adapted to may last.
    """

    def __init__(self, settings: BundleSettings, engine: Engine, max_distance: float = math.inf) -> None:
        self._max_distance = max_distance
        self._mode, self._shadow_frames, self._engine = settings.on_change, settings.shadow_frames, engine
        self._previous = dict(identified(path) for path in settings.previous)

    def moved(self, old: StreamHeader, blob: bytes | None) -> Moved:
        """The state of another bundle or method, with the tensors `blob`, under this one. The position stays."""
        bundle, method = self._engine.bundle_hash, self._engine.bundle.method_name
        header = old.model_copy(
            update={
                "bundle": bundle,
                "method": method,
                "probation": self._shadow_frames if self._mode == "shadow" else 0,
                # These were measured with the old bundle's calibration, or against its limits.
                "proxies": RunningProxies(),
                "guard": GuardState(),
                "drift": None,
                "snapshot": 0,
            }
        )
        why = f"the stored state belongs to bundle {old.bundle} ({old.method}), this is {bundle} ({method})"
        if self._mode != "reset":
            try:
                tensors, how = self._carried(old, blob)
                self._require_near(tensors)
                return Moved(header, tensors, f"carried over from bundle {old.bundle} to {bundle}: {how}")
            except StateError as error:
                why = f"{why}, and cannot be carried over: {error}"
        return Moved(header.model_copy(update={"step": 0, "approved": None}), None, why)

    def _carried(self, old: StreamHeader, blob: bytes | None) -> tuple[State, str]:
        """The tensors, and what was the same. Raises StateError where they mean nothing under this bundle."""
        engine = self._engine
        before, now = self._previous.get(old.bundle), engine.bundle.manifest
        if before is None:
            raise StateError("bundle.previous does not name that bundle")
        if old.method != engine.bundle.method_name:
            raise StateError("the methods differ")
        if before.model_hash != now.model_hash:
            raise StateError("network, weights, preprocessing or labels differ")
        if blob is None:
            raise StateError("it expired while the stream was idle, or its tensors were evicted")
        if before.generator_hash == now.generator_hash or old.method != MGG_NAME:
            return decode_tensors(blob, old.step, engine.like), "the same model and generator"
        kept = {name: tensor for name, tensor in engine.like.items() if name not in GENERATORS_OWN}
        found = decode_matching(blob, old.step, kept)
        if "affine" not in found:
            raise StateError("the norm affines differ")
        return {**engine.like, **found}, "the same model; another generator, whose memory starts empty"

    def _require_near(self, tensors: State) -> None:
        distance = float((tensors["affine"] - self._engine.like["affine"]).norm())
        if distance > self._max_distance:
            raise StateError(
                f"it is {distance:.3g} from source, and this bundle's limit with guard.max_distance_factor is "
                f"{self._max_distance:.3g}"
            )


def identified(folder: Path) -> tuple[str, Manifest]:
    """A bundle that streams may be carried over from, by its hash. Raises BundleError."""
    try:
        manifest = read_manifest(folder)
    except BundleError as error:
        raise BundleError(f"bundle.previous: {error}") from error
    return manifest.content_hash, manifest
