"""How the state per element is stored: as floats or as codes, and with a master weight or not.

No rule knows of it: the engine decodes before ``update`` and encodes after it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steepest.distributed.layout import layout_of
from steepest.distributed.local import is_dtensor
from steepest.formats import int8
from steepest.formats.blocks import block_size, scale_shape
from steepest.formats.int8 import Range
from steepest.formats.master import CORRECTIONS, join, part
from steepest.hyperparameters import is_int8
from steepest.rule import Group, Rule
from steepest.views import View, is_transposed

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement

__all__ = ["CORRECTION", "SCALE", "Storage", "block_of", "storage_of"]

SCALE = "_scale"
CORRECTION = "correction"

# Streams of the noise of encoding, apart from those that rules use and that of rounding.
_FIRST_STREAM = 8


@dataclass(frozen=True)
class Storage:
    """The formats of the state per element of one batch.

    Attributes:
        floats: the names of entries stored as floats or as the rule's integers.
        block: elements that share a scale; None if nothing is coded.
        ranges: those of the entries stored as codes, by name.
        correction: the dtype of what a parameter's dtype drops, if that is kept.
    """

    floats: tuple[str, ...]
    block: int | None = None
    ranges: tuple[tuple[str, Range], ...] = ()
    correction: torch.dtype | None = None

    @cached_property
    def coded(self) -> tuple[str, ...]:
        """The names of codes, then of their scales."""
        codes = [name for name, _ in self.ranges]
        return (*codes, *(name + SCALE for name in codes))

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The names of all entries, as :func:`~steepest.engine.update.element_pass` takes them."""
        return (*self.floats, *self.coded, *([CORRECTION] if self.correction else []))

    @cached_property
    def beside(self) -> tuple[str, ...]:
        """The names of scales and the correction, which no rule asks for."""
        return self.columns[len(self.floats) + len(self.ranges) :]

    def shape_of(self, name: str, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of an entry of a parameter, or of a shard of one."""
        if self.block is not None and name in self.beside and name != CORRECTION:
            return scale_shape(shape, self.block)
        return tuple(shape)

    def widths(self, count: int) -> tuple[int, ...] | None:
        """Return for each of a pass's columns how many of its elements a block has; None without blocks."""
        if self.block is None:
            return None
        scales = {name + SCALE for name, _ in self.ranges}
        state = [1 if name in scales else self.block for name in self.columns]
        return (self.block, self.block, *state, *[self.block] * (count - 2 - len(state)))

    @property
    def noisy(self) -> bool:
        """Whether encoding draws noise."""
        return any(each != "signed" for _, each in self.ranges)

    def make(self, name: str, like: Tensor) -> Tensor:
        """Return a code, scale or correction before the first step, for a parameter or its local shard."""
        if name == CORRECTION:
            return torch.zeros_like(like, dtype=self.correction, requires_grad=False)
        assert self.block is not None
        if name.endswith(SCALE):
            return torch.zeros(scale_shape(like.shape, self.block), dtype=torch.float32, device=like.device)
        return torch.zeros(like.shape, dtype=int8.DTYPES[dict(self.ranges)[name]], device=like.device)

    def decode(self, state: Mapping[str, Tensor], wide: torch.dtype) -> dict[str, Tensor]:
        """Return the coded entries as numbers in a dtype, of the codes' shape."""
        numbers: dict[str, Tensor] = {}
        for name, _ in self.ranges:
            codes, scale = state[name], state[name + SCALE]
            number = int8.decode(_in_blocks(codes, scale, self.block), scale)
            numbers[name] = number.view(codes.shape).to(wide)
        return numbers

    def encode(
        self, state: Mapping[str, Tensor], numbers: Mapping[str, Tensor], noise: Any
    ) -> dict[str, Tensor]:
        """Return new codes and scales of the entries that have new numbers.

        Args:
            state: the present ones.
            numbers: by name.
            noise: gives the uniform noise of a stream.
        """
        new = {}
        for stream, (name, kind) in enumerate(self.ranges, _FIRST_STREAM):
            if name not in numbers:
                continue
            scale = state[name + SCALE]
            rows = _in_blocks(numbers[name].to(torch.float32), scale, self.block)
            u = None if kind == "signed" else noise(stream).reshape(rows.shape)
            encode = int8.encode_nonnegative if kind == "nonnegative" else int8.encode_signed
            codes, new[name + SCALE] = encode(rows, u)
            new[name] = codes.view(state[name].shape)
        return new

    def join(self, param: Tensor, correction: Tensor, wide: torch.dtype) -> Tensor:
        """Return master weights."""
        return join(param, correction).to(wide)

    def part(self, value: Tensor, dtype: torch.dtype, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return parameters and corrections; ``noise`` is that of stochastic rounding, if any."""
        assert self.correction is not None
        return part(value.to(torch.float32), dtype, self.correction, noise)


def _in_blocks(values: Tensor, scale: Tensor, block: int | None) -> Tensor:
    assert block is not None
    return values.reshape(*scale.shape, block)


def storage_of(
    rule: Rule, group: Group, param: Tensor, view: View | None, stored: Mapping[str, torch.dtype]
) -> Storage:
    """Return the storage of a parameter's state.

    What is stored already stays as it is: an option that was changed after the first step changes nothing.

    Args:
        rule, group: the parameter's.
        param: the parameter, real or complex; for a DTensor the DTensor, not its local shard.
        view: the parameter's, if it is a fused one.
        stored: the dtypes of the entries that there are, by name.

    Raises:
        ValueError: the parameter has codes whose blocks are not whole now. The message continues a sentence.
    """
    specs = rule.state_specs(group)
    names = sorted(name for name, spec in specs.items() if spec.per == "element")
    averages = [(name, kind) for name in names if (kind := specs[name].coded) is not None]
    codes = is_int8(group["state_dtype"])
    if there := [name for name, _ in averages if name in stored]:
        codes = any(name + SCALE in stored for name in there)
    block = block_of(param, view) if codes and averages else None
    if there and codes and block is None:
        raise ValueError(
            "its averages are stored as one-byte codes, and its view or layout, changed after a step, cuts "
            "their blocks: load a state dict, which converts them. Nothing was stepped"
        )
    if block is None:
        averages = []
    width: torch.dtype | None = None
    if param.dtype in (torch.bfloat16, torch.float16) and not rule.moves:
        width = stored.get(CORRECTION) or (CORRECTIONS[group["master"]] if group["master"] else None)
    floats = tuple(name for name in names if name not in dict(averages))
    return Storage(floats, block, tuple(averages), width)


def block_of(param: Tensor, view: View | None) -> int | None:
    """Return how many elements of a parameter's averages share a scale; None if they are not coded."""
    if view is not None and (view[0] != "rows" or is_transposed(view)):
        return None  # it does not leave the blocks in their rows
    shape = (*param.shape, 2) if param.is_complex() else tuple(param.shape)
    block = block_size(shape)
    if block is not None and is_dtensor(param):
        mesh = tuple(param.device_mesh.shape)
        return block if _shards_keep(block, shape, mesh, tuple(param.placements)) else None
    return block


@functools.lru_cache(maxsize=4096)
def _shards_keep(
    block: int, shape: tuple[int, ...], mesh: tuple[int, ...], placements: tuple[Placement, ...]
) -> bool:
    """Return whether every shard holds whole blocks, and the same shard of the scales belongs to them.

    All processes of the mesh are checked, because all must store the state in one format.
    """
    codes = layout_of(shape, mesh, placements)
    if any(codes.mesh_dims[2:]):
        return False
    if not codes.mesh_dims[1]:
        return True
    try:
        scales = layout_of(scale_shape(shape, block), mesh, placements)
    except ValueError:
        return False
    below = math.prod(shape[2:])
    return all(
        (run.start * below, run.stop * below) == (own.start * block, own.stop * block)
        for run, own in zip(codes.intervals[1].values(), scales.intervals[1].values(), strict=True)
    )
