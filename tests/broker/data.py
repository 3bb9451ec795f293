"""What a broker keeps: topics, groups, producer ids. A journal of JSON lines beside the partitions' files."""

from __future__ import annotations

import base64
import itertools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.broker import errors
from tests.broker.groups import Group, Member
from tests.broker.log import Log, RefusedError

LEGAL_NAME = re.compile(r"[a-zA-Z0-9._-]{1,249}")
PRODUCERS_AT_A_TIME = 1_000  # ids noted as taken, so that each does not cost a line


@dataclass
class Topic:
    configs: dict[str, str]
    partitions: list[Log] = field(default_factory=list)


class Data:
    """With a `folder`, everything that was acknowledged survives a kill of this process."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self.topics: dict[str, Topic] = {}
        self.groups: dict[str, Group] = {}
        self._first_producer = 0
        self._journal = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._replay(folder / "journal.jsonl")
            self._journal = (folder / "journal.jsonl").open("a")
        self._producers = itertools.count(self._first_producer)

    # --- topics ----------------------------------------------------------------------------------------------------

    def create_topic(self, name: str, partitions: int, configs: dict[str, str]) -> None:
        """Raises RefusedError."""
        if not LEGAL_NAME.fullmatch(name) or name in (".", ".."):
            raise RefusedError(errors.INVALID_TOPIC)
        if name in self.topics:
            raise RefusedError(errors.TOPIC_ALREADY_EXISTS)
        if partitions < 1:
            raise RefusedError(errors.INVALID_PARTITIONS)
        self.topics[name] = Topic(configs)
        self.grow_topic(name, partitions)

    def grow_topic(self, name: str, partitions: int) -> None:
        """Raises RefusedError."""
        topic = self._topic(name)
        if partitions <= len(topic.partitions):
            raise RefusedError(errors.INVALID_PARTITIONS)
        while len(topic.partitions) < partitions:
            path = self._folder / f"{name}-{len(topic.partitions)}.log" if self._folder else None
            topic.partitions.append(Log(path))
        self._note(topic=name, partitions=partitions, configs=topic.configs)

    def configure_topic(self, name: str, changes: dict[str, str | None]) -> None:
        """None takes a setting away. Raises RefusedError."""
        topic = self._topic(name)
        after = {**topic.configs, **changes}
        topic.configs = {setting: value for setting, value in after.items() if value is not None}
        self._note(topic=name, partitions=len(topic.partitions), configs=topic.configs)

    def delete_topic(self, name: str) -> None:
        """Raises RefusedError."""
        for log in self._topic(name).partitions:
            log.delete()
        del self.topics[name]
        self._note(topic=name, partitions=0)

    def partition(self, name: str, index: int) -> Log:
        """Raises RefusedError."""
        partitions = self._topic(name).partitions
        if not 0 <= index < len(partitions):
            raise RefusedError(errors.UNKNOWN_TOPIC_OR_PARTITION)
        return partitions[index]

    def _topic(self, name: str) -> Topic:
        if name not in self.topics:
            raise RefusedError(errors.UNKNOWN_TOPIC_OR_PARTITION)
        return self.topics[name]

    # --- groups and producers --------------------------------------------------------------------------------------

    def group(self, name: str) -> Group:
        """The group of this name, a new one if need be."""
        if name not in self.groups:
            self.groups[name] = Group(name, self._note_members)
        return self.groups[name]

    def commit(self, group: Group, offsets: dict[tuple[str, int], tuple[int, str | None]]) -> None:
        group.offsets |= offsets
        self._note(group=group.name, offsets=[[*where, *what] for where, what in offsets.items()])

    def delete_group(self, name: str) -> None:
        """Raises RefusedError."""
        if name not in self.groups:
            raise RefusedError(errors.GROUP_ID_NOT_FOUND)
        if self.groups[name].members:
            raise RefusedError(errors.NON_EMPTY_GROUP)
        del self.groups[name]
        self._note(group=name, deleted=True)

    def new_producer(self) -> int:
        producer = next(self._producers)
        if producer % PRODUCERS_AT_A_TIME == 0 or producer == self._first_producer:
            self._note(producers=producer + PRODUCERS_AT_A_TIME)
        return producer

    # --- the journal -----------------------------------------------------------------------------------------------

    def _note(self, **entry: Any) -> None:
        if self._journal is not None:
            self._journal.write(json.dumps(entry) + "\n")
            self._journal.flush()

    def _note_members(self, group: Group) -> None:
        members = [
            {
                **{"id": m.id, "instance": m.instance, "session_s": m.session_s, "rebalance_s": m.rebalance_s},
                **{"client": m.client, "assignment": _text(m.assignment)},
                "protocols": [(name, _text(content)) for name, content in m.protocols],
            }
            for m in group.members.values()
        ]
        names = {name: getattr(group, name) for name in ("generation", "protocol_type", "protocol", "leader")}
        self._note(group=group.name, members=members, **names)

    def _replay(self, path: Path) -> None:
        topics: dict[str, dict[str, Any]] = {}
        members: dict[str, dict[str, Any]] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                entry = json.loads(line)
            except ValueError:  # killed in the middle of a write
                continue
            name = entry.get("group")
            if "topic" in entry:
                topics[entry["topic"]] = entry
            elif "offsets" in entry:
                self.group(name).offsets |= {(t, p): (offset, note) for t, p, offset, note in entry["offsets"]}
            elif "members" in entry:
                members[name] = entry
            elif "deleted" in entry:
                self.groups.pop(name, None)
                members.pop(name, None)
            else:
                self._first_producer = entry["producers"]
        for name, entry in topics.items():
            if entry["partitions"]:
                self.create_topic(name, entry["partitions"], entry["configs"])
        for name, entry in members.items():
            self.group(name).restore(entry | {"members": [_member(m) for m in entry["members"]]})


def _member(entry: dict[str, Any]) -> Member:
    protocols = [(name, base64.b64decode(content)) for name, content in entry["protocols"]]
    assignment, client = base64.b64decode(entry["assignment"]), tuple(entry["client"])
    return Member(**entry | {"protocols": protocols, "assignment": assignment, "client": client})


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()
