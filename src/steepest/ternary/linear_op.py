"""Compute y = x (s∘T)ᵀ as one operator, whose backward turns the gradient of T into votes at once.

It is a torch.library custom operator, not an autograd.Function, so that compiled graphs keep it whole.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from steepest.ternary.chunks import row_blocks
from steepest.ternary.packing import unpack_into
from steepest.ternary.vote_buffer import find_vote_buffer, inverse_rms, sum_of_squares

__all__ = ["scale_dims", "spread", "summed", "ternary_linear"]


def scale_dims(scale: Tensor) -> int:
    """Return how many indices a weight's scale has: 0 (there is a single one), 1 (row), 2 (row, group)."""
    return 2 if scale.dim() == 2 else int(scale.numel() > 1)


def spread(scale: Tensor, rows: slice, columns: int, group_size: int) -> Tensor:
    """Expand the scales of some rows so that they broadcast over them: [rows or 1, columns or 1]."""
    dims = scale_dims(scale)
    if dims == 0:
        return scale.view(1, 1)
    if dims == 1:
        return scale[rows, None]
    return scale[rows].repeat_interleave(group_size, dim=1)[:, :columns]


def summed(matrix: Tensor, dims: int, group_size: int) -> Tensor:
    """Sum the elements that share a scale in some rows: 0-dim, [rows] or [rows, groups]."""
    if dims == 0:
        return matrix.sum()
    if dims == 1:
        return matrix.sum(1)
    padded = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % group_size))
    return padded.view(matrix.shape[0], -1, group_size).sum(2)


@torch.library.custom_op("steepest::ternary_linear", mutates_args=())
def ternary_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    columns: int,
    group_size: int,
    vote_buffer: Tensor | None,
    bits: int = 2,
    votes: Tensor | None = None,
) -> Tensor:
    """Multiply x [..., columns] by (s∘T)ᵀ: [..., out] of x's dtype.

    ``packed`` is T, ``scale`` s: [1], [out] or [out, groups]. Backward adds votes to the buffer with the
    handle ``vote_buffer``; None: T does not train. ``votes`` is the parameter that stands for T.
    """
    with torch.autocast(x.device.type, enabled=False):
        flat = x.reshape(-1, columns)
        y = x.new_empty(flat.shape[0], packed.shape[0])
        scale = scale.to(x.dtype)
        blocks = row_blocks(packed.shape[0], columns, x.device, len(flat))
        # One block for all of them to use in turn: new memory costs more than filling it.
        workspace = x.new_empty(blocks[0].stop, columns)
        for rows in blocks:
            weight = unpack_into(workspace[: rows.stop - rows.start], packed[rows], bits)
            factor = spread(scale, rows, columns, group_size)
            if scale.dim() == 2:
                torch.mm(flat, weight.mul_(factor).t(), out=y[:, rows])
            else:
                # One scale a row: cheaper to apply to the outputs.
                torch.mm(flat, weight.t(), out=y[:, rows])
                y[:, rows] *= factor.view(1, -1)
        return y.view(*x.shape[:-1], packed.shape[0])


@ternary_linear.register_fake
def _(x: Tensor, packed: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


# Tagged as impure, so that graphs do not drop it: its votes are a side effect. (Two uses that are alike in
# everything, gradients included, are still merged by common subexpression elimination. Declaring the vote
# buffer as mutated would forbid two forward passes before the first backward.)
@torch.library.custom_op(
    "steepest::ternary_linear_backward", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
def _backward(
    dy: Tensor,
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    columns: int,
    group_size: int,
    handle: Tensor | None,
    bits: int,
    needs_x: bool,
    needs_scale: bool,
    votes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute (dx, ds, the gradient of ``votes``), empty where not needed."""
    # An empty batch does not vote, and so brings no pull toward zero either.
    vote_buffer = find_vote_buffer(handle) if x.numel() > 0 else None
    locked = contextlib.nullcontext() if vote_buffer is None else vote_buffer.lock
    with torch.autocast(x.device.type, enabled=False), locked:
        flat, dy = x.reshape(-1, columns), dy.reshape(-1, packed.shape[0])
        wide = torch.promote_types(x.dtype, torch.float32)
        dx = x.new_empty(flat.shape if needs_x else 0)
        ds = x.new_zeros(scale.shape if needs_scale else 0, dtype=wide)
        needs_grad = needs_scale or vote_buffer is not None
        if vote_buffer is not None:
            vote_buffer.begin_pass((packed.shape[0], columns), x.device)
        magnitudes = vote_buffer is not None and vote_buffer.kind == "magnitude"
        blocks = row_blocks(packed.shape[0], columns, x.device, len(flat), whole=magnitudes)
        weights = x.new_empty(blocks[0].stop, columns)
        grads = x.new_empty(blocks[0].stop if needs_grad else 0, columns)

        def factor_of(rows: slice) -> Tensor:
            return spread(scale.to(wide), rows, columns, group_size)

        def grad_of(rows: slice) -> Tensor:
            """Return dT without its factor s."""
            return torch.mm(dy[:, rows].t(), flat, out=grads[: rows.stop - rows.start]).to(wide)

        inverse = None
        if magnitudes and len(blocks) > 1:
            # dT never exists as a whole, so it is computed twice.
            square = x.new_zeros((), dtype=torch.float64)
            for rows in blocks:
                square += sum_of_squares(grad_of(rows).mul_(factor_of(rows)))
            inverse = inverse_rms(square, dy.shape[1] * columns)
        for rows in blocks:
            weight = unpack_into(weights[: rows.stop - rows.start], packed[rows], bits)
            factor = factor_of(rows)
            if needs_x:
                left, right, s = dy[:, rows], weight, factor.to(x.dtype)
                if s.shape[1] == 1:
                    left = left * s.view(1, -1)
                else:
                    right = right * s
                # The first block overwrites dx.
                dx.addmm_(left, right, beta=int(rows.start > 0))
            if needs_grad:
                grad = grad_of(rows)
                if needs_scale:
                    dims = scale_dims(scale)
                    part = ds[rows] if dims > 0 else ds
                    part += summed(grad * weight, dims, group_size)
                if vote_buffer is not None:
                    grad.mul_(factor)
                    if magnitudes and len(blocks) == 1:
                        inverse = inverse_rms(sum_of_squares(grad), grad.numel())
                    vote_buffer.add(rows.start, grad, weight, inverse)
        told = x.new_empty(0) if votes is None else torch.zeros_like(votes)
        if vote_buffer is not None and (finite := vote_buffer.watched()) is not None:
            told.masked_fill_(~finite, math.nan)
        return dx.view(x.shape) if needs_x else dx, ds.to(scale.dtype), told


@_backward.register_fake
def _(dy: Tensor, x: Tensor, packed: Tensor, scale: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, needs_x, needs_scale, votes = given
    told = x.new_empty(0) if votes is None else torch.empty_like(votes)
    return x.new_empty(x.shape if needs_x else 0), scale.new_empty(scale.shape if needs_scale else 0), told


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scale, *ctx.given, votes = inputs
    ctx.save_for_backward(x, packed, scale, votes)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    *saved, votes = ctx.saved_tensors
    needs_x, _, needs_scale, *_, needs_votes = ctx.needs_input_grad
    votes = votes if needs_votes else None
    dx, ds, told = _backward(dy, *saved, *ctx.given, needs_x, needs_scale, votes)
    given = dx if needs_x else None, None, ds if needs_scale else None
    return *given, None, None, None, None, told if needs_votes else None


ternary_linear.register_autograd(_gradients, setup_context=_save)
