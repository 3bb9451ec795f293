"""The list of commands: bounded, each once, and what a stream has still to obey."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.command import Command
from schemas.frame import Position
from schemas.policy import PolicyChange
from schemas.state import StreamHeader
from worker.control.commands import CommandList

HEADER = StreamHeader(stream="cam", bundle="b", method="mgg")


def put(commands: CommandList, offset: int, stream: str = "cam", partition: int = 0, **more) -> Command:
    command = Command(stream=stream, **{"action": "freeze", **more})
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
    assert commands.news() == list(dict.fromkeys(streams))
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


def test_another_command_with_an_id_that_was_used_is_named_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    commands = CommandList()
    first = put(commands, 3, id="x")
    commands.add(Position("commands", 0, 3), first.model_dump_json().encode())  # read again, after an error
    assert caplog.records == []
    put(commands, 8, action="unfreeze", id="x")
    (said,) = [record.getMessage() for record in caplog.records]
    assert "command x at commands/0/8 (unfreeze, stream cam) is passed over: the one at commands/0/3 had" in said
    assert [numbered.command for numbered in commands.after(HEADER)] == [first]


def test_one_without_an_id_has_its_place() -> None:
    commands = CommandList()
    commands.add(Position("commands", 2, 7), b'{"stream":"cam","action":"reset"}')
    assert ids(commands, HEADER) == ["record:2:7"]


def test_memory_is_bounded_and_the_newest_stay() -> None:
    commands = CommandList(max_kept=3)
    sent = [put(commands, o, stream, action="reset") for o, stream in enumerate(["a", "cam", "cam", "*", "cam"])]
    assert ids(commands, HEADER) == [sent[2].id, sent[3].id, sent[4].id]
    assert ids(commands, HEADER.model_copy(update={"stream": "a"})) == [sent[3].id]


def test_what_stands_is_never_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    """A freeze of all, then a PLC that says all day long that a door opens and closes, then a new camera."""
    commands = CommandList(max_kept=100)
    everybody = put(commands, 0, "*")
    for offset in range(1, 3_001, 3):
        put(commands, offset, "door", action="freeze")
        put(commands, offset + 1, "door", action="unfreeze")
        put(commands, offset + 2, "door", action="reset")
    assert ids(commands, HEADER.model_copy(update={"stream": "new"})) == [everybody.id]
    assert len(commands.after(HEADER.model_copy(update={"stream": "door"}))) <= 102
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 12  # 1, 2, 4, ... of 2,901
    assert "commands/0/0, are forgotten, but for those that still stand" in lines[0]


def test_what_stands_of_names_that_went_is_forgotten_in_the_end() -> None:
    """A camera gets another name each day, and each is frozen once. Others are told something all the while."""
    commands = CommandList(max_kept=4, max_names=3)
    everybody = put(commands, 0, "*")
    early = put(commands, 1, "early", action="policy", policy=PolicyChange(mode="shadow"))
    for day in range(1, 11):
        put(commands, 10 * day, f"of-day-{day}")
        put(commands, 10 * day + 1, f"of-day-{day}", action="unfreeze")
        late = put(commands, 10 * day + 2, "early", action=("freeze", "unfreeze")[day % 2])
        put(commands, 10 * day + 3, "cam", action="reset")

    def stands(name: str) -> list[str]:
        return ids(commands, HEADER.model_copy(update={"stream": name}))

    assert stands("early") == [everybody.id, early.id, late.id]
    assert [stands(f"of-day-{day}") == [everybody.id] for day in range(1, 11)] == [True] * 8 + [False] * 2


RULES = st.sampled_from(
    [
        {"action": "freeze"},
        {"action": "unfreeze"},
        {"action": "reset"},
        {"action": "policy", "policy": {}},
        {"action": "policy", "policy": {"mode": "shadow"}},
        {"action": "policy", "policy": {"mode": "auto", "frozen": True}},
        {"action": "policy", "policy": {"max_updates_per_hour": 3, "frozen": False}},
    ]
)


@given(told=st.lists(st.tuples(st.sampled_from(["cam", "*", "other"]), RULES), max_size=30), kept=st.integers(1, 4))
def test_forgetting_changes_no_policy(told: list[tuple[str, dict]], kept: int) -> None:
    few, all_of_them = CommandList(max_kept=kept), CommandList()
    for offset, (stream, rule) in enumerate(told):
        put(few, offset, stream, **rule)
        put(all_of_them, offset, stream, **rule)
    assert policy(few) == policy(all_of_them)
    assert len(few.after(HEADER)) <= kept + 2 * 6


def policy(commands: CommandList) -> PolicyChange:
    """What holds for a stream that only begins."""
    held = PolicyChange()
    for numbered in commands.after(HEADER):
        command = numbered.command
        if command.action in ("freeze", "unfreeze"):
            change = PolicyChange(frozen=command.action == "freeze")
        elif command.policy is not None:
            change = command.policy
        else:
            continue
        rules = change.model_dump(exclude_none=True)
        held = held.model_copy(update=rules) if rules else PolicyChange()
    return held


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
