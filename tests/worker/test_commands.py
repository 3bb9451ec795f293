"""The list of commands: bounded, each once, and what a stream has still to obey."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.command import Command
from schemas.frame import Position
from schemas.state import StreamHeader
from worker.commands import CommandList

HEADER = StreamHeader(stream="cam", bundle="b", method="mgg")


def put(commands: CommandList, offset: int, stream: str = "cam", partition: int = 0, **more) -> Command:
    command = Command(stream=stream, action="freeze", **more)
    commands.add(Position("commands", partition, offset), command.model_dump_json(exclude_none=True).encode())
    return command


def ids(commands: CommandList, header: StreamHeader) -> list[str]:
    return [numbered.command.id for numbered in commands.after(header)]


@given(streams=st.lists(st.sampled_from(["cam", "other", "*"]), max_size=12), obeyed=st.integers(-1, 12))
def test_a_stream_obeys_its_own_and_everybodys_in_order(streams: list[str], obeyed: int) -> None:
    commands = CommandList()
    sent = [put(commands, offset, stream) for offset, stream in enumerate(streams)]
    header = HEADER.model_copy(update={"commands": {"commands/0": obeyed}})
    expected = [c.id for offset, c in enumerate(sent) if c.stream != "other" and offset > obeyed]
    assert ids(commands, header) == expected
    assert [n.command.id for n in commands.news()] == [c.id for c in sent]
    assert commands.news() == []


def test_positions_are_kept_per_partition() -> None:
    commands = CommandList()
    put(commands, 0)
    second = put(commands, 0, partition=1)
    assert ids(commands, HEADER.model_copy(update={"commands": {"commands/0": 5}})) == [second.id]


def test_one_that_is_sent_twice_counts_once() -> None:
    commands = CommandList()
    put(commands, 0, id="x")
    put(commands, 1, id="x")
    assert ids(commands, HEADER) == ["x"]


def test_one_without_an_id_has_its_place() -> None:
    commands = CommandList()
    commands.add(Position("commands", 2, 7), b'{"stream":"cam","action":"reset"}')
    assert ids(commands, HEADER) == ["record:2:7"]


def test_memory_is_bounded_and_the_newest_stay() -> None:
    commands = CommandList(max_kept=3)
    sent = [put(commands, offset, stream) for offset, stream in enumerate(["a", "cam", "cam", "*", "cam"])]
    assert ids(commands, HEADER) == [sent[2].id, sent[3].id, sent[4].id]
    assert ids(commands, HEADER.model_copy(update={"stream": "a"})) == [sent[3].id]


@given(content=st.one_of(st.none(), st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
def test_whatever_comes_is_a_command_or_counted(content: bytes | None) -> None:
    commands = CommandList()
    commands.add(Position("commands", 0, 0), content)
    assert commands.unreadable + len(commands.news()) == 1
    assert commands.next_offset("commands/0") == 1


def test_a_command_that_is_none_is_named_in_plain_words(caplog: pytest.LogCaptureFixture) -> None:
    content = {"stream": "cam", "action": "freeze", "policy": {"mode": "shadow"}}
    commands = CommandList()
    commands.add(Position("commands", 0, 1), json.dumps(content).encode())
    commands.add(Position("commands", 0, 2), json.dumps({**content, "policy": {"frozen": "x"}}).encode())
    said = [record.getMessage().partition("passed over: ")[2] for record in caplog.records]
    assert said[0] == "'policy' belongs to the action policy, and to no other"
    assert said[1].startswith("policy.frozen: Input should be a valid boolean")
