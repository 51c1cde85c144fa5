"""Where a layer's votes wait between backward and step, and what the noise of their rounding is keyed by."""

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
from steepest.ternary.chunks import in_pieces, places
from steepest.ternary.options import checked
from steepest.ternary.ranks import Group, place
from steepest.ternary.votes import LARGEST_VOTE, magnitude_votes, sign_votes, without_outward

__all__ = [
    "Outward",
    "VoteBuffer",
    "VoteKind",
    "find_vote_buffer",
    "inverse_rms",
    "narrowest",
    "number_of",
    "sum_of_squares",
]

VoteKind = Literal["sign", "magnitude"]
Outward = Literal["drop", "cancel"]

_numbers = itertools.count(1)
# Backward finds a vote_buffer by its number, through a compiled graph too. The trainer alone keeps it alive.
_vote_buffers: weakref.WeakValueDictionary[int, VoteBuffer] = weakref.WeakValueDictionary()


def narrowest(largest: int) -> torch.dtype:
    """The smallest integer dtype that holds −largest ... largest.

    >>> narrowest(127), narrowest(128)
    (torch.int8, torch.int16)
    """
    return next(d for d in (torch.int8, torch.int16, torch.int32) if largest <= torch.iinfo(d).max)


def number_of(name: str) -> int:
    """A layer's name as a word of the noise's key: what other layers a trainer has does not matter.

    >>> number_of("encoder.0") != number_of("decoder.0")
    True
    """
    return zlib.crc32(name.encode())


@dataclass(eq=False)
class VoteBuffer:
    """The votes of one layer in one step.

    Attributes:
        options: the trainer's, which may change between steps: those of a step are read at its first vote.
        name: the layer's number for the noise's key, see :func:`number_of`.
        weights: of all the trainer's layers, see :func:`steepest.compile.available.wants_compiling`.
        step: the steps taken so far, likewise.
        group: the workers whose votes are summed, see :func:`steepest.ternary.ranks.place`.
        pending: the sum of the votes, int8 [out, in], wider once it would not hold them; None before the
            first.
        casts: how many backward passes have voted.
        finite: 0-dim bool: whether all their gradients were; None before the first vote.
        kind, outward, seed: of the step's votes.
        handle: a tensor with the vote_buffer's number, which stands for it in graphs. It requires a gradient:
            so backward comes by for T, if for nothing else.
        lock: held while a pass votes: torch allows backward passes in several threads at once.
    """

    options: Mapping[str, Any]
    name: int
    weights: int = 0
    step: int = 0
    group: Group = None
    pending: Tensor | None = None
    casts: int = 0
    finite: Tensor | None = None
    kind: VoteKind = field(init=False)
    outward: Outward = field(init=False)
    seed: int = field(init=False)
    handle: Tensor = field(init=False)
    lock: threading.Lock = field(init=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._read_options()
        number = next(_numbers)
        self.handle = torch.tensor(float(number), dtype=torch.float64, device="cpu", requires_grad=True)
        _vote_buffers[number] = self

    def _read_options(self) -> None:
        found = {name: self.options[name] for name in ("votes", "outward", "seed")}
        self.kind, self.outward, self.seed = found["votes"], found["outward"], found["seed"]

    def is_compiled(self, device: torch.device) -> bool:
        """Whether, by the options and for the device as they are now, rounding and flips are."""
        return wants_compiling(self.options["compile"], self.weights, device)

    def clear(self) -> None:
        """Forget the votes of this step."""
        self.pending, self.casts, self.finite = None, 0, None

    def open(self, shape: tuple[int, int], device: torch.device) -> None:
        """Make room for the votes of one more backward pass.

        Raises:
            ValueError: an option has become one that there is not; nothing was changed.
        """
        if self.casts == 0:
            checked("TernaryFlip", self.options)
            self._read_options()
        self.casts += 1
        dtype = narrowest(self.casts * LARGEST_VOTE[self.kind])
        if self.pending is None:
            self.pending = torch.zeros(shape, dtype=dtype, device=device)
        else:
            self.pending = self.pending.to(device, dtype)

    def cast(self, first: int, grad: Tensor, values: Tensor, inverse_rms: Tensor | None) -> None:
        """Add the votes of some of the rows.

        Args:
            first: the first row's place.
            grad: dT of the rows, float [rows, in].
            values: T there, of any dtype.
            inverse_rms: of the whole layer's dT, for votes by magnitude.
        """
        assert self.pending is not None
        # Whether anybody asks is known at the step.
        fine = _are_finite(grad)
        self.finite = fine if self.finite is None else self.finite.to(fine.device) & fine
        pending = self.pending[first : first + grad.shape[0]]
        start = first * grad.shape[1]
        drop = self.outward == "drop"
        if self.kind == "sign":
            in_pieces(_cast_signs, (pending, grad, values), start, (drop,), compiled=False)
        else:
            assert inverse_rms is not None
            arguments = (inverse_rms, *self._key(), drop)
            compiled = self.is_compiled(grad.device)
            in_pieces(_cast_magnitudes, (pending, grad, values), start, arguments, compiled=compiled)

    def _key(self) -> Key:
        # Passes are counted over all workers, so that N workers draw what one that does their work draws.
        worker, workers = place(self.group)
        return derive_key(self.seed, self.name, self.step, (self.casts - 1) * workers + worker)


def _are_finite(grad: Tensor) -> Tensor:
    """Whether no element is infinite or NaN, 0-dim bool."""
    # A CPU sums three times as fast as it looks for the ends; but a sum of finite numbers may be infinite.
    if grad.device.type == "cpu" and (fine := grad.sum().isfinite()):
        return fine
    low, high = torch.aminmax(grad)
    return low.isfinite() & high.isfinite()


def _cast_signs(tensors: tuple[Tensor, ...], first: int, drop: bool) -> None:
    pending, grad, values = tensors
    votes = sign_votes(grad)
    pending += without_outward(votes, values.to(torch.int8)) if drop else votes


def _cast_magnitudes(
    tensors: tuple[Tensor, ...], first: int, inverse_rms: Tensor, word: int, other: int, drop: bool
) -> None:
    pending, grad, values = tensors
    votes = magnitude_votes(grad, inverse_rms, (word, other), places(grad, first))
    pending += without_outward(votes, values.to(torch.int8)) if drop else votes


def sum_of_squares(grad: Tensor) -> Tensor:
    """Σ dT² of contiguous elements, 0-dim float64: squares that float32 has not are summed too.

    >>> sum_of_squares(torch.tensor([3e25, 4e25])), sum_of_squares(torch.tensor([3e-25, 4e-25]))
    (tensor(2.5000e+51, dtype=torch.float64), tensor(2.5000e-49, dtype=torch.float64))
    """
    total = torch.zeros((), dtype=torch.float64, device=grad.device)
    in_pieces(_add_squares, (grad,), 0, (total,), compiled=False)
    return total


def _add_squares(tensors: tuple[Tensor, ...], first: int, total: Tensor) -> None:
    (grad,) = tensors
    # In units of a power of two near the largest, which changes no bit of the elements that count.
    low, high = torch.aminmax(grad)
    _, exponent = torch.frexp(torch.maximum(-low, high).to(torch.float64))
    unit = torch.exp2(exponent.to(torch.float64))
    scaled = grad * unit.reciprocal()
    total += torch.dot(scaled, scaled).to(torch.float64) * unit.square()


def inverse_rms(square: Tensor, count: int) -> Tensor:
    """1/rms from the sum of squares; 0 where that is no number of float32, or the rms zero or not finite."""
    rms = (square / max(count, 1)).sqrt()
    inverse = rms.reciprocal()
    usable = (rms > 0) & rms.isfinite() & (inverse <= torch.finfo(torch.float32).max)
    return torch.where(usable, inverse, 0.0)


def find_vote_buffer(handle: Tensor | None) -> VoteBuffer | None:
    """The vote_buffer behind a handle; None if there is none, or its trainer is gone."""
    return None if handle is None else _vote_buffers.get(int(handle.detach()))
