"""The kind of an update event's reason, for a metric's label: the reason itself has numbers in it."""

from __future__ import annotations

from schemas.update import UpdateEvent

# The first text that the reason contains decides.
_KINDS = (
    ("policy:", "policy"),
    ("shrunk", "shrunk"),
    ("within limits", "within_limits"),
    ("not finite", "not_finite"),
    ("turn from", "turned"),
    ("gradient norm", "gradient"),
    ("collapse:", "collapse"),
    ("source is estimated", "worse"),
    ("answers leave source", "worse"),
    ("distance from source", "distance"),
    ("frames are blank", "camera"),
    ("frames repeat", "camera"),
    ("one class for", "one_class"),
    ("resting after", "resting"),
    ("settled:", "settled"),
    ("overload:", "overload"),
    ("too few frames", "few_frames"),
    ("switched off", "switched_off"),
    (" bundle ", "bundle"),
    ("the stored", "stored_state"),
)
OTHER, COMMAND = "other", "command"
# No update is wanted now, which includes a camera that shows one class for long.
HELD_BACK = frozenset({"policy", "switched_off", "one_class"})
# Without "camera": blank or repeated frames are no fault of the updates.
TROUBLE = frozenset({"not_finite", "turned", "gradient", "collapse", "worse", "distance"})


def reason_kind(event: UpdateEvent) -> str:
    """One of a fixed set of words."""
    if event.command is not None:
        return COMMAND
    return next((kind for text, kind in _KINDS if text in event.reason), OTHER)
