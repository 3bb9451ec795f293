"""The folder of a bundle: its manifest, and files that are checked against it. Does not import torch."""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path

from pydantic import ValidationError

from schemas.bundle import FileEntry, Manifest
from schemas.errors import BundleError, first_mistake
from schemas.verdict import Verdict

MGG_NAME = "mgg"
MANIFEST = "manifest.json"
LABELS = "labels.txt"
VERDICT = "verdict.json"
MAX_MANIFEST_BYTES = 1 << 20
MAX_FILE_BYTES = 8 << 30


def rewrite_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest of a bundle; its other files stay."""
    # Empty fields are left out: workers of earlier versions refuse fields that they do not have.
    unsaid = {name for name in ("norm_order", "norm_layouts") if not getattr(manifest.model, name)}
    text = json.dumps(manifest.model_dump(mode="json", exclude={"model": unsaid}), indent=2)
    partial = folder / f".{MANIFEST}"
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(folder / MANIFEST)


def read_manifest(folder: Path) -> Manifest:
    """The validated manifest. Raises BundleError."""
    path = folder / MANIFEST
    try:
        if _size(path) > MAX_MANIFEST_BYTES:
            raise BundleError(f"{path} is larger than {MAX_MANIFEST_BYTES} bytes")
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise BundleError(
            f"no bundle at {folder.absolute()}: {MANIFEST} is missing; "
            "name a bundle's folder (a worker's is bundle.path)"
        ) from error
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror or error}") from error
    except ValidationError as error:
        raise BundleError(f"{path} is no valid manifest: {first_mistake(error)}") from error


def read_labels(folder: Path, manifest: Manifest) -> list[str]:
    """The checked class labels, in the order of the model's outputs. Raises BundleError."""
    if LABELS not in manifest.files:
        raise BundleError(f"the manifest in {folder} does not list {LABELS}")
    try:
        return checked_file(folder, LABELS, manifest.files[LABELS]).decode("utf-8").split("\n")[:-1]
    except UnicodeDecodeError as error:
        raise BundleError(f"{folder / LABELS} is no text in UTF-8: {error}") from error


def read_verdict(folder: Path) -> Verdict | None:
    """The checked verdict of `driftkeel bundle create`; None if the bundle has none. Raises BundleError."""
    entry = read_manifest(folder).files.get(VERDICT)
    if entry is None:
        return None
    try:
        return Verdict.model_validate_json(checked_file(folder, VERDICT, entry))
    except ValidationError as error:
        raise BundleError(f"{folder / VERDICT} is no valid verdict: {first_mistake(error)}") from error


def checked_file(folder: Path, name: str, entry: FileEntry) -> bytes:
    """The content of a bundle's file. Raises BundleError if it is not as the manifest says."""
    path = folder / name
    try:
        if entry.size > MAX_FILE_BYTES or _size(path) != entry.size:
            raise BundleError(
                f"{path} does not have the {entry.size} bytes that the manifest says; get the bundle again"
            )
        content = path.read_bytes()
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror or error}; get the bundle again") from error
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise BundleError(f"{path} was altered: its SHA-256 is not the manifest's; get the bundle again")
    return content


def _size(path: Path) -> int:
    """The size of a regular file, in bytes. Raises OSError.

    Raises BundleError for other files, to which a link may lead: reading a device or a pipe may never end.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise BundleError(f"{path} is no plain file; get the bundle again")
    return found.st_size
