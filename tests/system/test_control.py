"""Commands and policies, with workers as they run at a site."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path

import pytest
import yaml

from schemas.command import EVERY_STREAM, Command
from schemas.config import WorkerConfig
from schemas.policy import PolicyChange
from schemas.update import UpdateEvent, seal
from tests.conftest import picture
from tests.system.conftest import Site, ids_by_stream, run_cli
from worker.control.send import send_command

PATIENT = ["--wait", "120"]  # with a worker that has more to do than obey


@pytest.fixture(autouse=True)
def full_batches(site: Site) -> None:
    site.fill_batches()


def tell(site: Site, stream: str, action: str, wait: float = 120, **more) -> list[UpdateEvent]:
    return list(send_command(site.kafka, Command(stream=stream, action=action, **more), wait))


def events_of(site: Site, stream: str, until: Callable[[list[UpdateEvent]], bool]) -> list[UpdateEvent]:
    """The stream's events in order, each once, and every one the next link of its chain."""
    by_number = {
        e.number: e for e in site.events(lambda es: until([e for e in es if e.stream == stream])) if e.stream == stream
    }
    events = [by_number[number] for number in sorted(by_number)]
    assert [e.number for e in events] == list(range(1, len(events) + 1))
    for earlier, later in pairwise(events):
        assert later.previous == seal(earlier).digest
    return events


def test_commands_while_a_worker_runs(site: Site, site_file: str) -> None:
    worker = site.start()
    ids = site.feed(worker, "cam", 40)
    assert site.header("cam").step == 5

    def command(*arguments: str) -> str:
        options = ["--config", site_file, "--by", "kim", *PATIENT]
        result = run_cli("command", arguments[0], "cam", *arguments[1:], *options)
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert re.search(r"frozen, now at step 5: by kim", command("freeze"))
    ids += site.feed(worker, "cam", 8)
    assert site.header("cam").step == 5
    assert "unfrozen" in command("unfreeze")
    assert re.search(
        r"rolled_back, now at step 2: to snapshot 2, step 2, .*; odd; by kim",
        command("rollback", "2", "--reason", "odd"),
    )
    ids += site.feed(worker, "cam", 8)
    assert site.header("cam").step == 3
    assert "reset, now at step 0" in command("reset")
    ids += site.feed(worker, "cam", 8)
    assert site.header("cam").step == 1
    assert "approved, now at step 1" in command("approve")
    assert "policy, now at step 1: mode=shadow, quiet_hours=22:00-06:00" in command(
        "policy", "--mode", "shadow", "--quiet-hours", "22:00-06:00"
    )
    assert "the configuration's policy again, without mode=shadow, quiet_hours=22:00-06:00, frozen=False" in command(
        "policy", "--clear"
    )
    refused = run_cli("command", "rollback", "cam", "9", "--config", site_file, *PATIENT)
    assert refused.returncode == 1
    assert "skipped, now at step 1: cannot rollback: stream 'cam' has 2 snapshots" in refused.stdout

    site.assert_folded_once({"cam": ids})
    events = events_of(site, "cam", lambda es: any("cannot" in e.reason for e in es))
    told = [e.decision for e in events if e.command]
    assert told == ["frozen", "unfrozen", "rolled_back", "reset", "approved", "policy", "policy", "skipped"]
    frozen = next(e for e in events if e.reason == "policy: frozen")
    assert (frozen.decision, frozen.step, len(frozen.frames)) == ("skipped", 5, 8)
    assert "fenced_writes_total 0.0" in worker.metrics()
    # The worker has what the store has: the next frames are answered as the next worker would answer them.
    assert worker.stop() == 0
    second = site.start()
    ids += site.feed(second, "cam", 8)
    site.assert_folded_once({"cam": ids})
    events_of(site, "cam", lambda es: max(e.number for e in es) > len(events))


def test_policies_of_single_streams_do_not_end_unsaid(site: Site, site_file: str) -> None:
    worker = site.start()
    for stream in ("cam-1", "cam-2"):
        site.feed(worker, stream, 8)
    tell(site, "cam-2", "policy", policy=PolicyChange(mode="shadow"))
    cleared = run_cli("command", "policy", "*", "--clear", "--config", site_file, *PATIENT)
    assert cleared.returncode == 0, cleared.stderr
    assert "1 stream loses what commands have set: cam-2 (mode=shadow)\n" in cleared.stderr
    assert len(cleared.stdout.splitlines()) == 2
    assert "again, without mode=shadow" in cleared.stdout


def test_an_update_under_way_does_not_overwrite_a_command(site: Site, site_file: str) -> None:
    """Commands arrive in the middle of a stream of frames, and nothing is folded twice or lost."""
    worker = site.start()
    ids = site.feed(worker, "cam", 16)
    for round_ in range(3):
        ids += site.send([("cam", picture(i)) for i in range(80)])
        (event,) = tell(site, "cam", "reset")
        assert (event.step, event.source_distance) == (0, 0)
        site.wait_folded(worker, {"cam": 16 + 80 * (round_ + 1)})
    site.assert_folded_once({"cam": ids})
    header = site.header("cam")
    events = events_of(site, "cam", lambda es: len(es) >= header.events)
    step = 0
    for event in events:
        step = 0 if event.decision == "reset" else step + (event.decision == "applied")
        assert event.step == step
    assert step == header.step


def test_commands_reach_streams_that_nobody_holds_once_whoever_restarts(site: Site) -> None:
    site.expect_deaths()
    first = site.start()
    for stream in ("cam-1", "cam-2"):
        site.feed(first, stream, 16)
    assert first.stop() == 0
    assert tell(site, "cam-1", "reset", wait=0.2) == []
    assert tell(site, EVERY_STREAM, "freeze", wait=0.2) == []
    assert site.header("cam-1").step == 2

    # No frame has to come.
    second = site.start()
    second.wait_until(lambda: all(site.header(f"cam-{i}").policy is not None for i in (1, 2)), "obedience")
    assert [site.header(f"cam-{i}").step for i in (1, 2)] == [0, 2]
    # What holds for all holds for a stream that only begins; what was done to others before means nothing to it.
    site.feed(second, "cam-3", 16)
    assert site.header("cam-3").step == 0
    second.kill()

    third = site.start()
    for i in (1, 2, 3):
        site.feed(third, f"cam-{i}", 8)

    def complete(events: list[UpdateEvent]) -> bool:
        """Of a frozen stream's frames any number may be in one event."""
        return sum({e.id: len(e.frames) for e in events}.values()) >= 24

    decisions = {
        stream: [e.decision for e in events_of(site, stream, complete) if e.command]
        for stream in ("cam-1", "cam-2", "cam-3")
    }
    assert decisions == {"cam-1": ["reset", "frozen"], "cam-2": ["frozen"], "cam-3": ["frozen"]}


def test_every_stream_of_several_workers_obeys_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.control.send.QUIET_S", 120.0)
    workers = [site.start() for _ in range(2)]
    streams = [f"cam-{i}" for i in range(8)]
    for worker in workers:
        worker.wait_until(lambda w=worker: "assigned partitions: [" in w.log.read_text(), "an assignment")
    site.send([(stream, picture(i)) for stream in streams for i in range(16)])
    site.wait_folded(workers[0], dict.fromkeys(streams, 16))
    command = Command(stream=EVERY_STREAM, action="policy", policy=PolicyChange(mode="shadow"), reason="pilot")
    events = list(islice(send_command(site.kafka, command, 120), len(streams)))
    assert sorted(e.stream for e in events) == streams
    assert {e.parameters for e in events} == {"source"}
    ids = site.send([(stream, picture(i)) for stream in streams for i in range(8)])
    predictions = site.predictions(ids)
    assert {p.parameters for i in ids for p in predictions[i]} == {"source"}


def test_policies_say_who_answers_and_when_there_are_updates(site: Site) -> None:
    worker = site.start(
        policy={"mode": "auto", "max_updates_per_hour": 3},
        streams={
            "shadow": {"mode": "shadow"},
            "approve": {"mode": "approve"},
            "none": {"mode": "canary", "canary_share": 0.0},
            "all": {"mode": "canary", "canary_share": 1.0},
            "quiet": {"quiet_hours": ["00:00-12:00", "12:00-00:00"]},
        },
    )
    streams = ["auto", "shadow", "approve", "none", "all", "quiet"]

    def feed(before: int, frames: int) -> dict[str, list[str]]:
        """All at once: those without an update wait for larger micro-batches."""
        sent = [(stream, picture(before + i)) for stream in streams for i in range(frames)]
        ids = ids_by_stream(sent, site.send(sent))
        site.wait_folded(worker, dict.fromkeys(streams, before + frames))
        return ids

    feed(0, 16)
    assert {s: site.header(s).step for s in streams} == {**dict.fromkeys(streams, 2), "quiet": 0}
    (approval,) = tell(site, "approve", "approve")
    assert (approval.decision, approval.step, approval.parameters) == ("approved", 2, "approved")
    ids = feed(16, 24)
    for stream in ("quiet", "auto"):  # by its hours; and by the updates of this hour
        line = f'driftkeel_stream_held_back{{stream="{stream}"}} 1.0'
        worker.wait_until(lambda line=line: line in worker.metrics(), line)
    predictions = site.predictions([i for group in ids.values() for i in group])
    last = {stream: predictions[group[-1]][0] for stream, group in ids.items()}
    assert {s: (p.parameters, min(p.step, 3)) for s, p in last.items()} == {
        "auto": ("adapted", 3),
        "all": ("adapted", 3),
        "shadow": ("source", 0),
        "none": ("source", 0),
        "quiet": ("source", 0),
        "approve": ("approved", 2),
    }
    # The same picture under the same parameters has the same answer, whatever came before it.
    assert [predictions[i][0].top for i in ids["none"]] == [predictions[i][0].top for i in ids["shadow"]]
    # However many micro-batches they are: those without an update may be larger.
    events = events_of(site, "auto", lambda es: sum(len(e.frames) for e in es) == 40)
    applied = Counter(e.time.hour for e in events if e.decision == "applied")
    assert max(applied.values()) == 3
    assert len(applied) > 1 or "policy: 3 updates in this hour" in {e.reason for e in events}

    # The approved parameters outlive their worker.
    assert worker.stop() == 0
    second = site.start(streams={"approve": {"mode": "approve"}})
    again = site.feed(second, "approve", 8)
    prediction = site.predictions(again)[again[0]][0]
    assert (prediction.parameters, prediction.step) == ("approved", 2)


def test_what_is_no_command_is_passed_over(site: Site) -> None:
    worker = site.start()
    site.feed(worker, "cam", 8)
    good = Command(stream="cam", action="freeze")
    records = [b"", b"\xff\x00", b"{}", b"x" * 100_000, b'{"stream":"cam","action":"explode"}', b"[" * 50_000]
    site.topic.send(
        site.kafka.topics.commands, [(b"cam", r, []) for r in [*records, *[good.model_dump_json().encode()] * 2]]
    )
    worker.wait_until(lambda: site.header("cam").policy is not None, "the good one")
    assert 'driftkeel_commands_total{action="unreadable",outcome="refused"} 6.0' in worker.metrics()
    site.feed(worker, "cam", 8)
    assert [e.command for e in events_of(site, "cam", lambda es: len(es) >= 3)] == [None, good.id, None]


def test_a_worker_runs_without_the_topic(site: Site, tmp_path: Path) -> None:
    topics = {**site.config["kafka"]["topics"], "commands": "nowhere"}
    site.config["kafka"] = {**site.config["kafka"], "topics": topics}
    path = tmp_path / "site.yaml"
    path.write_text(yaml.safe_dump(site.config))
    worker = site.start()
    site.feed(worker, "cam", 8)
    assert "the broker has no topic nowhere" in worker.log.read_text()
    found = run_cli("doctor", "--config", str(path))
    assert found.returncode == 0
    assert "topic nowhere is missing: workers run, and take no commands" in found.stdout
    patience = {"DRIFTKEEL__KAFKA__CONNECT_TIMEOUT_S": "2"}  # for a topic that may yet be made
    sent = run_cli("command", "freeze", "cam", "--config", str(path), **patience)
    assert sent.returncode == 1
    assert "no topic nowhere" in sent.stderr
    assert " sent" not in sent.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["policy", "cam"], "say what to change"),
        (["policy", "cam", "--quiet-hours", "25:00-26:00"], "is not a span such as 22:00-06:00"),
        (["policy", "cam", "--canary-share", "2"], "less than or equal to 1"),
    ],
)
def test_mistakes_are_not_sent(site_file: str, arguments: list[str], message: str) -> None:
    result = run_cli("command", *arguments, "--config", site_file)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_every_command_of_the_documentation_does_what_it_says(
    site: Site, site_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Path(__file__).parents[2] / "docs" / "control.md"
    worker = site.start()
    site.feed(worker, "cam-7", 40)
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    lines = [shlex.split(line) for block in blocks for line in block.splitlines() if line.startswith("driftkeel ")]
    assert len(lines) > 15
    monkeypatch.chdir(tmp_path)
    assert site_file == str(tmp_path / "site.yaml")
    root = str(page.parents[1])
    for _, *arguments in lines:
        patience = PATIENT if arguments[0] == "command" and "--wait" not in arguments else []
        result = run_cli(*arguments, *patience, PYTHONPATH=root)
        assert result.returncode == 0, (arguments, result.stdout, result.stderr)
        assert result.stdout
    assert site.header("cam-7").policy == PolicyChange(frozen=False)
    settings = re.search(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)[1]
    WorkerConfig(**yaml.safe_load(settings))
