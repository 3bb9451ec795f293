"""What a command makes of a stream. One handler serves workers, and operators who write to the store themselves."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from torch import Tensor

from meta.method import State
from meta.proxies import as_source
from schemas.command import Action, Command
from schemas.errors import StateError
from schemas.policy import PolicyChange
from schemas.state import GuardState, Snapshot, StreamHeader
from schemas.update import Decision, UpdateEvent, seal
from worker.engine.engine import Engine
from worker.guard.answer import Policies, answering, named
from worker.streams.entry import Entry

Distances = Callable[[Tensor, Tensor], list[dict[str, float]]]
NO_CHANGE = PolicyChange()


@dataclass(frozen=True)
class Subject:
    """The stream that is to obey: header, tensors, and a function that reads a snapshot, which may raise StateError."""

    header: StreamHeader
    tensors: State
    snapshot: Callable[[int], tuple[Snapshot, State]]


@dataclass(frozen=True)
class Context:
    """What all commands need besides the stream: the tensors of a new stream, the names of those that answer, and what
    the events say of bundle and worker."""

    fresh: State
    parameters: Collection[str]
    distances: Distances
    policies: Policies
    bundle: str
    worker: str

    @classmethod
    def of(cls, engine: Engine, policies: Policies, worker: str) -> Context:
        """The context of the bundle that the engine runs."""
        return cls(engine.like, tuple(engine.source), engine.distances, policies, engine.bundle_hash, worker)


@dataclass(frozen=True)
class _Change:
    decision: Decision
    header: StreamHeader
    reason: str = ""
    tensors: State | None = None
    approved: State | None = None


def obey(command: Command, subject: Subject, context: Context, token: int) -> Entry:
    """The stream after the command, with its event. If the command cannot be done, the event says why."""
    try:
        change = _ACTIONS[command.action](command, subject, context)
    except StateError as error:
        change = _Change("skipped", subject.header, f"cannot {command.action}: {error}")
    return _explained(change, command, subject, context, token)


def imported(tensors: State, step: int, reason: str, subject: Subject, context: Context, token: int) -> Entry:
    """The stream with the tensors of an imported file, and the event that says so."""
    change = _Change("imported", with_other_parameters(subject.header, step), reason, tensors)
    return _explained(change, None, subject, context, token)


def taken_in(decision: Decision, reason: str, subject: Subject, context: Context, token: int) -> Entry:
    """The stream as a worker loads it where that differs from what was stored, and the event that says why."""
    return _explained(_Change(decision, subject.header, reason), None, subject, context, token)


def _explained(change: _Change, command: Command | None, subject: Subject, context: Context, token: int) -> Entry:
    """The change with its event, the next in the stream's chain."""
    header = change.header.model_copy(update={"bundle": context.bundle})
    affine = (change.tensors or subject.tensors)["affine"]
    layers = context.distances(subject.tensors["affine"][None], affine[None])[0] if change.tensors else {}
    event = seal(
        UpdateEvent(
            **subject.header.next_in_chain(),
            decision=change.decision,
            reason="; ".join(filter(None, (change.reason, *_said(command)))),
            frames=[],
            step=header.step,
            source_distance=float((affine - context.fresh["affine"]).norm()),
            layers=layers,
            parameters=named(answering(context.policies.of(header), header), header),
            command=command.id if command else None,
            token=token,
            bundle=context.bundle,
            worker=context.worker,
        )
    )
    return Entry(header.behind(event), (event,), change.tensors, change.approved)


def _frozen(command: Command, subject: Subject, context: Context) -> _Change:
    return _Change("frozen", _under(subject.header, PolicyChange(frozen=True)))


def _unfrozen(command: Command, subject: Subject, context: Context) -> _Change:
    return _Change("unfrozen", _under(subject.header, PolicyChange(frozen=False)))


def _policy(command: Command, subject: Subject, context: Context) -> _Change:
    wanted = command.policy or NO_CHANGE
    if wanted == NO_CHANGE:
        before = (subject.header.policy or NO_CHANGE).in_words()
        said = "the configuration's policy again" + (f", without {before}" if before else "")
        return _Change("policy", subject.header.model_copy(update={"policy": None}), said)
    return _Change("policy", _under(subject.header, wanted), wanted.in_words())


def _reset(command: Command, subject: Subject, context: Context) -> _Change:
    header = with_other_parameters(subject.header, 0).model_copy(update={"approved": None})
    return _Change("reset", header, tensors=context.fresh)


def _rollback(command: Command, subject: Subject, context: Context) -> _Change:
    snapshot, tensors = subject.snapshot(command.snapshot)
    reason = f"to snapshot {command.snapshot}, step {snapshot.header.step}, {snapshot.time:%Y-%m-%d %H:%M:%S} UTC"
    return _Change("rolled_back", with_other_parameters(subject.header, snapshot.header.step), reason, tensors)


def _approve(command: Command, subject: Subject, context: Context) -> _Change:
    header = subject.header.model_copy(update={"approved": subject.header.step})
    approved = {name: subject.tensors[name].clone() for name in context.parameters}
    return _Change("approved", header, f"step {header.step}", approved=approved)


_ACTIONS: dict[Action, Callable[[Command, Subject, Context], _Change]] = {
    "freeze": _frozen,
    "unfreeze": _unfrozen,
    "reset": _reset,
    "rollback": _rollback,
    "approve": _approve,
    "policy": _policy,
}


def _said(command: Command | None) -> tuple[str, ...]:
    return (command.reason, command.by and f"by {command.by}") if command else ()


def _under(header: StreamHeader, change: PolicyChange) -> StreamHeader:
    """The header with `change` laid over the policy that earlier commands have set."""
    said = (header.policy or NO_CHANGE).model_copy(update=change.model_dump(exclude_none=True))
    return header.model_copy(update={"policy": said})


def with_other_parameters(header: StreamHeader, step: int) -> StreamHeader:
    """The header once a stream has the parameters of another step. What guard and drift detection knew of the old
    parameters is void. The positions stay: no frame is folded in again."""
    proxies = as_source(header.proxies)
    return header.model_copy(
        update={"step": step, "snapshot": step, "drift": None, "guard": GuardState(), "proxies": proxies}
    )
