"""Whose parameters answer for a stream: the one place where policy and guard have their say."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from schemas.policy import Policy, PolicyChange
from schemas.prediction import Parameters
from schemas.state import StreamHeader


class Policies:
    """The policy of every stream: the site's, changed by the site's word on the stream, changed by commands."""

    def __init__(self, general: Policy, streams: Mapping[str, PolicyChange]) -> None:
        self._general, self._streams = general, dict(streams)

    def of(self, header: StreamHeader) -> Policy:
        """What holds for this stream now."""
        policy = self._general
        for change in (self._streams.get(header.stream), header.policy):
            if change is not None:
                policy = change.over(policy)
        return policy


def answering(policy: Policy, header: StreamHeader, trusted: bool = True) -> Parameters:
    """`trusted`: whether the guard believes that the adapted parameters do no worse than source. After a change of
    bundle they may be on probation too.

    Parameters that a person approved answer whatever the guard thinks of their successors.
    """
    if policy.mode == "approve":
        return "source" if header.approved is None else "approved"
    if policy.mode == "shadow" or not trusted or header.probation:
        return "source"
    if policy.mode == "canary" and not in_share(header.stream, policy.canary_share):
        return "source"
    return "adapted"


def in_share(stream: str, share: float) -> bool:
    """Whether the hash of the stream's name lies in the first `share` of all hashes: the same streams at every site,
    and more of them, never others, as the share grows."""
    digest = hashlib.sha256(stream.encode()).digest()
    return int.from_bytes(digest[:8]) < share * 2**64


def named(answer: Parameters, header: StreamHeader) -> Parameters:
    """As predictions and events say it: adapted parameters that no update has moved are those of source."""
    return "source" if answer == "adapted" and not header.step else answer
