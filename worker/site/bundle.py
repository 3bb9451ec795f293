"""The bundle that a site's configuration names."""

from __future__ import annotations

import torch

from meta.bundle import Bundle, load_bundle
from meta.imports import import_from
from meta.method import CPU
from schemas.config import WorkerConfig


def site_bundle(config: WorkerConfig, device: torch.device = CPU) -> Bundle:
    """The checked bundle, built on `device` with no other code than the site allows. Raises BundleError."""
    import_from(config.bundle.code)
    return load_bundle(config.bundle.path, config.bundle.factories, config.adapt.method, device)
