"""Whose parameters answer a stream's frames. Policy and guard are asked here and nowhere else."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from schemas.policy import Policy, PolicyChange
from schemas.prediction import Parameters
from schemas.state import StreamHeader


class Policies:
    """The policy of every stream: the site's, changed by the configuration for the stream, changed by commands."""

    def __init__(self, general: Policy, streams: Mapping[str, PolicyChange]) -> None:
        self._general, self._streams = general, dict(streams)

    def of(self, header: StreamHeader) -> Policy:
        """The policy that holds for this stream now."""
        policy = self._general
        for change in (self._streams.get(header.stream), header.policy):
            if change is not None:
                policy = change.over(policy)
        return policy


def answering(policy: Policy, header: StreamHeader) -> Parameters:
    """Whose parameters answer. Source does while the guard does not trust the adapted ones, and while a stream is on
    probation after a change of bundle. Approved parameters answer whether or not the guard trusts their successors."""
    if policy.mode == "approve":
        return "source" if header.approved is None else "approved"
    if policy.mode == "shadow" or not header.guard.trusted or header.probation:
        return "source"
    if policy.mode == "canary" and not in_share(header.stream, policy.canary_share):
        return "source"
    return "adapted"


def in_share(stream: str, share: float) -> bool:
    """Whether the hash of the stream's name is among the first `share` of all hashes. So the same streams are in at
    every site, and none of them drops out as the share grows."""
    digest = hashlib.sha256(stream.encode()).digest()
    return int.from_bytes(digest[:8]) < share * 2**64


def named(answer: Parameters, header: StreamHeader) -> Parameters:
    """The answer's name for predictions and events: adapted parameters that no update has moved are source's."""
    return "source" if answer == "adapted" and not header.step else answer
