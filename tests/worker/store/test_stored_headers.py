"""A stored header that is no worker's is refused, or does no harm: one stream's state must not end a worker."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

import pytest

from meta.bundle_folder import read_manifest
from meta.estimator import AccuracyModel
from meta.proxies import OWN, SHADOW, Observed
from monitoring.drift import wants_update
from monitoring.proxies import estimate
from monitoring.streams import next_view
from schemas.bundle import Manifest
from schemas.config import Guard as GuardSettings
from schemas.errors import StateError
from schemas.frame import Position
from schemas.policy import Policy
from schemas.state import StreamHeader, decode_header, encode_header
from schemas.update import UpdateEvent, seal
from tests.conftest import SHIPPED_BUNDLE
from worker.batch.batcher import MicroBatch
from worker.engine.engine import Engine
from worker.engine.judge import judge
from worker.engine.passes import BatchPrediction, Proposal, Proposals
from worker.engine.predictions import temperature
from worker.engine.resident import pack, unpack
from worker.engine.schedule import held_back
from worker.guard.answer import Policies, answering, named
from worker.guard.guard import Guard, Sight

FRAMES, LONG = 8, 300_000
SIGNALS = {"raw_gradient_norm": 1.0, "generated_gradient_norm": 0.1, "cosine": 0.5}
SIGNALS |= {"source_distance": 0.1, "present_distance": 0.1}
INTEGERS = [0, 10**15, 10**18 - 1, 10**400]
NUMBERS = [-1.0, 10.0, 1e99, 1.7e308, -1.7e308, float("nan")]
TEXTS = ["", "\ud800", "x" * LONG]


class Worker:
    """What a worker computes with a header, step by step, but for the passes."""

    def __init__(self, manifest: Manifest) -> None:
        assert manifest.calibration.estimator is not None
        self.manifest = manifest
        model = AccuracyModel(manifest.calibration.estimator)
        self.engine = cast(Engine, SimpleNamespace(accuracy_model=model, like={}, tensors=lambda stream: {}))
        self.guard = Guard(GuardSettings(), manifest.limits)

    def look(self, header: StreamHeader) -> Any:
        return estimate(header.proxies, self.manifest.calibration, 0.9, 10)

    def step(self, header: StreamHeader, number: int, update: bool, rank: float) -> StreamHeader:
        policy, now = Policies(Policy(), {}).of(header), datetime.now(UTC)
        temperature(self.manifest.calibration, header.proxies)
        wants_update(header.drift, self.look(header).estimated_accuracy, 0.9)
        held_back(policy, header, now.timestamp())
        frames: Any = [SimpleNamespace(position=Position("frames", 0, FRAMES * number + i)) for i in range(FRAMES)]
        observed = Observed(
            FRAMES, dict.fromkeys(OWN, 0.5), FRAMES, dict.fromkeys(SHADOW, 0.5) | {"source_rank": rank}, (1,) * FRAMES
        )
        prediction = BatchPrediction(
            batch=MicroBatch("cam", frames, update, fold=True),
            resident=cast(Any, SimpleNamespace(header=header, token=1)),
            parameters="adapted",
            step=header.step,
            top_index=[[0]],
            top_confidence=[[1.0]],
            mean_confidence=0.9,
            mean_entropy=0.3,
            signals=[[0.3, 0.9]] * FRAMES,
            observed=observed,
            sight=Sight(range(FRAMES * number, FRAMES * (number + 1)), 0.0, number % 3, 0.5, rank),
        )
        proposal = Proposal(prediction, 0, update, SIGNALS if update else {}, True)
        judgement = judge(self.engine, self.guard, prediction, Proposals([proposal], {}, {}, {}), proposal, 2 * FRAMES)
        after = judgement.header
        event = UpdateEvent(
            **header.next_in_chain(),
            decision=judgement.ruling.decision,
            reason=judgement.ruling.reason,
            frames=[str(frame.position) for frame in frames],
            step=after.step,
            parameters=named(answering(policy, header), after),
            before=self.look(header),
            after=self.look(after),
            token=1,
            bundle=header.bundle,
            worker="w",
        )
        sealed = seal(event)
        assert len(sealed.content) < 10_000
        after = after.behind(sealed)
        next_view(None, sealed.event, after, now.timestamp())
        encode_header(unpack(pack(after)))
        return after


@pytest.fixture(scope="module")
def worker() -> Worker:
    return Worker(read_manifest(SHIPPED_BUNDLE))


def parts(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """All values in a document, with the way to each; of lists the first is as good as all."""
    yield path, value
    inner = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, one in inner:
        yield from parts(one, (*path, key))


def others(value: Any) -> list[Any]:
    """What might stand in place of a value."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, dict):
        fewer = [{key: one for key, one in value.items() if key != left_out} for left_out in value]
        return [{}, *fewer, value | {"\ud800": 1.0}, value | {"x" * LONG: 1.0}]
    if isinstance(value, list):
        return [[], value[:-1], value + value[:1]]
    by_kind: dict[type, list[Any]] = {int: INTEGERS, float: NUMBERS, str: TEXTS}
    return by_kind.get(type(value), [0, 0.5])


def changed(document: dict[str, Any], path: tuple[Any, ...], value: Any) -> bytes:
    copy = inner = {"all": deepcopy(document)}
    where: Any = "all"
    for key in path:
        inner, where = inner[where], key
    inner[where] = value
    return json.dumps(copy["all"]).encode()


def decoded(content: bytes) -> StreamHeader | None:
    """None where it is refused, for a reason that has room in an event."""
    try:
        return decode_header(content)
    except StateError as error:
        reason = str(error)
    assert len(reason.encode()) < 2_000
    return None


def test_no_header_ends_a_worker(worker: Worker) -> None:
    header = StreamHeader(stream="cam", bundle="b", method="mgg", approved=3)
    settled = None
    for number in range(55):  # The guard goes back at 24 and 41; before, drift detection has settled.
        header = worker.step(header, number, True, 0.1)
        settled = header.drift if number < 24 else settled
    header.drift = settled
    document = json.loads(encode_header(header))
    assert document["drift"]["rise"]
    refused = survived = 0
    for path, value in parts(document):
        for other in others(value):
            content = changed(document, path, other)
            if (found := decoded(content)) is None:
                refused += 1
                continue
            survived += 1
            for number, (update, rank) in enumerate([(True, -0.5), (False, 0.5), (True, 0.5)], 10_000):
                try:
                    found = worker.step(found, number, update, rank)
                except Exception as error:
                    raise AssertionError(f"{path}: {str(other)[:40]}") from error
    assert refused > 100
    assert survived > 200
