"""Step a layer: add its votes to the accumulator, and flip the weights whose counters reach the threshold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steepest.random import Key, uniform
from steepest.ternary.chunks import in_chunks, row_chunks
from steepest.ternary.packing import unpack
from steepest.ternary.planes import Kind, run_pass
from steepest.ternary.rows import WHOLE, Part
from steepest.ternary.top_k import flip_top_k
from steepest.ternary.vote_buffer import Outward

__all__ = ["flip_layer"]

# Stream of the noise of the pull toward zero.
_PULL = 0


def flip_layer(
    packed: Tensor,
    accumulator: Tensor,
    pending: Tensor,
    *,
    bits: int = 2,
    threshold: int,
    outward: Outward,
    zero_pull: float,
    at_most: int | None,
    key: Key,
    compiled: bool = False,
    part: Part = WHOLE,
) -> Tensor:
    """Add a layer's votes to its accumulator and flip, in place; return the number of flips, 0-dim int64.

    Args:
        packed: T, uint8 [out, bytes of a row].
        accumulator: a, int8 or int16 [out, in].
        pending: the sum of the step's votes, integers [out, in], with room for one more if there is a pull;
            destroyed. Sums beyond ±32767 saturate.
        bits: of a packed weight: 2, ternary, T ← clamp(T + sign(a), −1, 1); or 1, binary, T ← sign(a).
        threshold: flip where |a| is at least this.
        outward, zero_pull: see :class:`steepest.ternary.TernaryFlip`.
        at_most: the largest number of flips: the largest |a| first, ties at random. None: no limit. (A
            limit costs a host sync.)
        key: of the noise.
        compiled: run compiled graphs. Of a choice by ``at_most`` only the noise is compiled.
        part: which part of the layer the tensors are. ``at_most`` holds for the whole layer; the returned
            flips are the part's.
    """
    if pending.dtype not in (torch.int8, torch.int16):
        limit = torch.iinfo(torch.int16).max
        pending = pending.clamp(-limit, limit).to(torch.int16)
    if zero_pull > 0:
        rows, columns = pending.shape
        for block in row_chunks(rows, columns, packed.device):
            tensors = (pending[block], unpack(packed[block], columns))
            first = part.first + block.start * columns
            in_chunks(_add_pull, tensors, first, (*key, zero_pull), compiled=compiled)
    given: dict[str, Any] = {"bits": bits, "threshold": threshold, "compiled": compiled}

    def run(kind: Kind) -> Tensor:
        return run_pass(kind, packed, accumulator, pending, cancel=outward == "cancel", **given)

    if threshold > torch.iinfo(accumulator.dtype).max:
        return torch.zeros_like(run("accumulate"))
    if at_most is not None:
        reached = run("accumulate")
        if int(part.total(reached)) > at_most:
            given |= {"reached": int(reached), "at_most": at_most, "key": key, "part": part}
            return flip_top_k(packed, accumulator, **given)
        pending.zero_()
    return run("flip")


def _add_pull(tensors: tuple[Tensor, ...], first: int, word: int, other: int, chance: float) -> None:
    """Vote toward 0 with probability ``chance``."""
    pending, values = tensors
    u = uniform((word, other), torch.arange(values.numel(), device=values.device) + first, _PULL)
    # On a CPU torch.where and masked_fill of integers take ten times as long as arithmetic: the mask is
    # multiplied. Through floats, which Inductor vectorizes.
    pending -= (values * (u < chance).to(u.dtype)).to(values.dtype)
