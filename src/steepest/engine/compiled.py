"""Run element passes compiled: one graph serves tensors of any size, each read once and written once.

A graph takes a few flat rows, each of its own size, and a batch runs through it launch by launch.
So the number of compilations depends on the rule and the dtypes only, not on the model or on which
parameters have gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steepest.compile.cache import compiled_once
from steepest.compile.int16_pairs import halves, have_pairs, joined, needs_pairs, pairable, paired
from steepest.compile.unguarded import Code, compiled_code
from steepest.engine.chunks import run_eager
from steepest.engine.cuda_graphs import check_compiles_now
from steepest.engine.layout import Row, chunks_of
from steepest.engine.multi_tensor import SMALL
from steepest.engine.update import NO_NOISE, ChunkNoise, Pass, UpdateConfig, element_pass, store

__all__ = ["TRACED_SIZES", "CompiledLaunch", "laid_out", "launches", "prepare", "run_compiled"]

_ROWS = 4

# Elements of a parameter with a master that a launch takes: a float32 temporary and, on a CPU, a correction
# of 32 bits stay within the room of an eager chunk.
_PIECE_ON_CPU = 15 << 13
_PIECE_ELSEWHERE = 1 << 24

# Sizes for tracing: all different, so that Dynamo takes no two for one symbol, and large, so
# that Inductor generates parallel loops.
TRACED_SIZES = tuple((1 << 17) + 66 * row for row in range(1, _ROWS + 1))

# Generated code for accelerators indexes with 32 bits.
_MOST_ELSEWHERE = (1 << 31) - 1

Columns = Sequence[Tensor]


class GraphSpec(NamedTuple):
    """The key of a compiled graph; batches with equal specs share it.

    ``config`` is the part of the update's configuration that code depends on. ``shared`` holds (name, how
    many numbers; 0 for a plain scalar), ``own`` the names of a row's own scalars, ``dtypes`` those of its
    columns; ``pairs`` says that columns hold two elements in one (:mod:`steepest.compile.int16_pairs`);
    ``widths`` how many elements of each column belong to a block, if there are blocks.
    """

    which: Pass
    config: tuple[Any, ...]
    shared: tuple[tuple[str, int], ...]
    own: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    pairs: bool
    guarded: bool
    noisy: bool
    widths: tuple[int, ...] | None

    @property
    def rows(self) -> int:
        """Rows per launch; fewer for pairs and noise, which generate more code."""
        return _ROWS // (1 + self.pairs) // (1 + self.noisy)


@dataclass(slots=True)
class CompiledLaunch:
    """One run of a graph: the sizes of its rows, all columns, and the numbers."""

    code: Code
    sizes: list[int]
    columns: list[Tensor]
    numbers: tuple[Tensor, Tensor, Tensor]


def prepare(
    config: UpdateConfig, dtypes: Iterable[tuple[torch.dtype, ...]], own: Iterable[str], guarded: bool
) -> None:
    """Compile a batch's passes before anything is written, since compiling may fail.

    Args:
        config: the batch's.
        dtypes: those of (parameter, gradient, state entries per element…).
        own: the names of the members' own scalars.
        guarded: whether the device tells if the step is taken.
    """
    shared = config.numbers()
    rule = config.rule
    if _widens(config):
        config = config.with_wide_corrections
        dtypes = [(*each[:-1], torch.int32) for each in dtypes]
    for each in dtypes:
        passes: list[tuple[Pass, tuple[torch.dtype, ...], Iterable[str]]] = [("whole", each, own)]
        if rule.transforms:
            entries = {
                name
                for kind in config.matrices.values()
                for name, spec in kind.specs.items()
                if not spec.shape
            }
            inputs = (config.compute,) * config.inputs
            passes = [("before", (*each, *inputs), rule.takes & {*own, *entries})]
            if not rule.retracts:
                corrections = each[-1:] if config.storage.correction is not None else ()
                passes.append(("after", (each[0], config.compute, *corrections), ()))
        for which, columns, names in passes:
            pairs = needs_pairs(columns, config.device)
            if pairs and not have_pairs(columns):
                continue
            own_names = tuple(sorted(names))
            _code(_spec(which, config, _shared(which, shared), own_names, columns, pairs, guarded), config)


def _spec(
    which: Pass,
    config: UpdateConfig,
    shared: Mapping[str, Any],
    own: tuple[str, ...],
    dtypes: tuple[torch.dtype, ...],
    pairs: bool,
    guarded: bool,
) -> GraphSpec:
    sizes = tuple([(n, len(v) if isinstance(v, (tuple, list)) else 0) for n, v in shared.items()])
    key, widths = config.key, config.storage.widths(len(dtypes))
    if which == "after":
        key, widths = config.key_after, None
    return GraphSpec(which, key, sizes, own, dtypes, pairs, guarded, config.noisy, widths)


def _shared(which: Pass, numbers: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the numbers that a pass takes: ``"after"`` none of a rule's."""
    return {name: numbers[name] for name in ("lr", "decay")} if which == "after" else numbers


def launches(
    which: Pass, config: UpdateConfig, rows: Sequence[Row], numbers: Mapping[str, Any], guarded: bool
) -> tuple[list[CompiledLaunch], list[Row]]:
    """Arrange rows into launches; return (launches, rows left to the eager pass).

    Left are rows whose columns do not lie in memory alike, and all where compiling fails. ``guarded`` says
    that the device will tell whether to step at all.
    """
    numbers = _shared(which, numbers)
    made: list[CompiledLaunch] = []
    left: list[Row] = []
    by_dtypes: dict[tuple[torch.dtype, ...], list[tuple[Row, Columns]]] = {}
    # This runs for every parameter in every step, and lists take half the time of generators.
    for row in rows:
        columns = laid_out(row, config.noisy)
        if columns is None:
            left.append(row)
        elif columns[0].numel() > 0:
            dtypes = row.dtypes or tuple([column.dtype for column in columns])
            by_dtypes.setdefault(dtypes, []).append((row, columns))
    for dtypes, served in by_dtypes.items():
        pairs = needs_pairs(dtypes, config.device)
        if pairs:
            tried = [(row, _in_pairs(row, columns)) for row, columns in served]
            left += [row for row, columns in tried if columns is None]
            served = [(row, columns) for row, columns in tried if columns is not None]
        if served:
            own = tuple(sorted(served[0][0].scalars))
            spec = _spec(which, config, numbers, own, dtypes, pairs, guarded)
            code = _code(spec, config)
            if code is None:
                left += [row for row, _ in served]
            else:
                made += _launches(spec, config, code, served, _listed(numbers))
    return made, left


def _launches(
    spec: GraphSpec, config: UpdateConfig, code: Code, served: list[tuple[Row, Columns]], shared: list[Any]
) -> list[CompiledLaunch]:
    count = -(-len(served) // spec.rows)
    if spare := count * spec.rows - len(served):
        last = served[-1][0]
        served = served + [(last, columns) for columns in _filling(spec, config.device)[:spare]]
    pack = functools.partial(_pack, device=config.device, there=config.counts_on_device)
    numbers = pack([shared], torch.float64)[0]
    owns = keys = [torch.empty(spec.rows, 0, device="cpu")] * count
    if spec.own:
        mappings = [row.scalars for row, _ in served]
        if all(map(functools.partial(is_, mappings[0]), mappings)):
            same = [mappings[0][name] for name in spec.own]
            owns = [pack([same] * spec.rows, torch.float64)] * count
        else:
            own = [[each[name] for name in spec.own] for each in mappings]
            owns = list(pack(own, torch.float64).view(count, spec.rows, -1).unbind())
    if spec.noisy:
        words = [[*(row.key or (0, 0)), row.extent.start if row.extent else 0] for row, _ in served]
        keys = list(pack(words, torch.int64).view(count, spec.rows, 3).unbind())
    sizes = [columns[0].shape[0] for _, columns in served]
    tensors = [column for _, columns in served for column in columns]
    width = spec.rows * len(spec.dtypes)
    return [
        CompiledLaunch(
            code,
            sizes[at * spec.rows : (at + 1) * spec.rows],
            tensors[at * width : (at + 1) * width],
            (numbers, owns[at], keys[at]),
        )
        for at in range(count)
    ]


def run_compiled(
    which: Pass, config: UpdateConfig, rows: Sequence[Row], numbers: Mapping[str, Any], finite: Tensor | None
) -> None:
    """Run a pass compiled; :func:`~steepest.engine.chunks.run_eager` takes the rows that are left."""
    if config.storage.correction is not None:
        _run_with_masters(which, config, rows, numbers, finite)
    else:
        _run_rows(which, config, rows, numbers, finite)


def _run_rows(
    which: Pass, config: UpdateConfig, rows: Sequence[Row], numbers: Mapping[str, Any], finite: Tensor | None
) -> None:
    made, left = launches(which, config, rows, numbers, finite is not None)
    for launch in made:
        launch.code(launch.sizes, launch.columns, (*launch.numbers, finite))
    if left:
        run_eager(which, config, left, numbers, finite)


def _widens(config: UpdateConfig) -> bool:
    """Return whether graphs take corrections of 16 bits as 32, for which there are vectors."""
    return config.storage.correction == torch.int16 and config.device.type == "cpu"


def _run_with_masters(
    which: Pass, config: UpdateConfig, rows: Sequence[Row], numbers: Mapping[str, Any], finite: Tensor | None
) -> None:
    """Run rows in pieces, because Inductor may write one result as large as they are to memory."""
    wide = config.with_wide_corrections if _widens(config) else config
    longest = _PIECE_ON_CPU if config.device.type == "cpu" else _PIECE_ELSEWHERE
    at = 2 if which == "after" else 1 + len(config.element_state)
    small = [row for row in rows if row.columns[0].numel() <= SMALL]
    run_eager(which, config, small, numbers, finite)
    for row in rows:
        if row.columns[0].numel() <= SMALL:
            continue
        for columns, extent in chunks_of(row, longest, ordered=config.noisy):
            narrow = columns[at]
            if wide is not config:
                columns[at] = narrow.to(torch.int32)
            part = Row(columns, row.scalars, row.key, extent, block=row.block)
            _run_rows(which, wide, [part], numbers, finite)
            if wide is not config:
                narrow.copy_(columns[at])


def laid_out(row: Row, ordered: bool) -> Columns | None:
    """Return flat views of a row's columns for a graph, or None if the graph cannot take them."""
    columns = row.columns
    if not columns[0].is_cpu and columns[0].numel() > _MOST_ELSEWHERE:
        return None
    if row.flats is not None:
        return row.flats
    # Compiled code reads raw memory, which does not hold the values of wrappers and negated views.
    if not all(map(_holds_elements, set(map(type, columns)))) or any(map(Tensor.is_neg, columns)):
        return None
    return row.flat(ordered=ordered)


def _in_pairs(row: Row, columns: Columns) -> Columns | None:
    """View a row's flat columns in pairs, or return None if that is not possible."""
    pairs = row.pairs
    if pairs is None:
        if not pairable(columns):
            return None
        pairs = [paired(column) for column in columns]
        if row.flats is not None:
            row.pairs = pairs
    elif not pairable(columns[1:2]):
        return None
    else:
        pairs[1] = paired(columns[1])
    return pairs


@functools.cache
def _holds_elements(kind: type) -> bool:
    return getattr(kind, "__torch_dispatch__", None) is Tensor.__torch_dispatch__


def _code(spec: GraphSpec, config: UpdateConfig) -> Code | None:
    """Return a graph's code; None, with one warning, if it cannot be compiled."""
    return compiled_once(spec, functools.partial(_compile, spec, config), f"runs {config.rule.name!r}")


def _compile(spec: GraphSpec, config: UpdateConfig) -> Code:
    """Compile the graph, and run it once on tensors of its own."""
    check_compiles_now()
    there = config.device
    count = sum(max(count, 1) for _, count in spec.shared)
    numbers = torch.ones(count, dtype=torch.float64, device=there)
    own = torch.ones(spec.rows, len(spec.own), dtype=torch.float64, device=there)
    keys = torch.ones(spec.rows, 3 * spec.noisy, dtype=torch.int64, device=there)
    finite = torch.ones((), dtype=torch.bool, device=there) if spec.guarded else None
    rows = _zeros(spec, there, TRACED_SIZES[: spec.rows])
    others = (numbers, own, keys, finite)
    return compiled_code(_graph(spec, config), rows, others, fused=config.storage.correction is not None)


def _listed(shared: Mapping[str, Any]) -> list[Any]:
    return [n for value in shared.values() for n in (value if isinstance(value, (tuple, list)) else (value,))]


def _pack(rows: list[list[Any]], dtype: torch.dtype, device: torch.device, there: bool) -> Tensor:
    """Pack numbers and 0-dim tensors into one tensor; with ``there``, without a copy from the host."""
    given = [value for row in rows for value in row]
    if not there and not any(isinstance(value, Tensor) for value in given):
        return torch.tensor(rows, dtype=dtype, device="cpu").to(device, non_blocking=True)
    # Most numbers are the same for all rows, so each is made once.
    made = {
        value: torch.full((), value, dtype=dtype, device=device)
        for value in given
        if not isinstance(value, Tensor)
    }
    numbers = [value.to(device, dtype) if isinstance(value, Tensor) else made[value] for value in given]
    return torch.stack(numbers).view(len(rows), -1)


def _zeros(spec: GraphSpec, device: torch.device, sizes: Sequence[int]) -> list[Columns]:
    """Make rows of zeros of these sizes, to trace the graph with."""
    if spec.widths is not None:
        columns = list(zip(spec.widths, spec.dtypes, strict=True))
        counts = [size // max(spec.widths) for size in sizes]
        return [
            [
                torch.zeros((count, width) if width > 1 else (count,), dtype=dtype, device=device)
                for width, dtype in columns
            ]
            for count in counts
        ]
    rows = [[torch.zeros(size, dtype=dtype, device=device) for dtype in spec.dtypes] for size in sizes]
    return [[paired(column) for column in row] for row in rows] if spec.pairs else list(rows)


@functools.lru_cache(maxsize=64)
def _filling(spec: GraphSpec, device: torch.device) -> list[Columns]:
    """Make rows that fill up the last launch."""
    return _zeros(spec, device, [4 * max(spec.widths or (1,))] * spec.rows)


def _graph(spec: GraphSpec, config: UpdateConfig) -> Callable[..., None]:
    config = config.without_group()
    kept = 2 + len(config.element_state)

    def graph(rows: list[Columns], numbers: Tensor, own: Tensor, keys: Tensor, finite: Tensor | None) -> None:
        shared: dict[str, Any] = {}
        at = 0
        for name, count in spec.shared:
            shared[name] = numbers[at] if count == 0 else tuple(numbers[at + i] for i in range(count))
            at += max(count, 1)
        for i, row in enumerate(rows):
            scalars = shared | {name: own[i, j] for j, name in enumerate(spec.own)}
            parts = list(zip(*map(halves, row), strict=True)) if spec.pairs else [tuple(row)]
            key = keys[i] if spec.noisy else None
            stepped = [
                _step_part(spec, config, part, scalars, key, first, len(parts))
                for first, part in enumerate(parts)
            ]
            for column, (old, *new) in enumerate(zip(row, *stepped, strict=True)):
                if new[0] is not None:
                    store(old, joined(*new) if spec.pairs else new[0], finite if column < kept else None)

    return graph


def _step_part(
    spec: GraphSpec,
    config: UpdateConfig,
    part: Sequence[Tensor],
    scalars: Mapping[str, Any],
    key: Tensor | None,
    first: int,
    stride: int,
) -> list[Tensor | None]:
    """Return the new elements ``first``, ``first + stride``, … of each column; None where it stays."""
    noise = NO_NOISE
    if key is not None:
        place = functools.partial(torch.arange, device=part[0].device)
        noise = ChunkNoise(
            (key[0], key[1]),
            lambda: (place(part[0].numel()) * stride + first + key[2]).view(part[0].shape),
        )
    return element_pass(spec.which, config, scalars, decays=True, donate=False)(part, noise)
