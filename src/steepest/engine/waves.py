"""One exchange of sharded matrices: their parts travel to the owners, and the results back."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from steepest.distributed.exchange import Parcels, Piece, Transfer, send
from steepest.distributed.ownership import is_empty
from steepest.engine.blocks import MatrixBlock
from steepest.engine.matrices import MatrixRun, UserFunctions, buckets
from steepest.engine.step_count import noise_key
from steepest.engine.units import Unit, is_large
from steepest.engine.update import ChunkNoise, MatrixKind, UpdateConfig, narrowed, store
from steepest.rule import Rule

__all__ = ["FLAG", "Task", "Wave", "pieces_back", "pieces_there", "sends_param", "small_entries"]

# Whether a process has failed: eight bytes, so that what follows is aligned.
FLAG = Piece((1,), torch.int64)


def sends_param(rule: Rule) -> bool:
    """Return whether the owner must see the parameter."""
    return "param" in rule.transform_takes or rule.retracts


def small_entries(kind: MatrixKind) -> list[str]:
    """Return the names of the entries that all processes keep."""
    return [name for name, spec in kind.specs.items() if not is_large(spec, kind.shape)]


def pieces_there(config: UpdateConfig, unit: Unit, at: int) -> list[Piece]:
    """Return what a process sends of its part: what ``update`` returns, and the parameter if needed."""
    shape = unit.parts[at].shape
    if is_empty(unit.parts[at]):
        return []
    narrow = config.group["exchange_dtype"] if unit.is_gathered else None
    return [Piece(shape, narrow or config.compute)] * config.inputs + [
        Piece(shape, _param_dtype(config))
    ] * sends_param(config.rule)


def pieces_back(config: UpdateConfig, unit: Unit, at: int, entries: list[Piece]) -> list[Piece]:
    """Return what the owner sends to a process: its part of the result, and the new small entries."""
    part = unit.parts[at]
    narrow = config.group["exchange_dtype"] if unit.is_scattered else None
    dtype = _param_dtype(config) if config.rule.retracts else narrow or config.compute
    return [Piece(part.shape, dtype)] * (not is_empty(part)) + entries


def _param_dtype(config: UpdateConfig) -> torch.dtype:
    """Return the dtype in which parameters travel: masters as a whole."""
    return config.dtype if config.storage.correction is None else config.compute


@dataclass(slots=True, eq=False)
class Task:
    """A unit in this step.

    Attributes:
        run, functions: of its batch.
        unit: who computes it.
        whole: the matrix, without columns.
        part: what this process holds of it.
        arrived: at the owner, (process, what it has sent).
        matrix: at the owner, the direction, or the new parameter of a rule that retracts.
        result: its part that this process holds.
        entries: new entries that all processes keep.
    """

    run: MatrixRun
    functions: UserFunctions | None
    unit: Unit
    whole: MatrixBlock
    part: MatrixBlock
    arrived: list[tuple[int, list[Tensor]]] = field(default_factory=list)
    matrix: Tensor | None = None
    result: Tensor | None = None
    entries: dict[str, Tensor] = field(default_factory=dict)

    @property
    def small(self) -> list[str]:
        """The entries that all processes keep."""
        return small_entries(self.unit.kind)

    @property
    def sends_param(self) -> bool:
        """Whether the owner must see the parameter."""
        return sends_param(self.run.config.rule)

    def pieces_there(self, at: int) -> list[Piece]:
        """Return what a process sends of its part."""
        return pieces_there(self.run.config, self.unit, at)

    def pieces_back(self, at: int) -> list[Piece]:
        """Return what the owner sends to a process."""
        entries = [self.whole.entry(name) for name in self.small]
        kept = [Piece(tuple(entry.shape), entry.dtype) for entry in entries]
        return pieces_back(self.run.config, self.unit, at, kept)

    def put(self, to: int, slots: Iterator[Tensor]) -> None:
        """Write what the owner sends to a process; zeros for a matrix that it failed to compute."""
        part = self.unit.parts[to]
        if not is_empty(part):
            place = next(slots)
            if self.matrix is None:
                # A host that does not wait for its device takes it for the result.
                place.zero_()
            else:
                place.copy_(self.unit.within(self.matrix, part))
        for name in self.small:
            place, value = next(slots), self.entries.get(name)
            place.copy_(self.whole.entry(name) if value is None else value.view(place.shape))

    def get(self, arrived: Iterator[Tensor], own: int) -> None:
        """Read what the owner has sent."""
        if not is_empty(self.unit.parts[own]):
            self.result = next(arrived)
        self.entries = {name: next(arrived) for name in self.small}


class Wave:
    """Matrices of a team that travel together.

    Args:
        tasks: the same on all processes, in one order.
        group: the team's process group; None if it is one process.
        device: where tensors travel, and matrices are computed.
    """

    def __init__(self, tasks: Sequence[Task], group: Any, device: torch.device) -> None:
        self.tasks, self.group, self.device = tasks, group, device
        self.team = tasks[0].unit.team
        self.mine = [task for task in tasks if task.unit.is_mine]
        self.errors: list[BaseException] = []
        self._there: Transfer | None = None
        self._back: Transfer | None = None
        # The processes that say whether they have failed.
        self._flagged: Collection[int | None] = ()

    # -- to the owners

    def begin(self) -> None:
        """Run the ``before`` pass on the parts, and begin to send what it returns to the owners."""
        team = self.team
        outgoing: list[list[Piece]] = [[] for _ in team.ranks]
        incoming: list[list[Piece]] = [[] for _ in team.ranks]
        for task in self.tasks:
            for to in task.unit.receivers(team.own):
                outgoing[to] += task.pieces_there(team.own)
        for task in self.mine:
            for at in task.unit.senders():
                incoming[at] += task.pieces_there(at)
        sent, received = Parcels(outgoing, self.device), Parcels(incoming, self.device)
        self._fill(sent)
        travels = any(task.unit.is_gathered for task in self.tasks)
        self._there = send(self.group if travels else None, sent, received)

    def _fill(self, sent: Parcels) -> None:
        """Run the ``before`` pass; it writes into the parcels where these hold one copy in its dtype."""
        slots = [iter(each) for each in sent.tensors]
        by_run: dict[int, tuple[list[Task], list[list[Tensor]]]] = {}
        copies: list[tuple[Tensor, Tensor]] = []
        for task in self.tasks:
            if is_empty(task.unit.own_part):
                continue
            config, columns = task.run.config, task.part.columns
            places = [
                [next(slots[to]) for _ in range(config.inputs + task.sends_param)]
                for to in task.unit.receivers(self.team.own)
            ]
            inputs = places[0][: config.inputs] if len(places) == 1 else []
            if not inputs or (inputs[0].dtype, inputs[0].device) != (config.compute, config.device):
                shape = columns[0].shape
                inputs = [
                    torch.empty(shape, dtype=config.compute, device=config.device)
                    for _ in range(config.inputs)
                ]
                copies += [pair for each in places for pair in zip(each, inputs, strict=False)]
            if task.sends_param:
                seen = columns[0]
                if config.storage.correction is not None:
                    seen = config.storage.join(seen, columns[-1], config.compute)
                copies += [(each[-1], seen) for each in places]
            tasks, written = by_run.setdefault(id(task.run), ([], []))
            tasks.append(task)
            written.append(inputs)
        for tasks, written in by_run.values():
            tasks[0].run.element_pass("before", [task.part for task in tasks], [], written)
        for place, value in copies:
            place.copy_(value)

    # -- at the owners

    def compute(self) -> None:
        """Compute the matrices that are this process's, when their parts have arrived."""
        assert self._there is not None
        arrived = [iter(each) for each in self._there.wait()]
        self._there = None
        by_run: dict[int, list[Task]] = {}
        for task in self.mine:
            task.arrived = [
                (at, [next(arrived[at]) for _ in task.pieces_there(at)]) for at in task.unit.senders()
            ]
            by_run.setdefault(id(task.run), []).append(task)
        # Nothing else may keep what has arrived once it is stacked.
        arrived.clear()
        for tasks in by_run.values():
            task_of = {id(task.whole): task for task in tasks}
            alone = tasks[0].functions is not None
            for bucket in buckets(tasks[0].run.config, [task.whole for task in tasks]):
                alike = [task_of[id(block)] for block in bucket]
                for some in [[task] for task in alike] if alone else [alike]:
                    try:
                        _transform(some, self.device)
                    except Exception as error:
                        # The other processes wait for this one: see step_together.
                        self.errors.append(error)

    def send_back(self) -> None:
        """Begin to send the results to the processes that hold the parts."""
        team = self.team
        shared = [task for task in self.tasks if task.unit.owner is not None]
        mine = [task for task in shared if task.unit.is_mine]
        own_code = any(task.functions is not None for task in shared)
        # If the user's function raises anywhere, all processes must know.
        travels = own_code or any(task.unit.is_scattered or task.small for task in shared)
        outgoing: list[list[Piece]] = [[] for _ in team.ranks]
        incoming: list[list[Piece]] = [[] for _ in team.ranks]
        if travels:
            flag = [FLAG]
            self._flagged = range(len(team)) if own_code else {task.unit.owner for task in shared}
            outgoing = [flag * (team.own in self._flagged) for _ in team.ranks]
            incoming = [flag * (at in self._flagged) for at in range(len(team))]
        for task in shared:
            assert task.unit.owner is not None
            incoming[task.unit.owner] += task.pieces_back(team.own)
        for to in range(len(team)):
            for task in mine:
                outgoing[to] += task.pieces_back(to)
        sent, received = Parcels(outgoing, self.device), Parcels(incoming, self.device)
        for to, tensors in enumerate(sent.tensors):
            slots = iter(tensors)
            if travels and team.own in self._flagged:
                next(slots).fill_(len(self.errors))
            for task in mine:
                task.put(to, slots)
        for task in mine:
            task.matrix, task.entries = None, {}
        self._back = send(self.group if travels else None, sent, received)

    # -- at the processes that hold the parts

    def arrive(self) -> None:
        """Wait for the results."""
        if self._back is None:
            return
        arrived = [iter(each) for each in self._back.wait()]
        self._back = None
        flags = {at: next(arrived[at]) for at in range(len(self.team)) if at in self._flagged}
        # Reading them would make the host wait for a device; a launcher ends what one process has left.
        read = self.device.type == "cpu" or self.tasks[0].functions is not None
        failed = {at for at, flag in flags.items() if read and int(flag)}
        if self.errors:
            failed.add(self.team.own)
        for at in failed - {self.team.own}:
            self.errors.append(RuntimeError(self._failure(at)))
        for task in self.tasks:
            if task.unit.owner is None:
                continue
            task.get(arrived[task.unit.owner], self.team.own)
            if task.unit.owner in failed:
                task.result, task.entries = None, {}

    def _failure(self, at: int) -> str:
        names = [task.whole.member.name for task in self.tasks if task.unit.owner == at] or ["its matrices"]
        more = f" (or of {len(names) - 1} more)" if len(names) > 1 else ""
        what = "nothing was changed" if self.tasks[0].functions is not None else "they were not stepped"
        return f"rank {self.team.ranks[at]} failed to compute the direction of {names[0]}{more}; {what}"

    def apply(self) -> None:
        """Step this process's parts."""
        self.arrive()
        by_run: dict[int, list[Task]] = {}
        for task in self.tasks:
            unit = task.unit
            if unit.owner is None and task.matrix is not None and not is_empty(unit.own_part):
                task.result = unit.within(task.matrix, unit.own_part)
            if task.result is not None:
                by_run.setdefault(id(task.run), []).append(task)
            for name, value in task.entries.items():
                home = task.whole.entry(name)
                store(home, value.view(home.shape), task.run.finite)
        for tasks in by_run.values():
            run = tasks[0].run
            results = [task.result.to(run.config.device) for task in tasks if task.result is not None]
            if run.config.rule.retracts:
                for task, result in zip(tasks, results, strict=True):
                    rounded, correction = _parted(task, result)
                    store(task.part.columns[0], rounded, run.finite)
                    if correction is not None:
                        store(task.part.columns[-1], correction, run.finite)
            else:
                slots = [[result.to(run.config.compute)] for result in results]
                run.element_pass("after", [task.part for task in tasks], [], slots)
        for task in self.tasks:
            task.matrix, task.result, task.entries = None, None, {}


def _parted(task: Task, result: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return a part of a retracted parameter in its dtype; with its correction, if masters are kept."""
    config, part = task.run.config, task.part
    if config.storage.correction is None:
        return result, None
    assert part.extent is not None
    key = noise_key(config, part.member) if config.noisy else None
    noise = ChunkNoise(key, partial(part.extent.places, part.shape, result.device))
    return narrowed(config, result, config.dtype, noise)


def _stack(tasks: list[Task], stacks: list[Tensor]) -> None:
    """Place what has arrived, and free it."""
    # A separate function, because loop variables would keep the last piece alive.
    for at, task in enumerate(tasks):
        for source, pieces in task.arrived:
            for stack, piece in zip(stacks, pieces, strict=True):
                task.unit.within(stack[at], task.unit.parts[source]).copy_(piece)
        task.arrived = []


def _transform(tasks: list[Task], device: torch.device) -> None:
    """Compute matrices of one shape and configuration, stacked."""
    run = tasks[0].run.on(device)
    config, functions, sends_param = run.config, tasks[0].functions, tasks[0].sends_param
    shape = (len(tasks), *tasks[0].unit.kind.shape)
    stacks = [
        torch.empty(shape, dtype=config.compute, device=device) for _ in range(config.inputs + sends_param)
    ]
    _stack(tasks, stacks)
    bucket = [task.whole for task in tasks]
    params = stacks[-1] if sends_param else None
    function = None if functions is None else partial(functions.orthogonalize, bucket[0].member)
    direction, new = run.directions(bucket, function, stacks[: config.inputs], params)
    if params is not None and config.rule.retracts:
        direction = run.retracted(params, direction, new)
        if config.storage.correction is None:
            direction, _ = run.narrowed(bucket, direction)
    for at, task in enumerate(tasks):
        task.matrix = direction[at]
        small = task.small
        for name, values in new.items():
            if name in small:
                task.entries[name] = values[at]
            else:
                home = task.whole.entry(name)
                store(home, values[at].view(home.shape), run.finite)
