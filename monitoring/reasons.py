"""The kind of an update event's reason: a few words for a metric's label, where the reason itself has numbers in it."""

from __future__ import annotations

from schemas.update import UpdateEvent

# The first text that the reason has in it decides.
_KINDS = (
    ("policy:", "policy"),
    ("within limits", "within_limits"),
    ("not finite", "not_finite"),
    ("gradient norm", "gradient"),
    ("distance from source", "distance"),
    ("settled:", "settled"),
    ("overload:", "overload"),
    ("too few frames", "few_frames"),
    ("switched off", "switched_off"),
    ("the stored", "stored_state"),
)
OTHER, COMMAND = "other", "command"
TROUBLE = frozenset({"not_finite", "gradient", "distance"})


def reason_kind(event: UpdateEvent) -> str:
    """One of a fixed set of words."""
    if event.command is not None:
        return COMMAND
    if event.decision in ("applied", "partial"):
        return "within_limits"
    return next((kind for text, kind in _KINDS if text in event.reason), OTHER)
