"""User code in a benchmark: methods, which are subclasses of `meta.baselines.Baseline`, and networks of bundles."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from meta.baselines import Baseline
from meta.imports import import_from, imported
from meta.method import State
from meta.models import COLLECTIONS
from schemas.errors import ConfigError

APART = 0.25  # share of an update's size above which a difference is not rounding


def user_method(name: str) -> type[Baseline]:
    """The class named by `module:Class`, installed or in the current folder. Raises ConfigError."""
    import_from(Path.cwd())
    try:
        found = imported(name, "run in the folder it lies in")
    except ImportError as error:
        raise ConfigError(f"own_methods: {name!r}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Baseline)):
        raise ConfigError(f"own_methods: {name!r} is no subclass of meta.baselines.Baseline")
    return found


def network_code(architecture: str) -> str:
    """The digest of the module that defines a network; empty for networks of timm and torchvision."""
    module, _, _ = architecture.partition(":")
    return "" if module in COLLECTIONS else code_digest(importlib.import_module(module))


def code_digest(of: type[Baseline] | ModuleType) -> str:
    """The SHA-256 of a module's file, or of the one that defines a class: results of older code are not reused."""
    try:
        code = Path(inspect.getfile(of)).read_bytes()
    except (OSError, TypeError) as error:
        raise ConfigError(f"no file has the code of {of.__name__!r}: {error}") from error
    return hashlib.sha256(code).hexdigest()


def check_streams_apart(name: str, method: Baseline, frames: Tensor) -> bool:
    """Check that a stream's result does not depend on which streams share its pass. Raises ConfigError if it does.

    The benchmark runs many streams in one pass, where a mean over all frames would give wrong results without an error.
    frames (B, ch, h, w): a few standardised ones. Returns False if the method is not deterministic, so that nothing can
    be concluded.
    """
    parts = [part for part in frames[:12].tensor_split([2, 8]) if len(part)]
    before = method.fresh(len(parts))
    for of, tensor in before.items():
        if tensor.dim() == 0 or len(tensor) != len(parts):
            raise ConfigError(
                f"own_methods: {name!r}: {of!r} of its state is {tuple(tensor.shape)} for {len(parts)} streams; its "
                "first dimension must be the stream"
            )
    _check_finite(name, before, "before the first update")
    together = _advanced(name, method, parts)
    _check_finite(name, together, "after two updates from clean frames")
    for row, part in enumerate(parts):
        alone, again = _advanced(name, method, [part]), _advanced(name, method, [part])
        for of, tensor in alone.items():
            moved = float((tensor[0] - before[of][row]).float().norm())
            least = APART * moved + 1e-4 * (1 + float(tensor[0].float().norm()))
            if float((tensor[0] - again[of][0]).float().norm()) > least:
                return False
            if float((tensor[0] - together[of][row]).float().norm()) > least:
                raise ConfigError(
                    f"own_methods: {name!r}: what a stream gets depends on who shares its pass ({of!r} of its state "
                    "does); take means over each stream's own frames, as meta.objective.per_stream_mean does"
                )
    return True


def _check_finite(name: str, state: State, when: str) -> None:
    """Raises ConfigError where no update would ever be taken."""
    if odd := [of for of, tensor in state.items() if not bool(tensor.isfinite().all())]:
        raise ConfigError(
            f"own_methods: {name!r}: {odd[0]!r} of its state is not finite {when}, and every update that is not "
            "finite is refused; keep a large number in place of infinity"
        )


def _advanced(name: str, method: Baseline, parts: list[Tensor]) -> State:
    """The state of new streams, one for each of `parts`, after two updates from the stream's part."""
    stream = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(part) for part in parts]))
    state = method.fresh(len(parts))
    for _ in range(2):
        forward = method.predict(torch.cat(parts), stream, state)
        if type(method).update is Baseline.update:
            with torch.enable_grad():
                loss, active, _ = method.loss(forward)
            if not loss.shape == active.shape == forward.counts.shape:
                raise ConfigError(
                    f"own_methods: {name!r}: of {len(parts)} streams its loss is {tuple(loss.shape)} and which take a "
                    f"step {tuple(active.shape)}; both must be ({len(parts)},), one for each stream"
                )
        state = {of: tensor.detach() for of, tensor in method.update(forward).state.items()}
    return state
