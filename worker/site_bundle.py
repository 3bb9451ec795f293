"""The bundle that a site's configuration names."""

from __future__ import annotations

from meta.bundle import Bundle, load_bundle
from meta.models import import_from
from schemas.config import WorkerConfig


def site_bundle(config: WorkerConfig) -> Bundle:
    """Checked and built, with the code that the site allows and no other. Raises BundleError."""
    import_from(config.bundle.code)
    return load_bundle(config.bundle.path, config.bundle.factories, config.adapt.method)
