"""A stored stream on the terminal: which parameters answer, how accurate they are, and its snapshots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from schemas.policy import Policy
from schemas.state import Snapshot, StreamHeader
from schemas.update import Proxies
from worker.control.stored import ListedStream
from worker.guard.answer import answering, named
from worker.terminal import counted, facts, printable

COLOURS = {"ok": "green", "expired": "yellow"}
MEANING = {
    "ok": "",
    "expired": ": its next frame starts from the source model, unless a worker still has it in memory",
    "damaged": ": the header cannot be read, and its next frame starts from the source model",
}


def show(
    console: Console, found: ListedStream, snapshots: Sequence[Snapshot | None], policy: Policy, proxies: Proxies
) -> None:
    """`policy` is the stream's effective policy, `proxies` what its state says about its accuracy."""
    colour = COLOURS.get(found.condition, "red")
    meaning = f": {found.foreign}" if found.foreign else MEANING[found.condition]
    console.print(Text.assemble((printable(found.stream), "bold"), "  ", (found.condition + meaning, colour)))
    console.print(facts(_rows(found, policy, proxies)))
    if snapshots:
        console.print(_snapshots(snapshots))


def _rows(found: ListedStream, policy: Policy, proxies: Proxies) -> Iterator[tuple[str, str]]:
    header = found.header
    if found.owner:
        yield "owner", f"{found.owner} (token {found.token})"
    if header is not None and not found.foreign:
        yield "answered by", _answer(header, policy)
        yield "updates", f"{header.step:,} applied, {header.frames:,} frames and {header.events:,} events so far"
        if proxies.confidence and proxies.estimated_accuracy is not None:
            yield "estimated accuracy", _accuracy(proxies)
        yield "policy", _policy(policy, header)
        if header.guard.rest:
            yield "guard", f"no updates for another {header.guard.rest:,} frames, after a reset"
        if header.drift is not None:
            yield "drift", "moving" if header.drift.adapting else "settled"
        if header.approved is not None:
            yield "approved", f"the parameters of step {header.approved:,}"
        yield "folded up to", _places(header.positions)
        if header.commands:
            yield "obeyed up to", _places(header.commands)
        yield "bundle", f"{header.bundle} ({header.method})"
    yield "state", f"{counted(found.tensor_bytes, 'byte')}, {counted(found.snapshots, 'snapshot')}"


def _answer(header: StreamHeader, policy: Policy) -> str:
    answer = named(answering(policy, header), header)
    if answer != "source":
        return answer
    if policy.mode == "approve":
        return "source: nothing is approved yet"
    if policy.mode == "shadow":
        return "source: the policy's mode is shadow"
    if not header.guard.trusted:
        return f"source: the guard has doubted the adapted parameters for {header.guard.doubted:,} frames"
    if header.probation:
        return f"source: for another {header.probation:,} frames, after a change of bundle"
    return "source: the stream is not in the canary's share" if header.step else "source: no update yet"


def _accuracy(proxies: Proxies) -> str:
    if proxies.estimated_accuracy is None:
        return "-"
    text = f"{proxies.estimated_accuracy:.1%}"
    if proxies.low is not None and proxies.high is not None:
        text += f" ({proxies.low:.0%} to {proxies.high:.0%})"
    return text if proxies.source_accuracy is None else f"{text}, of source {proxies.source_accuracy:.1%}"


def _policy(policy: Policy, header: StreamHeader) -> str:
    rules = [f"mode {policy.mode}"]
    if policy.mode == "canary":
        rules.append(f"share {policy.canary_share:g}")
    if policy.frozen:
        rules.append("frozen")
    if policy.max_updates_per_hour:
        rules.append(f"at most {policy.max_updates_per_hour:,} updates an hour")
    if policy.quiet_hours:
        rules.append(f"quiet {' and '.join(policy.quiet_hours)} UTC")
    said = header.policy.model_dump(exclude_none=True) if header.policy else {}
    changed = [name if value is not False else f"not {name}" for name, value in sorted(said.items())]
    return ", ".join(rules) + (f" (by command: {', '.join(changed)})" if changed else "")


def _places(offsets: dict[str, int]) -> str:
    return ", ".join(f"{log}/{offset}" for log, offset in sorted(offsets.items())) or "nothing yet"


def _snapshots(snapshots: Sequence[Snapshot | None]) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("roll back", "step", "taken, UTC", "estimated accuracy", "why"):
        table.add_column(name, justify="right" if name in ("roll back", "step") else "left", overflow="fold")
    for number, kept in enumerate(snapshots, 1):
        if kept is None:
            table.add_row(str(number), "-", "-", "-", "it is damaged or too large: roll back to another")
            continue
        accuracy = "-" if kept.proxies is None else _accuracy(kept.proxies)
        cells = (str(number), f"{kept.header.step:,}", f"{kept.time:%Y-%m-%d %H:%M:%S}", accuracy, kept.reason)
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table
