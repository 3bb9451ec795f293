"""How workers of a group share its partitions, so that they can change from one way to the other one at a time.

A broker picks a way that all members offer. With `cooperative-sticky` a member keeps its partitions while it joins, and
may offer no way in which that is wrong. With `range` it gives them up first, which is right in both: it offers both,
and range wins where all prefer it. So a group shares by `cooperative-sticky` for as long as one worker asks for it.
"""

from __future__ import annotations

from typing import Any

from kafka.coordinator.assignors.abstract import RebalanceProtocol
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.coordinator.assignors.range import RangePartitionAssignor


class GivesUpFirst(CooperativeStickyAssignor):  # type: ignore[misc]
    """Of a member that has given up all its partitions by the time it joins, as kafka-python's own may not."""

    def supported_protocols(self) -> list[RebalanceProtocol]:
        return [RebalanceProtocol.EAGER]

    def on_assignment(self, assignment: Any, generation: int) -> None:
        """Forget it: of what a member says it owns, a leader gives nothing to others until the member gave it up."""


ASSIGNORS: dict[str, list[type]] = {
    "range": [RangePartitionAssignor, GivesUpFirst],
    "cooperative-sticky": [CooperativeStickyAssignor],
}
