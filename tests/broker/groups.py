"""The group coordinator: who is a member, which generation, who has which offsets.

The classic group protocol (KIP-62, KIP-345 static members, KIP-394 required member ids, KIP-814 static leaders that
return), without the wait of an empty group for more members (group.initial.rebalance.delay.ms is 0). Cooperative
rebalancing (KIP-429) is the clients' matter alone: to a coordinator, its two rebalances are like any others.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.broker import errors

EMPTY, PREPARING, COMPLETING, STABLE = "Empty", "PreparingRebalance", "CompletingRebalance", "Stable"
Answer = dict[str, Any]  # fields of a response
Protocols = list[tuple[str, bytes]]  # names and subscriptions, the preferred first


@dataclass
class Member:
    id: str
    instance: str | None
    session_s: float
    rebalance_s: float
    protocols: Protocols
    client: tuple[str, str]  # its name and host
    assignment: bytes = b""
    joining: asyncio.Future[Answer] | None = None
    syncing: asyncio.Future[Answer] | None = None
    timer: asyncio.TimerHandle | None = None

    def metadata(self, protocol: str | None) -> bytes:
        return dict(self.protocols).get(protocol or "", b"")

    def answer_join(self, answer: Answer) -> None:
        self.joining = _settle(self.joining, answer)

    def answer_sync(self, answer: Answer) -> None:
        self.syncing = _settle(self.syncing, answer)


def _settle(future: asyncio.Future[Answer] | None, answer: Answer) -> None:
    if future is not None and not future.done():
        future.set_result(answer)


@dataclass
class Group:
    """One group. `changed` is called whenever what must survive a restart has changed."""

    name: str
    changed: Callable[[Group], None]
    state: str = EMPTY
    generation: int = 0
    protocol_type: str | None = None
    protocol: str | None = None
    leader: str | None = None
    members: dict[str, Member] = field(default_factory=dict)
    pending: dict[str, asyncio.TimerHandle] = field(default_factory=dict)  # ids given out, not yet come back with
    offsets: dict[tuple[str, int], tuple[int, str | None]] = field(default_factory=dict)
    _deadline: asyncio.TimerHandle | None = None

    # --- requests --------------------------------------------------------------------------------------------------

    async def join(self, version: int, member_id: str, candidate: Member, protocol_type: str) -> Answer:
        """JoinGroup. Answers once the rebalance that it starts, or takes part in, has all members together."""
        instance = candidate.instance
        names = {name for name, _ in candidate.protocols}
        if not names or (self.members and (protocol_type != self.protocol_type or not names & self._common())):
            return _refused(errors.INCONSISTENT_GROUP_PROTOCOL, member_id)
        if not member_id and instance is None and version >= 4:
            return self._give_id(candidate)
        if not member_id and instance is not None and (known := self._static(instance)):
            return await self._replace(known, candidate, version)
        if not member_id or (instance is None and member_id in self.pending):
            return await self._add(candidate, member_id, protocol_type)
        if error := self._unknown(member_id, instance):
            return _refused(error, member_id)
        member = self.members[member_id]
        same = member.protocols == candidate.protocols
        if self.state == COMPLETING and same:  # it asks again, because the answer was lost
            return self._joined(member)
        if self.state == STABLE and same and member_id != self.leader:
            return self._joined(member)
        member.protocols = candidate.protocols
        member.session_s, member.rebalance_s = candidate.session_s, candidate.rebalance_s
        return await self._await_join(member)

    async def sync(self, member_id: str, instance: str | None, generation: int, given: dict[str, bytes]) -> Answer:
        """SyncGroup. Answers once the leader has said who gets what."""
        error = self._unknown(member_id, instance) or self._fenced(generation)
        if error or self.state == PREPARING:
            return {"error_code": error or errors.REBALANCE_IN_PROGRESS}
        member = self.members[member_id]
        if self.state == STABLE:
            self._touch(member)
            return self._synced(member)
        member.answer_sync({"error_code": errors.REBALANCE_IN_PROGRESS})  # an earlier try, whose connection is gone
        member.syncing = future = asyncio.get_running_loop().create_future()
        _cancel(member.timer)
        if member_id == self.leader:
            self._cancel_deadline()
            self.state = STABLE
            for other in self.members.values():
                other.assignment = given.get(other.id, b"")
                if other.syncing:
                    self._touch(other)
                other.answer_sync(self._synced(other))
            self.changed(self)
        return await future

    def heartbeat(self, member_id: str, instance: str | None, generation: int) -> int:
        if error := self._unknown(member_id, instance) or self._fenced(generation):
            return error
        self._touch(self.members[member_id])
        return errors.REBALANCE_IN_PROGRESS if self.state == PREPARING else errors.NONE

    def leave(self, member_id: str, instance: str | None) -> int:
        """LeaveGroup, of one member; a static one may be named by its instance alone."""
        if instance is not None and not member_id:
            member_id = known.id if (known := self._static(instance)) else ""
        if member_id in self.pending:
            self.pending.pop(member_id).cancel()
            self._maybe_complete()
            return errors.NONE
        if error := self._unknown(member_id, instance):
            return error
        self._remove(self.members[member_id])
        return errors.NONE

    def commit_error(self, member_id: str, instance: str | None, generation: int) -> int:
        """Why offsets may not be committed; 0 where they may."""
        if generation < 0 and not self.members:  # no member of any group: a tool, or a consumer that assigns itself
            return errors.NONE
        if error := self._unknown(member_id, instance) or self._fenced(generation):
            return error
        if self.state == COMPLETING:
            return errors.REBALANCE_IN_PROGRESS
        self._touch(self.members[member_id])
        return errors.NONE

    def restore(self, content: dict[str, Any]) -> None:
        """The members of before a restart. Their sessions begin anew: they may have tried all the while."""
        for name in ("generation", "protocol_type", "protocol", "leader"):
            setattr(self, name, content[name])
        self.members = {m.id: m for m in content["members"]}
        self.state = STABLE if self.members else EMPTY
        for member in self.members.values():
            self._touch(member)

    # --- members ---------------------------------------------------------------------------------------------------

    def _common(self) -> set[str]:
        """Protocols that every member speaks."""
        return set.intersection(*({name for name, _ in m.protocols} for m in self.members.values()))

    def _static(self, instance: str) -> Member | None:
        return next((m for m in self.members.values() if m.instance == instance), None)

    def _unknown(self, member_id: str, instance: str | None) -> int:
        if instance is not None and (known := self._static(instance)) and known.id != member_id:
            return errors.FENCED_INSTANCE_ID
        return errors.NONE if member_id in self.members else errors.UNKNOWN_MEMBER_ID

    def _fenced(self, generation: int) -> int:
        return errors.NONE if generation == self.generation else errors.ILLEGAL_GENERATION

    def _give_id(self, candidate: Member) -> Answer:
        """A member has to come back with the id it is given, so that a lost answer leaves no member behind."""
        self.pending[candidate.id] = _later(candidate.session_s, self._forget_pending, candidate.id)
        return _refused(errors.MEMBER_ID_REQUIRED, candidate.id)

    def _forget_pending(self, member_id: str) -> None:
        self.pending.pop(member_id, None)
        self._maybe_complete()

    async def _add(self, member: Member, member_id: str, protocol_type: str) -> Answer:
        if member_id:
            self.pending.pop(member_id).cancel()
            member.id = member_id
        self.members[member.id] = member
        self.protocol_type = protocol_type
        return await self._await_join(member)

    async def _replace(self, known: Member, candidate: Member, version: int) -> Answer:
        """A static member is back, as a process of its own: its place stays, the one before it is fenced off."""
        known.answer_join(_refused(errors.FENCED_INSTANCE_ID, known.id))
        known.answer_sync({"error_code": errors.FENCED_INSTANCE_ID})
        leads = self.leader == known.id
        del self.members[known.id]
        _cancel(known.timer)
        before = self.leader
        candidate.assignment = known.assignment
        self.members[candidate.id] = candidate
        self.leader = candidate.id if leads else self.leader
        if self.state != STABLE or self._vote() != self.protocol:
            return await self._await_join(candidate)
        self._touch(candidate)
        self.changed(self)
        answer = self._joined(candidate)
        if leads and version >= 9:
            return answer | {"skip_assignment": True}
        # One that knows of no assignments to skip must not take itself for the leader.
        return answer | {"leader": before, "members": []}

    def _remove(self, member: Member) -> None:
        del self.members[member.id]
        _cancel(member.timer)
        member.answer_join(_refused(errors.UNKNOWN_MEMBER_ID, member.id))
        member.answer_sync({"error_code": errors.UNKNOWN_MEMBER_ID})
        if self.state == PREPARING:
            self._maybe_complete()
        else:
            self._rebalance()

    def _touch(self, member: Member) -> None:
        """Heard of. While a member waits for an answer of ours, its session does not run."""
        _cancel(member.timer)
        if not member.joining:
            member.timer = _later(member.session_s, self._expire, member)

    def _expire(self, member: Member) -> None:
        if self.members.get(member.id) is member and not member.joining and not member.syncing:
            self._remove(member)

    # --- rebalances ------------------------------------------------------------------------------------------------

    async def _await_join(self, member: Member) -> Answer:
        member.answer_join(_refused(errors.REBALANCE_IN_PROGRESS, member.id))  # an earlier try, its connection is gone
        member.joining = future = asyncio.get_running_loop().create_future()
        _cancel(member.timer)
        self._rebalance()
        return await future

    def _rebalance(self) -> None:
        if self.state != PREPARING:
            if self.state == COMPLETING:
                for member in self.members.values():
                    if member.syncing:
                        member.answer_sync({"error_code": errors.REBALANCE_IN_PROGRESS})
                        self._touch(member)
            self.state = PREPARING
            self._set_deadline(self._complete)
        self._maybe_complete()

    def _set_deadline(self, action: Callable[[], None]) -> None:
        self._cancel_deadline()
        self._deadline = _later(max((m.rebalance_s for m in self.members.values()), default=0), action)

    def _cancel_deadline(self) -> None:
        _cancel(self._deadline)

    def _maybe_complete(self) -> None:
        if self.state == PREPARING and not self.pending and all(m.joining for m in self.members.values()):
            self._complete()

    def _complete(self) -> None:
        """All have joined, or the time for it is over: a new generation of those that have."""
        for member in [m for m in self.members.values() if not m.joining and m.instance is None]:
            _cancel(member.timer)
            del self.members[member.id]
        here = [m for m in self.members.values() if m.joining]
        if self.members and not here:  # static members only, whose sessions run
            self._set_deadline(self._complete)
            return
        self._cancel_deadline()
        self.generation += 1
        if not here:
            self.state, self.protocol, self.leader = EMPTY, None, None
            self.changed(self)
            return
        self.state, self.protocol = COMPLETING, self._vote()
        if self.leader not in {m.id for m in here}:
            self.leader = here[0].id
        for member in here:
            member.answer_join(self._joined(member))
            self._touch(member)
        self._set_deadline(self._drop_unsynced)

    def _drop_unsynced(self) -> None:
        """Members that do not ask for their assignment in time are none (KIP-345's delayed sync)."""
        if self.state == COMPLETING:
            for member in [m for m in self.members.values() if not m.syncing]:
                _cancel(member.timer)
                del self.members[member.id]
            self._rebalance()

    def _vote(self) -> str:
        common = self._common()
        votes = Counter(next(n for n, _ in m.protocols if n in common) for m in self.members.values())
        return votes.most_common(1)[0][0]

    def _joined(self, member: Member) -> Answer:
        everyone = [
            {"member_id": m.id, "group_instance_id": m.instance, "metadata": m.metadata(self.protocol)}
            for m in self.members.values()
        ]
        return {
            "error_code": errors.NONE,
            "generation_id": self.generation,
            "protocol_type": self.protocol_type,
            "protocol_name": self.protocol,
            "leader": self.leader,
            "member_id": member.id,
            "members": everyone if member.id == self.leader else [],
        }

    def _synced(self, member: Member) -> Answer:
        names = {"protocol_type": self.protocol_type, "protocol_name": self.protocol}
        return {"error_code": errors.NONE, "assignment": member.assignment, **names}


def new_member_id(client: str) -> str:
    return f"{client or 'member'}-{uuid.uuid4()}"


def _refused(error: int, member_id: str) -> Answer:
    return {"error_code": error, "generation_id": -1, "protocol_name": "", "leader": "", "member_id": member_id}


def _later(seconds: float, action: Callable[..., None], *arguments: Any) -> asyncio.TimerHandle:
    return asyncio.get_running_loop().call_later(seconds, action, *arguments)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
