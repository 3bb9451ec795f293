"""Assignment strategies that let the workers of a group change from one to the other, one worker at a time.

A broker picks a strategy that all members offer. With `cooperative-sticky` a member keeps its partitions while it joins
and so must not offer `range`, where that is wrong. With `range` it gives them up first, which is right in both. So it
offers both, and range wins where all members prefer it: a group uses `cooperative-sticky` while one worker asks for it.
"""

from __future__ import annotations

from typing import Any

from kafka.coordinator.assignors.abstract import RebalanceProtocol
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.coordinator.assignors.range import RangePartitionAssignor


class GivesUpFirst(CooperativeStickyAssignor):  # type: ignore[misc]
    """cooperative-sticky for a member that gives up all of its partitions before it joins, which kafka-python's own
    class does not allow."""

    def supported_protocols(self) -> list[RebalanceProtocol]:
        return [RebalanceProtocol.EAGER]

    def on_assignment(self, assignment: Any, generation: int) -> None:
        """Remember nothing. A leader gives no partition that a member says it owns to another before it is given up."""


ASSIGNORS: dict[str, list[type]] = {
    "range": [RangePartitionAssignor, GivesUpFirst],
    "cooperative-sticky": [CooperativeStickyAssignor],
}
