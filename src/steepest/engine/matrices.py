"""Run the ``transform`` phase: stack matrices of equal shapes, one batched computation per bucket.

A bucket goes through three passes: ``before`` writes the state and fills the stack, ``transform`` turns the
stack into directions, ``after`` applies them. Only what ``transform`` is given is stacked.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from steepest.engine.batches import ParamBatch, ParamUpdate
from steepest.engine.blocks import MatrixBlock, blocks_of, bucket_bytes
from steepest.engine.chunks import run_eager
from steepest.engine.compiled import run_compiled
from steepest.engine.layout import Extent, Row
from steepest.engine.multi_tensor import SMALL
from steepest.engine.reductions import write_measured
from steepest.engine.step_count import add_step, noise_key
from steepest.engine.update import ChunkNoise, Pass, UpdateConfig, descended, narrowed, store
from steepest.scratch import borrow, give_back

__all__ = [
    "MatrixRun",
    "UserFunctions",
    "buckets",
    "step_matrices",
    "step_one_by_one",
    "undo_unless",
]

_ALL = slice(None)

PassRunner = Callable[
    [Pass, UpdateConfig, Sequence[Row], Mapping[str, Any], "Tensor | None"],
    None,
]


def step_matrices(batch: ParamBatch, finite: Tensor | None, compiled: bool) -> None:
    """Step every member of a batch, bucket by bucket."""
    run = MatrixRun(batch.config, batch.config.numbers(), finite, run_compiled if compiled else run_eager)
    blocks = [block for member in batch.members for block in blocks_of(run.config, member)]
    for bucket in buckets(run.config, blocks):
        inputs = run.inputs(bucket)
        run.finish(bucket, *run.directions(bucket, None, inputs))
        give_back(*inputs)


@dataclass(frozen=True, slots=True)
class UserFunctions:
    """A subclass's own code for the parameters of a ``transform`` rule.

    Attributes:
        orthogonalize: returns the direction of a parameter's matrix from what ``update`` returned for it.
        decay: decays a parameter, or adds the decay to the given copy of its gradient, in place; None leaves
            the decay to the engine.
    """

    orthogonalize: Callable[[ParamUpdate, Tensor], Tensor]
    decay: Callable[[ParamUpdate, Tensor], None] | None = None


def step_one_by_one(
    batch: ParamBatch, finite: Tensor | None, compiled: bool, functions: UserFunctions
) -> None:
    """Step one parameter at a time with the user's functions.

    They may raise: every parameter has then either been stepped or is as it was, and so is its state. No more
    memory is held than one parameter needs.
    """
    run = MatrixRun(batch.config, batch.config.numbers(), finite, run_compiled if compiled else run_eager)
    for member in batch.members:
        _step_one(run, member, functions)


def _step_one(run: MatrixRun, member: ParamUpdate, functions: UserFunctions) -> None:
    # A separate function, because loop variables would keep one parameter's results alive during the next.
    config, finite = run.config, run.finite
    param, grad, *entries = member.columns
    written = entries if functions.decay is None else [param, *entries]
    before = [each.clone() for each in written]
    try:
        if functions.decay is not None:
            # With ``maximize``, the hook sees the negative gradient, and ``update`` will negate it again.
            own = -grad if config.maximize else grad.clone()
            with torch.autocast(config.device.type, enabled=False):
                functions.decay(member, own)
            member.columns[1] = own.neg_() if config.maximize else own
            if finite is not None:
                undo_unless(finite, config, member, before[0], before[-1])
        orthogonalize = partial(functions.orthogonalize, member)
        done = [
            ([block], *run.directions([block], orthogonalize, run.inputs([block])))
            for block in blocks_of(config, member)
            if math.prod(block.kind.shape) > 0
        ]
    except BaseException:
        torch._foreach_copy_(written, before)
        raise
    del before
    for each in done:
        run.finish(*each)
    write_measured([member])
    add_step(ParamBatch(config, [member]), finite)


def undo_unless(
    finite: Tensor, config: UpdateConfig, member: ParamUpdate, param: Tensor, correction: Tensor
) -> None:
    """Put back a parameter, and its correction if it has one, if the step is to be skipped."""
    columns = member.columns
    columns[0].copy_(torch.where(finite, columns[0], param))
    if config.storage.correction is not None:
        columns[-1].copy_(torch.where(finite, columns[-1], correction))


def buckets(config: UpdateConfig, blocks: Sequence[MatrixBlock]) -> Iterator[list[MatrixBlock]]:
    """Yield blocks of equal shape and step count, with at most ``bucket_bytes`` of working memory.

    If only a device knows the step counts, blocks with different counts share a bucket.
    """
    by_kind: dict[tuple[Any, ...], list[MatrixBlock]] = {}
    for block in blocks:
        step = block.member.step
        when = None if isinstance(step, Tensor) else step
        by_kind.setdefault((block.kind.shape, when), []).append(block)
    for (shape, _), alike in by_kind.items():
        if math.prod(shape) == 0:
            continue
        limit = bucket_bytes(config) if config.rule.streams else config.group["bucket_bytes"]
        count = max(1, limit // (alike[0].kind.numel * config.working_bytes))
        for first in range(0, len(alike), count):
            yield alike[first : first + count]


@dataclass(slots=True)
class MatrixRun:
    """The step of one batch: configuration, numbers, the mask, and the function that runs passes."""

    config: UpdateConfig
    numbers: Mapping[str, Any]
    finite: Tensor | None
    run: PassRunner

    def on(self, device: torch.device) -> MatrixRun:
        """Return this run, or a copy that computes on another device than that of the parameters."""
        if device == self.config.device:
            return self
        config = copy.copy(self.config)
        config.device = device
        return MatrixRun(config, config.numbers(), self.finite, self.run)

    def inputs(self, bucket: list[MatrixBlock]) -> list[Tensor]:
        """Return what ``update`` returns for a bucket, stacked, after writing the state per element."""
        config = self.config
        shape = (len(bucket), *bucket[0].kind.shape)
        stacks = [borrow(shape, config.compute, config.device) for _ in range(config.inputs)]
        self.element_pass("before", bucket, stacks)
        return stacks

    def directions(
        self,
        bucket: list[MatrixBlock],
        orthogonalize: Callable[[Tensor], Tensor] | None,
        inputs: list[Tensor],
        params: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a bucket's stacked directions and new matrix entries.

        Args:
            bucket: matrices of one shape.
            orthogonalize: the user's function, if any.
            inputs: what ``update`` has returned for them, stacked; the rule may overwrite it.
            params: the stacked parameters, if the blocks have no columns.
        """
        config = self.config
        given = self._given(bucket, params)
        if "orthogonalize" in config.rule.transform_takes:
            given["orthogonalize"] = orthogonalize
        # The rule chooses the dtype of its products; autocast must not change it. The meta device has none.
        kind = config.device.type
        with contextlib.nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False):
            return config.rule.transform(*inputs, **given)

    def element_pass(
        self,
        which: Pass,
        blocks: list[MatrixBlock],
        stacks: list[Tensor],
        slots: list[list[Tensor]] | None = None,
    ) -> None:
        """Run a pass over blocks, whose last columns are stacked, or given for each block as ``slots``."""
        config = self.config
        rows = []
        for at, block in enumerate(blocks):
            columns, own = (
                (block.columns, _numbers_of(config, block)) if which == "before" else (block.columns[:1], {})
            )
            corrections = block.columns[-1:] if which == "after" and config.storage.correction else []
            key = noise_key(config, block.member) if config.noisy else None
            last = slots[at] if slots else [stack[at].reshape(columns[0].shape) for stack in stacks]
            width = config.storage.block if which == "before" else None
            rows.append(Row([*columns, *last, *corrections], own, key, block.extent, block=width))
        plain = config.storage.block is None and config.storage.correction is None
        if (
            len(rows) > 1
            and rows[0].columns[0].numel() <= SMALL
            and not config.noisy
            and plain
            and _alike(rows)
        ):
            # Stacking small matrices takes less time than one pass for each.
            tensors = list(zip(*[row.columns for row in rows], strict=True))
            kept = len(tensors) - len(stacks)
            joined = [torch.stack(column) for column in tensors[:kept]]
            last = [stack.reshape(joined[0].shape) for stack in stacks]
            self.run(which, config, [Row([*joined, *last], rows[0].scalars)], self.numbers, self.finite)
            for at in range(2, kept) if which == "before" else (0,):
                torch._foreach_copy_(tensors[at], joined[at].unbind())
        else:
            self.run(which, config, rows, self.numbers, self.finite)

    def _given(self, bucket: list[MatrixBlock], params: Tensor | None) -> dict[str, Any]:
        """Return the arguments that the rule's ``transform`` names."""
        config = self.config
        takes = config.rule.transform_takes
        given = dict(config.transform_options)
        for numbers in (self.numbers, _own_scalars(bucket)):
            for name, number in numbers.items():
                if name in takes:
                    given[name] = number
        for name in bucket[0].kind.specs:
            entries = [block.entry(name) for block in bucket]
            stacked = torch.stack(entries) if len(entries) > 1 else entries[0].unsqueeze(0)
            given[name] = stacked if stacked.device == config.device else stacked.to(config.device)
        if "param" in takes:
            given["param"] = _stacked_params(config, bucket) if params is None else params
        if "grad_dtype" in takes:
            given["grad_dtype"] = config.grad_dtype
        if "key" in takes:
            given["key"], given["index"] = _keys(config, bucket), partial(_places, bucket, config.device)
        return given

    def finish(self, bucket: list[MatrixBlock], direction: Tensor, new: Mapping[str, Tensor]) -> None:
        """Apply a bucket's directions, and write its new entries."""
        if self.config.rule.retracts:
            before = _stacked_params(self.config, bucket)
            parts = self.narrowed(bucket, self.retracted(before, direction, new))
            for at, written in zip((0, -1), parts, strict=True):
                for block, value in zip(bucket, () if written is None else written.unbind(), strict=False):
                    home = block.columns[at]
                    store(home, value.reshape(home.shape), self.finite)
        else:
            self.element_pass("after", bucket, [direction])
        for name, values in new.items():
            for block, value in zip(bucket, values.unbind(), strict=True):
                home = block.entry(name)
                store(home, value.view(home.shape), self.finite)

    def retracted(self, before: Tensor, direction: Tensor, new: Mapping[str, Tensor]) -> Tensor:
        """Return whole parameters, stacked, after a step that brings them back onto the rule's set."""
        method = self.config.method if self.config.decays else None
        return self.config.rule.retract(descended(before, direction, self.numbers, method), before, new)

    def narrowed(self, bucket: list[MatrixBlock], after: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return stacked parameters in their dtype, and their corrections, if masters are kept."""
        keys = _keys(self.config, bucket) if self.config.noisy else None
        noise = ChunkNoise(keys, partial(_places, bucket, after.device))
        return narrowed(self.config, after, self.config.dtype, noise)


def _stacked_params(config: UpdateConfig, bucket: list[MatrixBlock]) -> Tensor:
    shape = bucket[0].kind.shape
    if config.storage.correction is not None:
        masters = [config.storage.join(each.columns[0], each.columns[-1], config.compute) for each in bucket]
        return torch.stack([master.reshape(shape) for master in masters])
    return torch.stack([block.columns[0].reshape(shape) for block in bucket]).to(config.compute).contiguous()


def _numbers_of(config: UpdateConfig, block: MatrixBlock) -> Mapping[str, Any]:
    """Return a row's own scalars: the parameter's, and 0-dim matrix entries that ``update`` names."""
    scalars = block.member.scalars
    for name, spec in block.kind.specs.items():
        if name in config.rule.takes and not spec.shape:
            value = block.entry(name)
            # On the CPU, a float is faster than a tensor and gives the same bits.
            known = value.device.type == "cpu" and not config.counts_on_device
            scalars = {**scalars, name: float(value) if known else value}
    return {name: value for name, value in scalars.items() if name in config.rule.takes} if scalars else {}


def _alike(rows: Sequence[Row]) -> bool:
    """Return whether rows have one shape and the same numbers, known to the host."""
    first = rows[0]
    if any(isinstance(value, Tensor) for row in rows for value in row.scalars.values()):
        return False
    shape = first.columns[0].shape
    return all(row.scalars == first.scalars and row.columns[0].shape == shape for row in rows)


def _own_scalars(bucket: list[MatrixBlock]) -> Mapping[str, Any]:
    """Return a bucket's own numbers; those on a device are stacked, one per matrix."""
    first = bucket[0].member
    if len(bucket) == 1 or not isinstance(first.step, Tensor):
        return first.scalars
    scalars: dict[str, Any] = dict(first.scalars)
    for name, value in scalars.items():
        if isinstance(value, Tensor):
            scalars[name] = torch.stack([torch.as_tensor(b.member.scalars[name]) for b in bucket])
    return scalars


def _keys(config: UpdateConfig, bucket: list[MatrixBlock]) -> Any:
    """Return the noise keys of all matrices: two words [batch, 1, ...]."""
    keys = [noise_key(config, block.member) for block in bucket]
    ones = [1] * len(bucket[0].kind.shape)
    columns = [torch.stack([torch.as_tensor(key[i], device=config.device) for key in keys]) for i in range(2)]
    return tuple(column.view(-1, *ones) for column in columns)


def _places(
    bucket: list[MatrixBlock], device: torch.device, rows: slice = _ALL, columns: slice = _ALL
) -> Tensor:
    """Return the place of each element of these rows and columns in its whole parameter.

    So noise does not depend on how parameters are cut.
    """
    shape = bucket[0].kind.shape
    if any(block.extent is not None for block in bucket):
        extents = [(block.extent or Extent.of(block.shape), block.shape) for block in bucket]
        whole = torch.stack(
            [extent.places(seen, device).to(torch.int64).reshape(shape) for extent, seen in extents]
        )
        return whole if len(shape) < 2 else whole[..., rows, columns]
    if len(shape) != 2:
        whole = torch.arange(math.prod(shape), device=device).view(1, *shape)
        return whole if len(shape) < 2 else whole[..., rows, columns]
    m, n = shape
    first = torch.arange(0, m * n, n, device=device)[rows, None]
    return (first + torch.arange(n, device=device)[columns]).unsqueeze(0)
