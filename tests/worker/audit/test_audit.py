"""The audit trail: what tampering is found, and what the events say."""

from __future__ import annotations

import csv
import io
import json
import tracemalloc
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from rich.console import Console

from schemas.config import Store
from schemas.errors import StateError
from schemas.state import StreamHeader, encode_header
from schemas.update import Proxies, SealedEvent, UpdateEvent, seal
from tests.monitoring.console.records import event
from tests.outline import rebuilt
from worker.audit.export import write_csv, write_lines
from worker.audit.history import EventNumbers, spans, summaries
from worker.audit.read import Coverage, EventFilter, Record, events_of, histories, read_file
from worker.audit.show import change, show_stream, show_streams
from worker.audit.verify import verify
from worker.cli.audit import _stored_ends
from worker.store.store import StateStore, Write

BEGIN = datetime(2026, 3, 1, tzinfo=UTC)


def chain(stream: str, count: int, start: int = 1, **more) -> list[SealedEvent]:
    sealed: list[SealedEvent] = []
    for number in range(1, start + count):
        event = UpdateEvent(
            id=f"{stream}@{number}",
            stream=stream,
            time=BEGIN + timedelta(seconds=number),
            decision="applied" if number % 4 else "skipped",
            reason="within limits" if number % 4 else f"gradient norm {number} above its limit 3",
            frames=[f"frames/0/{8 * number + i}" for i in range(8)],
            step=number - number // 4,
            source_distance=number / 10,
            layers={"norm1": number / 100, "norm2": 0.5} if number % 4 else {},
            flipped=2,
            before=Proxies(estimated_accuracy=0.5, confidence=0.5, entropy=1),
            after=Proxies(estimated_accuracy=0.6, confidence=0.5, entropy=1),
            previous=sealed[-1].digest if sealed else "",
            token=1,
            bundle="b",
            worker="w",
        ).model_copy(update=more)
        sealed.append(seal(event))
    return sealed[start - 1 :]


def records(*groups: list[SealedEvent]) -> list[Record]:
    contents = [sealed.content for group in groups for sealed in group]
    return [Record(content, f"updates/0/{offset}") for offset, content in enumerate(contents)]


def named(found: list[Record], stored: dict[str, StreamHeader] | None = None) -> list[tuple[str, str]]:
    return [(finding.kind, finding.event) for finding in verify(found, stored).findings]


sizes = st.integers(4, 12)


@given(a=sizes, b=sizes, copies=st.lists(st.integers(0, 3), max_size=5))
def test_a_whole_trail_is_sound_however_often_events_are_published(a: int, b: int, copies: list[int]) -> None:
    found = records(chain("cam-a", a), chain("cam-b", b))
    verification = verify([*found, *(found[i] for i in copies)])
    assert verification.sound
    assert (verification.streams, verification.events, verification.copies) == (2, a + b, len(copies))


def deleted_and_begun_anew(before: int, after: int) -> list[SealedEvent]:
    """A stream's events, one that says it was deleted, and those of its next life."""
    sealed = chain("cam", before)
    for number in range(before + 1, before + after + 2):
        last = number == before + 1
        event = sealed[0].event.model_copy(
            update={
                "id": f"cam@{number}",
                "decision": "deleted" if last else "applied",
                "frames": [] if last else [f"frames/0/{8 * number}"],
                "step": 0 if last else number - before - 1,
                "previous": sealed[-1].digest,
            }
        )
        sealed.append(seal(event))
    return sealed


@given(before=sizes, after=st.integers(1, 5), data=st.data())
def test_a_deletion_that_was_recorded_is_sound_and_cannot_be_hidden(
    before: int, after: int, data: st.DataObject
) -> None:
    sealed = deleted_and_begun_anew(before, after)
    found = records(sealed)
    assert verify(found).sound
    gone = data.draw(st.integers(before - 1, before + after - 1))
    assert named([r for i, r in enumerate(found) if i != gone]) == [("missing", f"cam@{gone + 1}")]
    unrecorded = records(chain("cam", before), chain("cam", after, step=7))
    assert {kind for kind, _ in named(unrecorded)} >= {"forked"}
    outline = rebuilt([one.event for one in sealed])
    assert (outline.step, outline.frames, outline.events) == (after, after, before + after + 1)


@given(count=sizes, data=st.data())
def test_a_missing_event_is_named(count: int, data: st.DataObject) -> None:
    gone = data.draw(st.integers(2, count - 1))
    found = records(chain("x", 3), chain("cam", count))
    assert named([r for r in found if r.event.id != f"cam@{gone}"]) == [("missing", f"cam@{gone}")]


@pytest.mark.parametrize(("last", "name"), [(3, "cam@3"), (4, "cam@3 to cam@4"), (6, "cam@3 to cam@6")])
def test_events_that_are_missing_one_after_another_are_named_together(last: int, name: str) -> None:
    found = records(chain("cam", 8))
    assert named([r for r in found if not 3 <= r.event.number <= last]) == [("missing", name)]


def test_a_first_event_that_names_another_before_it_is_altered() -> None:
    """As one has that was taken out of the middle of a trail."""
    (first,) = chain("cam", 1, previous="0" * 64)
    assert named(records([first])) == [("altered", "cam@1")]
    assert named(records(chain("cam", 1), [first])) == [("forked", "cam@1"), ("altered", "cam@1")]


@given(count=sizes, data=st.data())
def test_an_altered_event_is_named(count: int, data: st.DataObject) -> None:
    """Whatever is changed in it, also where it stays a valid event: all but the last have a successor that knows."""
    which = data.draw(st.integers(0, count - 2))
    changes = [{"reason": "all is well"}, {"step": 99}, {"time": BEGIN}, {"worker": "other"}, {"flipped": None}]
    group = chain("cam", count)
    group[which] = seal(group[which].event.model_copy(update=data.draw(st.sampled_from(changes))))
    assert ("altered", f"cam@{which + 1}") in named(records(group))


@given(count=sizes, data=st.data())
def test_a_single_flipped_bit_is_found(count: int, data: st.DataObject) -> None:
    group = chain("cam", count)
    which = data.draw(st.integers(0, count - 2))
    content = bytearray(group[which].content)
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    group[which] = SealedEvent(group[which].event, bytes(content))
    assert not verify(records(group)).sound


@given(count=sizes, data=st.data())
def test_another_order_and_another_content_are_named(count: int, data: st.DataObject) -> None:
    which = data.draw(st.integers(0, count - 2))
    group = chain("cam", count)
    swapped = [*group[:which], group[which + 1], group[which], *group[which + 2 :]]
    assert named(records(swapped)) == [("reordered", f"cam@{which + 1}")]
    assert verify(records(swapped)).heads["cam"].event == count
    other = seal(group[which].event.model_copy(update={"worker": "zombie"}))
    assert ("forked", f"cam@{which + 1}") in named(records(group, [other]))


def test_the_store_knows_the_last_event() -> None:
    group = chain("cam", 5)
    header = StreamHeader(stream="cam", bundle="b", method="mgg", events=5, last_event=group[-1].digest)
    assert named(records(group), {"cam": header}) == []
    assert named(records(group[:-1]), {"cam": header}) == [("missing", "cam@5")]
    altered = seal(group[-1].event.model_copy(update={"step": 0}))
    assert named(records([*group[:-1], altered])) == []
    assert named(records([*group[:-1], altered]), {"cam": header}) == [("altered", "cam@5")]


def beside(group: list[SealedEvent]) -> list[Record]:
    return [Record(sealed.content, "beside the state") for sealed in group]


def test_an_event_that_waits_beside_its_state_is_not_missing() -> None:
    """It may be one that nobody published yet, several, all of them, or one that everybody has."""
    group = chain("cam", 5)
    header = StreamHeader(stream="cam", bundle="b", method="mgg", events=5, last_event=group[-1].digest)
    for published in range(6):
        verification = verify(records(group[:published]), {"cam": header}, beside(group[min(published, 4) :]))
        assert (verification.sound, verification.complete, verification.streams, verification.events) == (
            True,
            True,
            1,
            published,
        )
        assert [(f.kind, f.event) for f in verification.findings] == [
            ("waiting", f"cam@{number}") for number in range(published + 1, 6)
        ]


def test_an_event_behind_the_last_one_that_is_stored_is_named() -> None:
    """Whoever may write to the topic knows what hash it has to carry."""
    group, ghost = chain("cam", 7), chain("ghost", 2)
    header = StreamHeader(stream="cam", bundle="b", method="mgg", events=5, last_event=group[4].digest)
    assert named(records(group, ghost)) == []
    assert named(records(group[:6]), {"cam": header}) == [("unstored", "cam@6")]
    assert named(records(group, ghost), {"cam": header}) == [
        ("unstored", "cam@6 to cam@7"),
        ("unstored", "ghost@1 to ghost@2"),
    ]
    # A worker has stored two more while the topic was read.
    later = {"cam": header.model_copy(update={"events": 7, "last_event": group[6].digest})}
    assert verify(records(group), {"cam": header}, now=lambda: later).findings == []


def test_a_state_that_cannot_be_read_is_named_and_hides_no_other(
    store: StateStore, store_settings: Store, tmp_path: Path
) -> None:
    """One such state ended the whole check, with a message that did not say whose it was."""
    (cam,), (other,) = chain("cam", 1), chain("other", 1)
    store.claim(["cam", "other"], "w")
    known = StreamHeader(stream="other", bundle="b", method="m", events=1, last_event=other.digest)
    headers = {"cam": b"\xff damaged", "other": encode_header(known)}
    events = {"cam": cam.content, "other": other.content}
    assert all(store.write([Write(name, 1, 1, headers[name], events[name], b"t") for name in headers]))
    config = tmp_path / "site.yaml"
    url = store_settings.url.get_secret_value()
    config.write_text(json.dumps({"store": {"url": url, "prefix": store_settings.prefix}}))
    stored, beside = _stored_ends(config)
    verification = verify([], stored, beside)
    found = sorted((finding.kind, finding.event) for finding in verification.findings)
    waiting = [("waiting", "cam@1"), ("waiting", "other@1")]
    assert found == [("unreadable", "the state of cam in the store"), *waiting]
    assert stored["cam"].last_event == cam.digest


def test_what_waits_is_held_to_the_chain() -> None:
    group = chain("cam", 5)
    header = StreamHeader(stream="cam", bundle="b", method="mgg", events=5, last_event=group[-1].digest)
    stored = {"cam": header}

    def found(published: list[SealedEvent], waiting: list[Record]) -> set[tuple[str, str]]:
        return {(f.kind, f.event) for f in verify(records(published), stored, waiting).findings}

    assert ("missing", "cam@4") in found(group[:3], beside(group[4:]))
    assert ("missing", "cam@5") in found(group[:3], beside(group[3:4]))
    other = [seal(group[-1].event.model_copy(update={"step": 0}))]
    assert ("altered", "cam@5") in found(group[:4], beside(other))
    wrong = [seal(group[-1].event.model_copy(update={"previous": "0" * 64}))]
    assert ("altered", "cam@4") in found(group[:4], beside(wrong))
    assert ("unreadable", "beside") in found(group, [Record(b"{", "beside")])


@pytest.mark.parametrize("start", [2, 8])
def test_a_trail_whose_beginning_is_too_old_is_sound_and_says_so(start: int) -> None:
    verification = verify(records(chain("cam", 5, start=start)))
    assert (verification.sound, verification.complete) == (True, False)
    (finding,) = verification.findings
    assert (finding.kind, finding.event) == ("beginning", f"cam@{start}")
    assert finding.text == f"is the oldest here; {start - 1} before it are not"


def test_what_is_no_event_and_what_pretends_to_be_another_streams(tmp_path: Path) -> None:
    group = chain("cam", 3)
    liar = seal(group[1].event.model_copy(update={"stream": "other"}))
    lost = Record(b"", "there", damage="cannot be unpacked")
    found = [*records(group), Record(b"\xff{", "here"), lost, Record(liar.content, "x")]
    assert named(found) == [("unreadable", "here"), ("unreadable", "there"), ("altered", "cam@2")]
    assert [f.text for f in verify(found).findings[:2]] == ["is no update event", "cannot be unpacked"]


def test_the_outline_is_rebuilt_from_events() -> None:
    events = [sealed.event for sealed in chain("cam", 9)]
    outline = rebuilt(events)
    assert (outline.step, outline.events, outline.frames) == (7, 9, 72)
    assert outline.last_event == seal(events[-1]).digest


def test_an_accuracy_that_nobody_estimates_has_no_change() -> None:
    known, unknown = Proxies(estimated_accuracy=0.5, confidence=0.5, entropy=1), Proxies(confidence=0.99, entropy=0)
    assert change(known, known) == "50.0% → 50.0%"
    assert change(known, unknown) == change(unknown, known) == change(None, known) == "-"


def test_events_of_one_kind_make_a_span() -> None:
    events = [sealed.event for sealed in chain("cam", 9)]
    found = spans(events)
    assert [(s.decision, s.events, s.first) for s in found] == [
        ("applied", 3, "cam@1"),
        ("skipped", 1, "cam@4"),
        ("applied", 3, "cam@5"),
        ("skipped", 1, "cam@8"),
        ("applied", 1, "cam@9"),
    ]
    assert found[0].most_moved(1) == [("norm2", 1.5)]
    assert (found[0].flipped, found[0].frames, found[0].distance, found[0].step) == (6, 24, 0.3, 3)
    wanted = EventFilter(frozenset(["cam"]), BEGIN + timedelta(seconds=4), BEGIN + timedelta(seconds=6))
    only = histories(records(chain("cam", 9), chain("x", 9)), wanted)
    assert {s: [e.number for e in es] for s, es in only.items()} == {"cam": [4, 5]}


@given(numbers=st.lists(st.integers(1, 12), max_size=40))
def test_numbers_are_new_once(numbers: list[int]) -> None:
    known, plain = EventNumbers(), set[int]()
    for number in numbers:
        assert known.add(number) == (number not in plain)
        plain.add(number)


@given(order=st.permutations(range(9)), copies=st.lists(st.integers(0, 8), max_size=5))
def test_a_summary_does_not_depend_on_the_order_nor_on_copies(order: list[int], copies: list[int]) -> None:
    events = [sealed.event for sealed in chain("cam", 9)]
    events[1] = events[1].model_copy(update={"command": "c", "decision": "reset", "before": None})
    found = summaries(events[i] for i in [*order, *copies])["cam"]
    assert dict(found.decisions) == {"applied": 6, "skipped": 2, "reset": 1}
    assert (found.commands, found.begun, found.last) == (1, events[0], events[8])
    assert found.judged is found.measured is found.last


@given(name=st.text(min_size=1, max_size=12), other=st.sampled_from(["cam", "x"]))
def test_no_event_of_a_named_stream_is_passed_over_by_its_bytes(name: str, other: str) -> None:
    """Whatever JSON makes of the name."""
    try:
        sealed = chain(name, 2)
    except ValidationError:
        return
    coverage = Coverage()
    found = list(events_of(records(sealed, chain(other, 3)), EventFilter(frozenset([name])), coverage))
    assert len(found) == (5 if name == other else 2)


def test_a_history_reads_as_a_list_does() -> None:
    history = histories(records(chain("cam", 5)))["cam"]
    assert (len(history), history[0].number, history[-1].number) == (5, 1, 5)
    assert [event.number for event in history[1:3]] == [2, 3]
    assert [event.number for event in reversed(history)] == [5, 4, 3, 2, 1]


def test_a_long_trail_takes_little_memory() -> None:
    """Of each event a hash is kept: a site of hundreds of cameras has millions in a day."""
    sealed = chain("cam", 5_000)
    tracemalloc.start()
    assert verify(Record(one.content, "here") for one in sealed).sound
    kept = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert kept < 5_000 * 500


def test_a_full_disk_is_named() -> None:
    """Unnamed, the command did not even end: nobody closed what it was reading."""
    for write in (
        lambda: write_lines(records(chain("cam", 2)), Path("/dev/full")),
        lambda: write_csv([[one.event for one in chain("cam", 2)]], Path("/dev/full")),
    ):
        with pytest.raises(StateError, match="/dev/full cannot be written: No space left on device"):
            write()


def test_files_keep_the_bytes(tmp_path: Path) -> None:
    found = records(chain("süd/1", 5), chain("cam", 4))
    path = tmp_path / "trail.jsonl"
    assert write_lines(found, path) == 9
    assert [r.content for r in read_file(path)] == [r.content for r in found]
    assert verify(read_file(path)).sound
    assert {s: len(es) for s, es in histories(read_file(path)).items()} == {"cam": 4, "süd/1": 5}
    path.write_bytes(b"x" * (5 << 20))
    with pytest.raises(StateError, match="line 1 is longer than any event"):
        list(read_file(path))


def test_tables_have_a_column_a_layer_and_no_formulas(tmp_path: Path) -> None:
    events, path = [sealed.event for sealed in chain("=cmd()", 4, reason="+1")], tmp_path / "t.csv"
    assert write_csv([events, [event.model_copy(update={"layers": {"last": 1}}) for event in events]], path) == 43
    with path.open(newline="", encoding="utf-8") as file:
        assert [row["layer_last"] for row in csv.DictReader(file)] == [""] * 4 + ["1"] * 4
    write_csv([events], path)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["layer_norm1"] for row in rows] == ["0.01", "0.02", "0.03", ""]
    assert {row["stream"] for row in rows} == {"'=cmd()"}
    assert {row["reason"] for row in rows} == {"'+1"}
    assert rows[0]["after_estimated_accuracy"] == "0.6"
    assert {f"{moment}_{name}" for moment in ("before", "after") for name in Proxies.model_fields} <= set(rows[0])
    assert rows[0]["frames"] == "8"


def test_parquet_has_the_same_table(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    from worker.audit.export import write_parquet

    events = [sealed.event for sealed in chain("cam", 4)]
    write_parquet([events], tmp_path / "t.parquet")
    read = parquet.read_table(tmp_path / "t.parquet").to_pydict()
    assert read["id"] == [e.id for e in events]
    assert read["layer_norm1"] == [0.01, 0.02, 0.03, None]
    assert read["time"][0] == events[0].time


def test_the_report_shows_charts_and_trusts_no_name(tmp_path: Path) -> None:
    from worker.audit.report import write_report

    name = "<script>alert(1)</script>"
    events = [sealed.event for sealed in chain(name, 12)]
    back = events[5].model_copy(update={"decision": "rolled_back", "reason": "<b>looked odd</b>"})
    write_report(tmp_path / "a.html", {name: [*events[:5], back, *events[6:]]}, "whole")
    page = (tmp_path / "a.html").read_text()
    assert "<script" not in page
    assert "<b>looked" not in page
    assert page.count("<svg") == 1
    assert "norm1" in page
    assert "1 rolled_back" in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ), "self-contained"
    write_report(tmp_path / "a.html", {}, "")
    assert "0 streams, 0 update events" in (tmp_path / "a.html").read_text()


def test_events_are_json_that_others_can_check(tmp_path: Path) -> None:
    """The recipe in docs/control.md: sha256 of a value is `previous` of the next one."""
    import hashlib

    first, second = chain("cam", 2)
    assert json.loads(second.content)["previous"] == hashlib.sha256(first.content).hexdigest()


@pytest.mark.parametrize("number", ["0", "-1", "9" * 5_000, "\u0663", ""])
def test_numbers_that_no_event_has(number: str) -> None:
    content = chain("cam", 1)[0].content.replace(b"cam@1", f"cam@{number}".encode())
    assert named([Record(content, "here")]) == [("unreadable", "here")]


@pytest.mark.parametrize(
    "time", ["2026-11-28T12:00:00", "0001-01-01T00:00:00Z", "9999-12-31T23:59:59-23:59", "9998-01-01T00:00:00Z", -1e11]
)
def test_times_that_no_clock_says_are_no_events(time: str | float) -> None:
    """The console's reader ended with the first of them, and with others the audit report."""
    written = json.loads(chain("cam", 1)[0].content)
    with pytest.raises(ValidationError, match="time"):
        UpdateEvent.model_validate_json(json.dumps({**written, "time": time}))


def test_names_do_not_steer_the_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    name = "\x1b[2Jcam\u202e"
    events = [sealed.event for sealed in chain(name, 3, reason="\x1b]0;x\x07")]
    show_streams(console, summaries(events))
    show_stream(console, name, events, 10)
    shown = console.file.getvalue()
    assert "cam" in shown
    assert not any(bad in shown for bad in ("\x1b[2J", "\x1b]0", "\x07", "\u202e"))


@pytest.mark.parametrize("width", [80, 100, 120, 150, 200])
def test_no_word_breaks_at_the_width_of_the_terminal(width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    events = [sealed.event for sealed in chain("line-3/camera", 9, layers={"layer1.0.norm": 0.5, "stem.1": 0.25})]
    undone = events[-1].model_copy(update={"id": "line-3/camera@1234", "decision": "rolled_back", "reason": "collapse"})
    events.append(undone.model_copy(update={"step": 12_345, "source_distance": 1234.0}))
    show_streams(console, summaries(events))
    show_stream(console, "line-3/camera", events, 10)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    words = " ".join(lines).split()
    for word in ("line-3/camera", "events", "applied", "partial", "skipped", "undone", "commands", "step", "distance"):
        assert word in words
    for word in (
        "rolled_back",
        "@1234",
        "12345",
        "1.23e+03",
        "moved",
        "most",
        "collapse",
        "03-01",
        "00:00:08",
        "UTC",
    ):
        assert word in words
    assert any("50.0% → 60.0%" in line for line in lines)


def test_layers_may_be_called_anything(tmp_path: Path) -> None:
    from worker.audit.report import write_report

    events = [sealed.event for sealed in chain("cam", 3, layers={"$\\frac$": 1.0, "<b>": 0.5})]
    write_report(tmp_path / "a.html", {"cam": events}, "")
    assert "<b>" not in (tmp_path / "a.html").read_text()


@pytest.mark.parametrize("number", [1e308, -1e308, float("inf"), float("nan")])
def test_whatever_numbers_others_wrote_can_be_drawn_and_exported(tmp_path: Path, number: float) -> None:
    pytest.importorskip("pyarrow.parquet")
    from worker.audit.export import write_parquet
    from worker.audit.report import write_report

    events = [event("cam", n, source_distance=far, layers={"norm": far}) for n, far in enumerate((1.0, number, 2.0), 1)]
    write_report(tmp_path / "audit.html", {"cam": events}, "")
    assert "<svg" in (tmp_path / "audit.html").read_text()
    assert write_parquet([events], tmp_path / "audit.parquet") > 20


@pytest.mark.parametrize("field", ["step", "token", "flipped"])
def test_counts_that_no_table_has_room_for_make_no_event(field: str) -> None:
    content = json.loads(event("cam", 1).model_dump_json())
    assert Record(json.dumps({**content, field: 2**63 - 1}).encode(), "").event is not None
    assert Record(json.dumps({**content, field: 2**63}).encode(), "").event is None
