"""The checks after a chaos run. The audit trail must explain the stored states exactly."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from meta.bundle import Bundle, load_bundle
from meta.method import State
from meta.mgg import as_served
from schemas.command import EVERY_STREAM, Command
from schemas.config import Frames, Kafka
from schemas.prediction import Prediction
from schemas.state_tensors import StreamState, decode_state
from schemas.update import UpdateEvent
from tests.outline import chained
from tests.system.conftest import Site
from worker.audit.read import read_topic
from worker.audit.verify import verify as verify_chain
from worker.decode.image import decode_image
from worker.decode.pixels import normalise_pixels
from worker.engine.passes import WAY
from worker.kafka.topic import records_now
from worker.store.store import StateStore

LIMIT = 64 << 20
# The bundle is untrained, and its whole steps overshoot: what passes in other company round differently, 1e-7, has
# grown to a third of the way after a hundred of them. With a tenth of a step it stays below 1e-4.
STEP_SCALE = 0.1
TOLERANCE = 1e-3


@dataclass
class Outcome:
    """What a chaos run found. Everything but the first lines must be zero."""

    seed: int = 0
    broker: str = "own"
    faults: int = 0
    by_kind: dict[str, int] = field(default_factory=dict)
    frames: int = 0
    updates: int = 0
    decisions: dict[str, int] = field(default_factory=dict)
    predicted_twice: int = 0
    seconds: float = 0.0
    lost: int = 0
    not_folded: int = 0
    folded_twice: int = 0
    zombie_writes: int = 0
    forked_events: int = 0
    state_mismatches: int = 0
    events_missing: int = 0
    chain_faults: int = 0
    commands: int = 0
    commands_wrong: int = 0
    largest_difference: float = 0.0
    streams_wrong: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        bad = (self.lost, self.not_folded, self.folded_twice, self.zombie_writes, self.state_mismatches)
        trail = (self.events_missing, self.forked_events, self.chain_faults, self.commands_wrong)
        return self.frames > 0 and not any(bad) and not any(trail)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def frames_in_topic(kafka: Kafka) -> tuple[dict[str, list[str]], dict[str, bytes]]:
    """Ids per stream in order, and images by id.

    The topic is what counts: a sender whose connection is cut may leave a frame there twice, or one it was not told of.
    """
    sent: dict[str, list[str]] = {}
    images: dict[str, bytes] = {}
    for record in records_now(kafka, kafka.topics.frames):
        frame_id = f"{record.topic}/{record.partition}/{record.offset}"
        sent.setdefault(record.key.decode(), []).append(frame_id)
        images[frame_id] = record.value
    return sent, images


def verify(
    site: Site,
    kafka: Kafka,
    sent: dict[str, list[str]],
    images: dict[str, bytes],
    bundle_path: Path,
    commands: list[Command],
) -> Outcome:
    """Read the topics and the store, and compare with what an uninterrupted run would have done."""
    outcome = Outcome(frames=len(images))
    predicted = _predictions(site, kafka, set(images))
    outcome.lost = len(set(images) - set(predicted))
    outcome.predicted_twice = sum(count > 1 for count in predicted.values())
    bundle = load_bundle(bundle_path)
    events, outcome.forked_events = _events(kafka)
    outcome.chain_faults = len(verify_chain(read_topic(kafka)).findings)
    outcome.commands = len(commands)
    outcome.commands_wrong = _wrongly_obeyed(events, commands)
    store = StateStore(site.store)
    for stream, ids in sent.items():
        if ids:
            _check_stream(stream, ids, events.get(stream, {}), images, bundle, store, outcome)
    store.close()
    return outcome


def _predictions(site: Site, kafka: Kafka, wanted: set[str]) -> dict[str, int]:
    counts: dict[str, int] = {}

    def enough(records: list[Any]) -> bool:
        return wanted <= {dict(r.headers)["ce_id"].decode() for r in records}

    records = site.topic.read_quiet(kafka.topics.predictions, enough)
    for record in records:
        prediction = Prediction.model_validate_json(record.value)
        counts[prediction.id] = counts.get(prediction.id, 0) + 1
    return counts


def _events(kafka: Kafka) -> tuple[dict[str, dict[int, UpdateEvent]], int]:
    """Events by stream and number, and how many numbers have two contents. Copies of one event count once.

    Only a write that was not refused is published, and no two may be taken under one number: a zombie's would be.
    """
    events: dict[str, dict[int, UpdateEvent]] = {}
    contents: dict[str, set[bytes]] = {}
    for record in records_now(kafka, kafka.topics.updates):
        event = UpdateEvent.model_validate_json(record.value)
        events.setdefault(event.stream, {})[event.number] = event
        contents.setdefault(event.id, set()).add(record.value)
    return events, sum(len(found) > 1 for found in contents.values())


def _check_stream(
    stream: str,
    ids: list[str],
    events: dict[int, UpdateEvent],
    images: dict[str, bytes],
    bundle: Bundle,
    store: StateStore,
    outcome: Outcome,
) -> None:
    stored = store.read(stream)
    like = {name: tensor[0] for name, tensor in bundle.method.fresh(1).items()}
    state = decode_state(stored.header or b"", stored.tensors or b"", like, LIMIT)
    header = state.header
    outcome.not_folded += max(0, len(ids) - header.frames)
    outcome.folded_twice += max(0, header.frames - len(ids))
    if header.folded != chained(ids) and header.frames == len(ids):
        outcome.folded_twice += 1
    outcome.updates += header.step
    # The last event of a stream may still lie beside its state: its worker died before it published.
    known = {**events, **{e.number: e for e in _outbox(stored.event)}}
    outcome.events_missing += len(set(range(1, header.events + 1)) - set(known))
    history = [known[n] for n in sorted(known) if n <= header.events]
    for event in history:
        outcome.decisions[event.decision] = outcome.decisions.get(event.decision, 0) + 1
    tokens = [event.token for event in history]
    outcome.zombie_writes += sum(later < earlier for earlier, later in pairwise(tokens))
    difference = _replay(history, images, bundle, state)
    outcome.largest_difference = max(outcome.largest_difference, difference)
    if not difference <= TOLERANCE:
        outcome.state_mismatches += 1
        outcome.streams_wrong.append(stream)


def _wrongly_obeyed(events: dict[str, dict[int, UpdateEvent]], commands: list[Command]) -> int:
    """Commands that a stream obeyed twice, or not at all; one that only began takes none but standing ones."""
    wrong = 0
    for stream, numbered in events.items():
        obeyed = Counter(event.command for event in numbered.values() if event.command)
        for command in commands:
            if command.stream not in (stream, EVERY_STREAM):
                continue
            least = 1 if command.action == "policy" else 0
            wrong += not least <= obeyed[command.id] <= 1
        # One after the other, in the order of the topic.
        order = [int(e.command.removeprefix("chaos-")) for _, e in sorted(numbered.items()) if e.command]
        wrong += order != sorted(order)
    return wrong


def _outbox(content: bytes | None) -> list[UpdateEvent]:
    return [UpdateEvent.model_validate_json(line) for line in (content or b"").splitlines()]


def _replay(history: list[UpdateEvent], images: dict[str, bytes], bundle: Bundle, found: StreamState) -> float:
    """Adapt one fresh stream alone, on the micro-batches that the events name; the distance from what is stored.

    Relative to how far the stream is from its source.
    """
    method, preprocess = bundle.method.for_site(STEP_SCALE), bundle.manifest.preprocess
    state = method.fresh(1)
    at_step: dict[int, State] = {}
    for event in history:
        if event.decision == "reset":
            state = method.fresh(1)
        if event.decision == "rolled_back":  # Snapshots are taken of the newest state of a step.
            state = at_step[event.step]
        seen_only = event.decision == "skipped" and event.loss is None and bool(event.frames)
        observed = seen_only and event.reason != "not finite"
        if event.decision not in ("applied", "partial") and not observed:
            continue
        pixels = [decode_image(images[frame_id], Frames(), preprocess) for frame_id in event.frames]
        frames = normalise_pixels(pixels, preprocess)
        forward = as_served(method)(frames, torch.zeros(len(frames), dtype=torch.long), state)
        # Frames without an update move what is known of their stream; those that the guard refused change nothing.
        if observed:
            state = method.observe(forward)
            continue
        whole = method.update(forward).state
        if event.decision == "partial":
            # The event says how far each layer moved; how far all would have, the replay knows.
            share = math.dist(event.layers.values(), [0] * len(event.layers)) / float(
                (whole["affine"] - state["affine"]).norm()
            )
            whole |= {name: torch.lerp(state[name], whole[name], share) for name in WAY & set(whole)}
        state = whole
        at_step[event.step] = state
    source = bundle.model.source_affine
    moved = (state["affine"][0] - source).norm().clamp_min(1e-6)
    return float((state["affine"][0] - found.tensors["affine"]).norm() / moved)
