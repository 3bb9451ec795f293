"""Heads kept elsewhere: what nobody can take out of the trail or write anew behind their back."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from schemas.errors import StateError
from schemas.heads import Head, read_heads
from schemas.update import SealedEvent, seal
from tests.worker.audit.test_audit import BEGIN, chain, records, sizes
from worker.audit.export import write_heads, write_lines
from worker.audit.verify import verify
from worker.cli.audit import audit_app


def heads_of(*groups: list[SealedEvent]) -> dict[str, Head]:
    return verify(records(*groups)).heads


def named(heads: dict[str, Head], *groups: list[SealedEvent]) -> list[tuple[str, str]]:
    return [(finding.kind, finding.event) for finding in verify(records(*groups), heads=heads).findings]


def written_anew(group: list[SealedEvent], which: int) -> list[SealedEvent]:
    """Another content of one event, and a chain that fits it."""
    anew = [*group[:which], seal(group[which].event.model_copy(update={"reason": "all is well"}))]
    for sealed in group[which + 1 :]:
        anew.append(seal(sealed.event.model_copy(update={"previous": anew[-1].digest})))
    return anew


@given(count=sizes, more=st.integers(0, 5), data=st.data())
def test_a_trail_that_was_written_anew_is_sound_by_itself_and_not_with_its_heads(
    count: int, more: int, data: st.DataObject
) -> None:
    group = chain("cam", count + more)
    heads = heads_of(group[:count], chain("other", 3))
    assert named(heads, group, chain("other", 5)) == []
    forged = written_anew(group, data.draw(st.integers(0, count - 1)))
    assert verify(records(forged, chain("other", 3))).sound
    assert named(heads, forged, chain("other", 3)) == [("altered", f"cam@{count}")]


@given(count=sizes, left=st.integers(1, 3))
def test_events_that_were_cut_off_are_missed(count: int, left: int) -> None:
    group = chain("cam", count)
    assert verify(records(group[:left])).sound
    assert named(heads_of(group), group[:left]) == [("missing", f"cam@{count}")]
    assert named(heads_of(group, chain("other", 1)), group) == [("missing", "other@1")]


def test_what_is_older_than_the_topic_keeps_is_no_fault() -> None:
    """Neither of a stream whose later events are there, nor of one that has been silent for longer."""
    heads = heads_of(chain("cam", 3), chain("silent", 3))
    kept = chain("cam", 4, start=5)
    verification = verify(records(kept), heads=heads)
    assert [(f.kind, f.event) for f in verification.findings] == [
        ("beginning", "cam@5"),
        ("beginning", "cam@3"),
        ("beginning", "silent@3"),
    ]
    assert verification.sound
    assert not verification.complete
    late = {"silent": heads["silent"].model_copy(update={"time": BEGIN + timedelta(hours=1)})}
    assert ("missing", "silent@3") in named(late, kept)
    assert named(heads) == [("missing", "cam@3"), ("missing", "silent@3")]  # Nothing is there to be older than.
    assert ("beginning", "cam@3") in named(heads, kept, chain("other", 1))
    oldest = chain("cam", 3, start=3)
    assert named({"cam": heads["cam"]}, oldest) == [("beginning", "cam@3")]
    assert ("altered", "cam@3") in named({"cam": heads["cam"]}, written_anew(oldest, 0))


def test_heads_go_through_a_file_and_the_command_line(tmp_path: Path) -> None:
    group, trail, kept = chain("cam-\u00e9 1", 6), tmp_path / "trail.jsonl", tmp_path / "heads.json"

    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(audit_app, [*arguments, "--file", str(trail)])
        return result.exit_code, result.output + ("" if result.exit_code == 0 else str(result.exception))

    write_lines(records(group[:4]), trail)
    code, output = run("heads", "--output", str(kept))
    assert code == 0
    assert output.startswith(f"{kept}: 1 stream, SHA-256 ")
    assert read_heads(kept).streams == heads_of(group[:4])

    write_lines(records(group), trail)
    assert run("verify", "--heads", str(kept)) == (0, "sound: 1 stream, 6 events\n")
    write_lines(records(written_anew(group, 1)), trail)
    assert run("verify") == (0, "sound: 1 stream, 6 events\n")
    code, output = run("verify", "--heads", str(kept))
    assert code == 1
    assert "altered    cam-\u00e9 1@4 does not have the hash of the stream's head" in output

    write_lines(records([group[0], group[2]]), trail)
    code, output = run("heads", "--output", str(tmp_path / "none.json"))
    assert "the trail is not sound" in output
    assert not (tmp_path / "none.json").exists()


@pytest.mark.parametrize("content", [b"", b"[]", b'{"time": "2026-01-01T00:00:00Z"}', b"\xff"])
def test_what_are_no_heads_is_refused_in_a_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "heads.json"
    path.write_bytes(content)
    with pytest.raises(StateError, match="is not what 'driftkeel audit heads' writes"):
        read_heads(path)
    with pytest.raises(StateError, match="cannot be read"):
        read_heads(tmp_path / "nowhere.json")


def test_a_file_that_is_too_long_for_heads_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "heads.json"
    write_heads(heads_of(chain("cam", 1)), path)
    monkeypatch.setattr("schemas.heads.MAX_FILE_BYTES", path.stat().st_size)
    assert read_heads(path).streams == heads_of(chain("cam", 1))
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(StateError, match="are these heads"):
        read_heads(path)


def test_heads_cannot_be_written_where_there_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="cannot be written"):
        write_heads(heads_of(chain("cam", 1)), tmp_path / "nowhere" / "heads.json")
