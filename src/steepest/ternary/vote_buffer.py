"""Hold a layer's votes between backward and step, and key the noise that rounds them."""

from __future__ import annotations

import itertools
import threading
import weakref
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from steepest.compile.available import wants_compiling
from steepest.random import Key, derive_key
from steepest.rule import find_rule
from steepest.ternary.chunks import are_finite, in_chunks, indices
from steepest.ternary.ranks import Group, rank_and_world_size
from steepest.ternary.votes import LARGEST_VOTE, magnitude_votes, sign_votes, without_outward

__all__ = [
    "Outward",
    "VoteBuffer",
    "VoteKind",
    "find_vote_buffer",
    "inverse_rms",
    "narrowest",
    "noise_id",
    "sum_of_squares",
]

VoteKind = Literal["sign", "magnitude"]
Outward = Literal["drop", "cancel"]

_numbers = itertools.count(1)
# Backward finds a buffer by its number, from within compiled graphs too. Only the trainer keeps it alive.
_vote_buffers: weakref.WeakValueDictionary[int, VoteBuffer] = weakref.WeakValueDictionary()


def narrowest(largest: int) -> torch.dtype:
    """Return the smallest integer dtype that holds −largest ... largest.

    >>> narrowest(127), narrowest(128)
    (torch.int8, torch.int16)
    """
    return next(d for d in (torch.int8, torch.int16, torch.int32) if largest <= torch.iinfo(d).max)


def noise_id(name: str) -> int:
    """Hash a layer's name for the key of its noise, which then does not depend on the other layers.

    >>> noise_id("encoder.0") != noise_id("decoder.0")
    True
    """
    return zlib.crc32(name.encode())


@dataclass(eq=False)
class VoteBuffer:
    """The votes of one layer in one step.

    Attributes:
        options: the param group, which may change between steps: it is read at the step's first vote.
        noise_id: of the layer, see :func:`noise_id`.
        weights: of all the trainer's layers, see :func:`steepest.compile.available.wants_compiling`.
        step: the steps taken so far.
        group: the ranks whose votes are summed.
        pending: the sum of the votes, int8 [out, in], wider once they need it; None before the first.
        passes: how many backward passes have voted.
        finite: 0-dim bool: whether all their gradients were finite; None before the first vote.
        kind, outward, seed: of the step's votes.
        handle: a tensor that holds the buffer's number and stands for it in graphs.
        lock: held while a pass votes, since torch runs backward passes of several threads at once.
    """

    options: Mapping[str, Any]
    noise_id: int
    weights: int = 0
    step: int = 0
    group: Group = None
    pending: Tensor | None = None
    passes: int = 0
    finite: Tensor | None = None
    kind: VoteKind = field(init=False)
    outward: Outward = field(init=False)
    seed: int = field(init=False)
    handle: Tensor = field(init=False)
    lock: threading.Lock = field(init=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._read_options()
        number = next(_numbers)
        self.handle = torch.tensor(float(number), dtype=torch.float64, device="cpu")
        _vote_buffers[number] = self

    def _read_options(self) -> None:
        options = self.options
        self.kind, self.outward, self.seed = options["votes"], options["outward"], options["seed"]

    def is_compiled(self, device: torch.device) -> bool:
        """Tell whether rounding and flips are compiled, by the present options and device."""
        return wants_compiling(self.options["compile"], self.weights, device)

    def clear(self) -> None:
        """Drop the votes of this step."""
        self.pending, self.passes, self.finite = None, 0, None

    def watched(self) -> Tensor | None:
        """Whether all gradients of this step's votes were finite; None if nobody asks."""
        return None if self.options["nonfinite"] == "ignore" else self.finite

    def begin_pass(self, shape: tuple[int, int], device: torch.device) -> None:
        """Make room for the votes of one more backward pass.

        Raises:
            ValueError: an option was changed to an invalid value; nothing was changed.
        """
        if self.passes == 0:
            find_rule(self.options["rule"]).check("TernaryFlip", self.options)
            self._read_options()
        self.passes += 1
        dtype = narrowest(self.passes * LARGEST_VOTE[self.kind])
        if self.pending is None:
            self.pending = torch.zeros(shape, dtype=dtype, device=device)
        else:
            self.pending = self.pending.to(device, dtype)

    def add(self, first: int, grad: Tensor, values: Tensor, inverse_rms: Tensor | None) -> None:
        """Add the votes of the rows from ``first`` on, where ``grad`` is dT and ``values`` is T.

        Votes by magnitude need ``inverse_rms``, of the whole layer's dT.
        """
        assert self.pending is not None
        # Read at the step, and only if an option asks for it.
        finite = are_finite(grad)
        self.finite = finite if self.finite is None else self.finite.to(finite.device) & finite
        pending = self.pending[first : first + grad.shape[0]]
        noise = (inverse_rms, *self._key()) if self.kind == "magnitude" else ()
        compiled = self.kind == "magnitude" and self.is_compiled(grad.device)
        arguments = (self.outward == "drop", *noise)
        in_chunks(_add, (pending, grad, values), first * grad.shape[1], arguments, compiled=compiled)

    def _key(self) -> Key:
        # Passes are numbered across ranks, so that N ranks draw what one process with all their passes draws.
        rank, world_size = rank_and_world_size(self.group)
        return derive_key(self.seed, self.noise_id, self.step, (self.passes - 1) * world_size + rank)


def _add(tensors: tuple[Tensor, ...], first: int, drop: bool, *noise: Any) -> None:
    pending, grad, values = tensors
    if noise:
        inverse_rms, *key = noise
        votes = magnitude_votes(grad, inverse_rms, (key[0], key[1]), indices(grad, first))
    else:
        votes = sign_votes(grad)
    pending += without_outward(votes, values.to(torch.int8)) if drop else votes


def sum_of_squares(grad: Tensor) -> Tensor:
    """Return Σ dT² of contiguous elements, 0-dim float64, even where float32 squares over- or underflow.

    >>> sum_of_squares(torch.tensor([3e25, 4e25])), sum_of_squares(torch.tensor([3e-25, 4e-25]))
    (tensor(2.5000e+51, dtype=torch.float64), tensor(2.5000e-49, dtype=torch.float64))
    """
    total = torch.zeros((), dtype=torch.float64, device=grad.device)
    in_chunks(_add_squares, (grad,), 0, (total,), compiled=False)
    return total


def _add_squares(tensors: tuple[Tensor, ...], first: int, total: Tensor) -> None:
    (grad,) = tensors
    # Scaled by a power of two near the largest element, which is exact.
    low, high = torch.aminmax(grad)
    _, exponent = torch.frexp(torch.maximum(-low, high).to(torch.float64))
    unit = torch.exp2(exponent.to(torch.float64))
    scaled = grad * unit.reciprocal()
    total += torch.dot(scaled, scaled).to(torch.float64) * unit.square()


def inverse_rms(square: Tensor, count: int) -> Tensor:
    """Return 1/rms from the sum of squares; 0 where the rms is 0, not finite, or too small for float32."""
    rms = (square / max(count, 1)).sqrt()
    inverse = rms.reciprocal()
    usable = (rms > 0) & rms.isfinite() & (inverse <= torch.finfo(torch.float32).max)
    return torch.where(usable, inverse, 0.0)


def find_vote_buffer(handle: Tensor | None) -> VoteBuffer | None:
    """Find the buffer that a handle stands for; None without a handle, or if the trainer is gone."""
    return None if handle is None else _vote_buffers.get(int(handle))
