"""Hold a layer's votes between backward and step, and key the noise that rounds them."""

from __future__ import annotations

import itertools
import threading
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from steepest.compile.available import wants_compiling
from steepest.random import derive_key
from steepest.rule import find_rule
from steepest.ternary.chunks import are_finite, in_chunks, row_chunks
from steepest.ternary.ranks import Group, rank_and_world_size
from steepest.ternary.votes import LARGEST_VOTE, magnitude_votes, sign_votes, without_outward

__all__ = [
    "NOBODY",
    "Outward",
    "VoteBuffer",
    "find_vote_buffer",
    "inverse_rms",
    "narrowest",
    "sum_of_squares",
]

Outward = Literal["drop", "cancel"]

# The handle of layers that train and have no trainer.
NOBODY = torch.zeros((), dtype=torch.float64, device="cpu")
_told = False
_numbers = itertools.count(1)
# Backward finds a buffer by its number, from within compiled graphs too. Only the trainer keeps it alive.
_vote_buffers: weakref.WeakValueDictionary[int, VoteBuffer] = weakref.WeakValueDictionary()


def narrowest(largest: int) -> torch.dtype:
    """Return the smallest integer dtype that holds −largest ... largest."""
    return next(d for d in (torch.int8, torch.int16, torch.int32) if largest <= torch.iinfo(d).max)


@dataclass(eq=False)
class VoteBuffer:
    """The votes of one layer in one step."""

    # The param group, which may change between steps: it is read at the step's first vote.
    options: Mapping[str, Any]
    noise_id: int
    # Of all the trainer's layers, which share compiled graphs.
    weights: int
    # The steps taken so far.
    step: int
    # The ranks whose votes are summed.
    group: Group
    # The sum of the votes, int8 [out, in], wider once they need it.
    pending: Tensor | None = None
    # How many backward passes have voted, and whether all their gradients were finite, 0-dim bool.
    passes: int = 0
    finite: Tensor | None = None

    def __post_init__(self) -> None:
        self._given = dict(self.options)
        # Held while a pass votes, since torch runs backward passes of several threads at once.
        self.lock = threading.Lock()
        number = next(_numbers)
        # Stands for the buffer in graphs.
        self.handle = torch.tensor(float(number), dtype=torch.float64, device="cpu")
        _vote_buffers[number] = self

    @property
    def kind(self) -> str:
        """Of the step's votes."""
        return str(self._given["votes"])

    def is_compiled(self, device: torch.device) -> bool:
        """Tell whether rounding and flips are compiled at present."""
        return wants_compiling(self.options["compile"], self.weights, device)

    def clear(self) -> None:
        """Drop the votes of this step."""
        self.pending, self.passes, self.finite = None, 0, None

    def watched(self) -> Tensor | None:
        """Return whether all gradients of this step's votes were finite; None if not checked."""
        return None if self.options["nonfinite"] == "ignore" else self.finite

    def begin_pass(self, shape: tuple[int, int], device: torch.device) -> None:
        """Check the options, and make room for the votes of one more backward pass."""
        if self.passes == 0:
            find_rule(self.options["rule"]).check("TernaryFlip", self.options)
            self._given = dict(self.options)
        self.passes += 1
        dtype = narrowest(self.passes * LARGEST_VOTE[self.kind])
        if self.pending is None:
            self.pending = torch.zeros(shape, dtype=dtype, device=device)
        else:
            self.pending = self.pending.to(device, dtype)

    def add(self, first: int, grad: Tensor, values: Tensor, inverse_rms: Tensor | None) -> None:
        """Add votes for the rows from ``first`` on, from dT (``grad``) and T (``values``) there."""
        assert self.pending is not None
        # Read at the step, and only if an option asks for it.
        finite = are_finite(grad)
        self.finite = finite if self.finite is None else self.finite.to(finite.device) & finite
        noise: tuple[Any, ...] = ()
        if self.kind == "magnitude":
            # Passes are numbered across ranks, so N ranks draw what one process with all their passes draws.
            rank, world_size = rank_and_world_size(self.group)
            index = (self.passes - 1) * world_size + rank
            noise = (inverse_rms, *derive_key(self._given["seed"], self.noise_id, self.step, index))
        tensors = (self.pending[first : first + grad.shape[0]], grad, values)
        arguments = (self._given["outward"] == "drop", *noise)
        compiled = bool(noise) and self.is_compiled(grad.device)
        in_chunks(_add, tensors, first * grad.shape[1], arguments, compiled=compiled)


def _add(tensors: tuple[Tensor, ...], first: int, drop: bool, *noise: Any) -> None:
    pending, grad, values = tensors
    if noise:
        inverse_rms, word, other = noise
        index = torch.arange(grad.numel(), device=grad.device) + first
        votes = magnitude_votes(grad, inverse_rms, (word, other), index)
    else:
        votes = sign_votes(grad)
    pending += without_outward(votes, values.to(torch.int8)) if drop else votes


def sum_of_squares(grad: Tensor) -> Tensor:
    """Return Σ dT² of contiguous elements, 0-dim float64, even where float32 squares over- or underflow.

    >>> sum_of_squares(torch.tensor([3e25, 4e25])), sum_of_squares(torch.tensor([3e-25, 4e-25]))
    (tensor(2.5000e+51, dtype=torch.float64), tensor(2.5000e-49, dtype=torch.float64))
    """
    total = torch.zeros((), dtype=torch.float64, device=grad.device)
    for part in row_chunks(grad.numel(), 1, grad.device):
        chunk = grad.view(-1)[part]
        # Scaled by a power of two near the largest element, which is exact.
        low, high = torch.aminmax(chunk)
        _, exponent = torch.frexp(torch.maximum(-low, high).to(torch.float64))
        unit = torch.exp2(exponent.to(torch.float64))
        chunk = chunk * unit.reciprocal()
        total += torch.dot(chunk, chunk).to(torch.float64) * unit.square()
    return total


def inverse_rms(square: Tensor, count: int) -> Tensor:
    """Return 1/rms from the sum of squares; 0 where the rms is 0, not finite, or too small for float32."""
    rms = (square / max(count, 1)).sqrt()
    inverse = rms.reciprocal()
    usable = (rms > 0) & rms.isfinite() & (inverse <= torch.finfo(torch.float32).max)
    return torch.where(usable, inverse, 0.0)


def find_vote_buffer(handle: Tensor | None) -> VoteBuffer | None:
    """Find the buffer that a handle stands for; None without a handle, or if nobody takes the votes."""
    global _told
    if handle is None:
        return None
    found = _vote_buffers.get(int(handle))
    if found is None and not _told:
        _told = True
        warnings.warn(
            "backward passes run through ternary or binary layers in training mode, but no optimizer takes "
            "their votes: their scales and biases train, their weights do not. steepest.build(model, ...) "
            "makes an optimizer that moves them, and steepest.ternary.TernaryFlip(model) one to use beside "
            "another. If you want to keep the weights, freeze them: layer.votes.requires_grad_(False)",
            UserWarning,
            stacklevel=2,
        )
    return found
