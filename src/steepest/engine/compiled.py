"""One compiled graph for tensors of any size: each is read once and written once.

A graph takes a few rows (a parameter, its gradient, its state), each flat and of a size of its own, and a
batch is run through it call by call. So what is compiled, and for how long, depends on the rule
and the dtypes alone, not on the model or on which of its parameters have a gradient; and one call, about
1.5 µs a row, is small beside the pass over memory.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steepest.compile.cache import CapturedTooSoon, compiled_once
from steepest.compile.int16_pairs import halves, joined, needs_pairs, pairable, paired
from steepest.compile.unguarded import Code, compiled_code
from steepest.engine.chunks import UpdateConfig, advance, member_key, shared_scalars, store
from steepest.engine.collect import ParamBatch, ParamUpdate
from steepest.engine.cuda_graphs import capturing
from steepest.engine.layout import flat

__all__ = [
    "Plan",
    "prepare",
    "run_compiled",
    "warn_not_compiled",
]

_ROWS = 4

# Sizes that a graph is first traced with: each its own, so that no two are taken for one, and large, so
# that the loops over them are made for several threads.
_TRACED_SIZES = tuple((1 << 17) + 66 * row for row in range(1, _ROWS + 1))

# Code for an accelerator counts elements in 32 bits.
_MOST_ELSEWHERE = (1 << 31) - 1

Row = Sequence[Tensor]


@dataclass(frozen=True)
class GraphSpec:
    """What one graph is made for: batches with equal specs share it.

    ``shared`` holds (name, how many numbers; 0 for a plain scalar), ``own`` the per-parameter scalars'
    names, ``dtypes`` those of parameter, gradient and state; ``pairs`` says that the rows hold two
    elements in one (:mod:`steepest.compile.int16_pairs`).
    """

    recipe: UpdateConfig
    shared: tuple[tuple[str, int], ...]
    own: tuple[str, ...]
    state: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    pairs: bool
    device: torch.device
    guarded: bool

    @property
    def rows(self) -> int:
        """How many rows a call takes: a row of pairs is code for two, and noise is much code."""
        return _ROWS // (1 + self.pairs) // (1 + self.recipe.noisy)


@functools.cache
def warn_not_compiled(rule: str) -> None:
    """Say once that ``compile=True`` has no effect on a matrix rule."""
    warnings.warn(
        f"compile=True has no effect on {rule!r}: matrix rules run eagerly, their time is in matmuls",
        RuntimeWarning,
        stacklevel=5,
    )


@dataclass(slots=True)
class Call:
    """One run of a graph: its rows' sizes, the rows one after the other, and the numbers."""

    code: Code
    sizes: list[int]
    rows: list[Tensor]
    numbers: tuple[Tensor, Tensor, Tensor]


@dataclass(slots=True)
class Plan:
    """A batch's step before anything is written: its graphs' runs, and the members for the eager pass."""

    calls: list[Call]
    left: list[ParamUpdate]


def prepare(batch: ParamBatch, guarded: bool) -> Plan:
    """Compile what a batch's step needs, and lay its tensors out.

    Left to the eager pass are members whose tensors do not lie in memory alike, and all of them where
    compiling fails. ``guarded`` says that the device will tell whether to step at all.
    """
    recipe = UpdateConfig.of(batch, keep_decay=True)
    shared = shared_scalars(batch)
    names = batch.element_state
    plan = Plan([], [])
    by_dtypes: dict[tuple[torch.dtype, ...], list[tuple[ParamUpdate, Row, int]]] = {}
    # This runs for every parameter in every step: lists, not generators, take half the time.
    for member in batch.members:
        state = member.state
        tensors = [member.param, member.grad, *[state[name] for name in names]]
        dtypes = tuple([tensor.dtype for tensor in tensors])
        served = by_dtypes.get(dtypes)
        if served is None:
            served = by_dtypes[dtypes] = []
        row = laid_out(tensors, recipe.noisy)
        if row is None:
            plan.left.append(member)
        elif (size := row[0].numel()) > 0:
            served.append((member, row, size))
    for dtypes, served in by_dtypes.items():
        if pairs := needs_pairs(dtypes, batch.device):
            plan.left += [member for member, row, _ in served if not pairable(row)]
            served = [
                (member, [paired(tensor) for tensor in row], size // 2)
                for member, row, size in served
                if pairable(row)
            ]
        if served:
            spec = GraphSpec(
                recipe,
                tuple((name, len(v) if isinstance(v, (tuple, list)) else 0) for name, v in shared.items()),
                tuple(sorted(served[0][0].scalars)),
                tuple(names),
                dtypes,
                pairs,
                batch.device,
                guarded,
            )
            code = _ready(spec)
            if code is None:
                plan.left += [member for member, _, _ in served]
            else:
                plan.calls += _calls(batch, spec, code, served, _listed(shared))
    return plan


def _calls(
    batch: ParamBatch,
    spec: GraphSpec,
    code: Code,
    served: list[tuple[ParamUpdate, Row, int]],
    shared: list[Any],
) -> list[Call]:
    count = -(-len(served) // spec.rows)
    if spare := count * spec.rows - len(served):
        last = served[-1][0]
        served = served + [(last, row, row[0].numel()) for row in _filling(spec)[:spare]]
    pack = functools.partial(_pack, device=batch.device, there=batch.counts_on_device)
    numbers = pack([shared], torch.float64)[0]
    owns = all_keys = [torch.empty(spec.rows, 0, device="cpu")] * count
    if spec.own:
        own = [[member.scalars[name] for name in spec.own] for member, _, _ in served]
        owns = list(pack(own, torch.float64).view(count, spec.rows, -1).unbind())
    if spec.recipe.noisy:
        keys = [list(member_key(batch, member)) for member, _, _ in served]
        all_keys = list(pack(keys, torch.int64).view(count, spec.rows, 2).unbind())
    sizes = [size for _, _, size in served]
    tensors = [tensor for _, row, _ in served for tensor in row]
    width = spec.rows * len(spec.dtypes)
    return [
        Call(
            code,
            sizes[at * spec.rows : (at + 1) * spec.rows],
            tensors[at * width : (at + 1) * width],
            (numbers, owns[at], all_keys[at]),
        )
        for at in range(count)
    ]


def run_compiled(plan: Plan, finite: Tensor | None) -> list[ParamUpdate]:
    """Step the members of a batch that its graphs take; the others are returned, for the eager pass."""
    for call in plan.calls:
        call.code(call.sizes, call.rows, (*call.numbers, finite))
    return plan.left


def laid_out(tensors: list[Tensor], ordered: bool) -> Row | None:
    """Flat views of tensors as a graph takes them; None where it cannot."""
    param = tensors[0]
    # Code reads what lies in memory: a wrapper's elements lie elsewhere, those of z.conj().imag are negated.
    if not all(map(_holds_elements, set(map(type, tensors)))) or any(map(Tensor.is_neg, tensors)):
        return None
    if not param.is_cpu and param.numel() > _MOST_ELSEWHERE:
        return None
    return flat(tensors, ordered=ordered)


@functools.cache
def _holds_elements(kind: type) -> bool:
    return getattr(kind, "__torch_dispatch__", None) is Tensor.__torch_dispatch__


def _ready(spec: GraphSpec) -> Code | None:
    """Return a graph's code; None, with one warning, where it cannot be compiled."""
    return compiled_once(spec, functools.partial(_compiled, spec), f"runs {spec.recipe.rule.name!r}")


def _listed(shared: dict[str, Any]) -> list[Any]:
    return [n for value in shared.values() for n in (value if isinstance(value, (tuple, list)) else (value,))]


def _pack(rows: list[list[Any]], dtype: torch.dtype, device: torch.device, there: bool) -> Tensor:
    """Numbers, or 0-dim tensors of a device, as one tensor on it; ``there``: without a copy from the host."""
    given = [value for row in rows for value in row]
    if not there and not any(isinstance(value, Tensor) for value in given):
        return torch.tensor(rows, dtype=dtype, device="cpu").to(device, non_blocking=True)
    # Most numbers are the same for all rows.
    made = {
        value: torch.full((), value, dtype=dtype, device=device)
        for value in given
        if not isinstance(value, Tensor)
    }
    numbers = [value.to(dtype) if isinstance(value, Tensor) else made[value] for value in given]
    return torch.stack(numbers).view(len(rows), -1)


def _rows(spec: GraphSpec, sizes: Sequence[int]) -> list[Row]:
    """Rows of zeros as the graph is traced with, of that many elements each."""
    rows = [[torch.zeros(size, dtype=dtype, device=spec.device) for dtype in spec.dtypes] for size in sizes]
    return [[paired(tensor) for tensor in row] for row in rows] if spec.pairs else list(rows)


@functools.lru_cache(maxsize=64)
def _filling(spec: GraphSpec) -> list[Row]:
    """Rows that nobody reads, where a batch is no multiple of a call's."""
    return _rows(spec, [4] * spec.rows)


def _compiled(spec: GraphSpec) -> Code:
    """Compile a graph, and run it once on tensors of its own."""
    if capturing():
        raise CapturedTooSoon(
            "this step cannot be captured in a CUDA graph: its code is not compiled yet; take a few steps "
            "with these options before. Nothing was changed"
        )
    there = spec.device
    count = sum(max(count, 1) for _, count in spec.shared)
    numbers = torch.ones(count, dtype=torch.float64, device=there)
    own = torch.ones(spec.rows, len(spec.own), dtype=torch.float64, device=there)
    keys = torch.ones(spec.rows, 2 * spec.recipe.noisy, dtype=torch.int64, device=there)
    finite = torch.ones((), dtype=torch.bool, device=there) if spec.guarded else None
    rows = _rows(spec, _TRACED_SIZES[: spec.rows])
    return compiled_code(_graph(spec), rows, (numbers, own, keys, finite))


def _graph(spec: GraphSpec) -> Callable[..., None]:
    def graph(rows: list[Row], numbers: Tensor, own: Tensor, keys: Tensor, finite: Tensor | None) -> None:
        shared: dict[str, Any] = {}
        at = 0
        for name, count in spec.shared:
            shared[name] = numbers[at] if count == 0 else tuple(numbers[at + i] for i in range(count))
            at += max(count, 1)
        for i, row in enumerate(rows):
            scalars = shared | {name: own[i, j] for j, name in enumerate(spec.own)}
            key = (keys[i, 0], keys[i, 1]) if spec.recipe.noisy else None
            parts = list(zip(*map(halves, row), strict=True)) if spec.pairs else [tuple(row)]
            stepped = [
                _step_part(spec, part, scalars, key, first, len(parts)) for first, part in enumerate(parts)
            ]
            for old, *new in zip(row, *stepped, strict=True):
                if new[0] is not None:
                    store(old, joined(*new) if spec.pairs else new[0], finite)

    return graph


def _step_part(
    spec: GraphSpec,
    part: Sequence[Tensor],
    scalars: Mapping[str, Any],
    key: Any,
    first: int,
    stride: int,
) -> list[Tensor | None]:
    """What becomes of the elements ``first``, ``first + stride``, … of a row; None: as it is."""
    param, grad, *entries = part
    places = functools.partial(torch.arange, device=param.device)
    stepped, new = advance(
        spec.recipe,
        param,
        grad,
        dict(zip(spec.state, entries, strict=True)),
        scalars,
        key,
        lambda: places(param.numel()) * stride + first,
    )
    return [stepped, None, *(new.get(name) for name in spec.state)]
