"""A layer's step: votes go into the accumulator, and where it is full the weight moves by one."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from steepest.random import Key, uniform
from steepest.ternary.chunks import in_pieces, places, row_pieces
from steepest.ternary.packing import unpack
from steepest.ternary.planes import run_pass
from steepest.ternary.top_k import flip_first
from steepest.ternary.vote_buffer import Outward

__all__ = ["flip_layer", "pull"]

# The stream of the step's noise.
_PULL = 0


# Where and masked_fill on integers take ten times as long as arithmetic on a CPU: masks are multiplied.


def pull(values: Tensor, chance: float, u: Tensor) -> Tensor:
    """One vote toward 0 with probability ``chance``, where u, uniform in [0, 1), is below it.

    >>> values = torch.tensor([1, -1, 0, 1], dtype=torch.int8)
    >>> pull(values, 0.5, torch.tensor([0.1, 0.1, 0.1, 0.9])).tolist()
    [-1, 1, 0, 0]
    """
    # By way of floats, of which torch's compiler makes vector code.
    return -(values * (u < chance).to(u.dtype)).to(values.dtype)


def _pull_in(tensors: tuple[Tensor, ...], first: int, word: int, other: int, chance: float) -> None:
    pending, values = tensors
    pending += pull(values, chance, uniform((word, other), places(values, first), _PULL))


def flip_layer(
    packed: Tensor,
    accumulator: Tensor,
    pending: Tensor,
    *,
    threshold: int,
    outward: Outward,
    zero_pull: float,
    at_most: int | None,
    key: Key,
    compiled: bool = False,
) -> Tensor:
    """Take a layer's votes in and flip, in place; the number of flips, 0-dim int64.

    Args:
        packed: T, uint8 [out, ⌈in/4⌉].
        accumulator: a, int8 or int16 [out, in].
        pending: the sum of the step's votes, integers [out, in], with room for one more if there is a pull;
            what is left in it means nothing. Beyond ±32767 it saturates.
        threshold: flip where |a| is at least this.
        outward: ``"cancel"``: at a bound, a stops at 0 where it would point outward.
        zero_pull: probability of a vote toward 0.
        at_most: flip no more than this many: the largest |a| first, ties by lot. None: no bound. (Counting
            them waits for the device.)
        key: of the noise.
        compiled: by graphs, but for a choice among too many, of which the lots alone are.
    """
    if pending.dtype not in (torch.int8, torch.int16):
        limit = torch.iinfo(torch.int16).max
        pending = pending.clamp(-limit, limit).to(torch.int16)
    if zero_pull > 0:
        _pull_all(packed, pending, zero_pull, key, compiled)
    run = functools.partial(run_pass, threshold=threshold, cancel=outward == "cancel", compiled=compiled)
    out_of_reach = threshold > torch.iinfo(accumulator.dtype).max
    if at_most is None and not out_of_reach:
        return run("flip", packed, accumulator, pending)
    count = run("collect", packed, accumulator, pending)
    if out_of_reach:
        return torch.zeros_like(count)
    assert at_most is not None
    if (reached := int(count)) <= at_most:
        return run("flip", packed, accumulator, pending.zero_())
    return flip_first(
        packed,
        accumulator,
        threshold=threshold,
        reached=reached,
        at_most=at_most,
        key=key,
        compiled=compiled,
    )


def _pull_all(packed: Tensor, pending: Tensor, chance: float, key: Key, compiled: bool) -> None:
    """Add the votes toward 0."""
    rows, columns = pending.shape
    for part in row_pieces(rows, columns, packed.device):
        tensors = (pending[part], unpack(packed[part], columns))
        in_pieces(_pull_in, tensors, part.start * columns, (*key, chance), compiled=compiled)
