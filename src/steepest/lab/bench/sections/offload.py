"""Steps on the host for parameters on CUDA, held against the host's work and the copies alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median

import torch

from ...clock import now
from ...footprint import state_bytes
from ..entry import GRAPH, Entry, How, ours
from ..material import Material, available_bytes
from ..results import Column, Result, Row
from ..section import Setting
from ..shapes import ShapeList
from ..turns import WARMUP_ROUNDS, Times, Turn, reason, take_turns
from ..watch import Watcher

NAMES = ("signgsd", "lion", "adamw")
_COPIES = "copies"
# Of the parameters' bytes: they and their gradients, the buffers, and of each rule's state two.
_HOST_COPIES = 10

_COLUMNS = (
    Column("label", "optimizer"),
    Column("how", "how"),
    Column("step_ms", "step, ms", "ms"),
    Column("host_ms", "host alone, ms", "ms"),
    Column("copies_ms", "copies alone, ms", "ms"),
    Column("overlap", "overlap", "percent"),
    Column("of_bound", "of the bound", "percent"),
    Column("copies_rate", "copies, GB/s", "rate"),
    Column("state_bytes", "state on the host", "bytes"),
    Column("reason", ""),
)
_NOTE = (
    "Medians of {rounds} rounds in which all of these take turns. Host alone: the same step of parameters "
    "that are in the host's memory. Copies alone: gradients and parameters to pinned memory and parameters "
    "back, both ways at once. Overlap: (host + copies − step) / the lesser of the two, in each round: 100 % "
    "hides it whole behind the other, 0 % is one after the other. The bound is the greater of the two."
)
_NOTHING = "Parameters are in the host's memory here: there is nothing to offload. --device cuda measures it."


class Offload:
    """A table for the first model; a line where there is no accelerator."""

    name = "offload"

    def pieces(self, setting: Setting) -> int:
        """One, on an accelerator, if any of `NAMES` is measured."""
        return int(setting.device.type != "cpu" and bool(_entries(setting)))

    def run(self, setting: Setting, watcher: Watcher) -> Iterator[Result]:
        """One table."""
        if not _entries(setting):
            return
        shapes = setting.models[0]
        title = f"State on the host: {shapes.title}, all {len(shapes.tensors)} tensors"
        if setting.device.type == "cpu":
            yield Result(self.name, title, _COLUMNS, [], [_NOTHING])
            return
        watcher.begun(f"{shapes.title}: state on the host")
        short = _short(shapes, setting)
        rows = [] if short else rows_of(shapes, setting, watcher.ticked)
        watcher.finished()
        notes = [short] if short else [_NOTE.format(rounds=setting.rounds)]
        yield Result(self.name, title, _COLUMNS, rows, notes)


def _entries(setting: Setting) -> list[Entry]:
    """Ours once each, with state on the host, compiled if compiled ones are measured."""
    found: dict[str, Entry] = {}
    for family in setting.families:
        for entry in family.entries:
            if entry.ours and entry.rule in NAMES and entry.how != GRAPH:
                how: How = "compiled" if entry.how == "compiled" else "eager"
                found.setdefault(entry.rule, ours(entry.rule, how, state_device="cpu"))
    return list(found.values())


def _short(shapes: ShapeList, setting: Setting) -> str:
    copy = shapes.numel * setting.dtype.itemsize
    host = available_bytes(torch.device("cpu"))
    for need, limit, where in (
        (2 * copy, setting.memory, "device"),
        (_HOST_COPIES * copy, host, "host"),
    ):
        if need > limit:
            return f"skipped: needs {need / 2**30:.1f} GiB on the {where}, there are {limit / 2**30:.1f} GiB"
    return ""


def rows_of(
    shapes: ShapeList, setting: Setting, tick: Callable[[float], None] = lambda share: None
) -> list[Row]:
    """A row an optimizer; offloaded and on the host alone, they take turns with each other and the copies."""
    device = setting.device
    there = Material.of(shapes.tensors, device, setting.dtype)
    here = Material.of(shapes.tensors, torch.device("cpu"), setting.dtype)
    turns = [Turn(_COPIES, copies(there))]
    made: dict[str, torch.optim.Optimizer] = {}
    failed: dict[str, str] = {}
    for entry in _entries(setting):
        try:
            for label, material in ((entry.key, there), (_host(entry), here)):
                optimizer = made[label] = entry.make(material.params)
                material.lend_gradients()
                optimizer.step()
                turns.append(Turn(label, optimizer.step, material.lend_gradients))
        except Exception as error:
            failed[entry.key] = reason(error)
    total = setting.rounds + WARMUP_ROUNDS
    times = take_turns(turns, setting.rounds, lambda: now(device), lambda done: tick(done / total))
    return [_row(entry, times, failed, made, there) for entry in _entries(setting)]


def _host(entry: Entry) -> str:
    return f"{entry.key}, on the host alone"


def _row(
    entry: Entry,
    times: Times,
    failed: dict[str, str],
    made: dict[str, torch.optim.Optimizer],
    material: Material,
) -> Row:
    row: Row = {"key": entry.key, "label": entry.label, "how": entry.how, "reason": ""}
    labels = (entry.key, _host(entry), _COPIES)
    why = failed | times.failed
    for label in labels:
        if label not in times.seconds or label in why:
            return row | {"status": "failed", "reason": why.get(label, "not made")}
    rounds = list(zip(*(times.seconds[label] for label in labels), strict=True))
    return row | {
        "status": "ok",
        "rounds": len(rounds),
        "step_ms": times.median_ms(entry.key),
        "quartiles_ms": times.quartiles_ms(entry.key),
        "host_ms": times.median_ms(_host(entry)),
        "copies_ms": times.median_ms(_COPIES),
        "overlap": median(overlap(*each) for each in rounds),
        "of_bound": median(max(host, moved) / step for step, host, moved in rounds),
        "copies_rate": 3 * material.nbytes / times.median_ms(_COPIES) / 1e6,
        "state_bytes": state_bytes(made[entry.key]),
    }


def overlap(step: float, host: float, moved: float) -> float:
    """What share of the lesser of the host's time and the copies' is hidden behind the other.

    Example:
        >>> overlap(3.0, 3.0, 1.0), overlap(4.0, 3.0, 1.0), overlap(3.5, 3.0, 1.0)
        (1.0, 0.0, 0.5)
    """
    return (host + moved - step) / min(host, moved)


def copies(material: Material) -> Callable[[], None]:
    """A function that moves what an offloaded step moves: gradients and parameters down, parameters up."""
    params = [param.detach() for _, param in material.params]
    device = params[0].device
    pinned = device.type == "cuda"
    down, up = (
        [torch.empty_like(each, device="cpu", pin_memory=pinned).copy_(each) for each in tensors]
        for tensors in (material.grads, params)
    )

    def move_down() -> None:
        for buffers, tensors in ((down, material.grads), (up, params)):
            for buffer, tensor in zip(buffers, tensors, strict=True):
                buffer.copy_(tensor, non_blocking=pinned)

    def move_up() -> None:
        # They have the numbers that they are given, whichever copy is first.
        for param, buffer in zip(params, up, strict=True):
            param.copy_(buffer, non_blocking=pinned)

    def in_turn() -> None:
        move_down()
        move_up()

    if not pinned:
        return in_turn
    streams = [torch.cuda.Stream(device) for _ in range(2)]  # type: ignore[no-untyped-call]

    def at_once() -> None:
        for stream, move in zip(streams, (move_down, move_up), strict=True):
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                move()

    return at_once
