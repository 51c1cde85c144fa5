"""What the ternary section times: layers, and passes over packed weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from steepest.compile.available import wants_compiling
from steepest.lab.training.seeding import seeded
from steepest.model_shapes import ParamShape
from steepest.ternary import TernaryFlip, TernaryLinear, pack, unpack
from steepest.ternary.flipping import flip_layer

from .bandwidth import AXPY, COPY, axpy, axpy_bytes, least_bytes
from .case import LR
from .params import SharedParams

THRESHOLD = 24
DENSE = "dense"


class UnpackThenMatmul(nn.Module):
    """A ternary layer without a custom operation: autograd sees a dense weight.

    >>> layer = TernaryLinear(6, 3, bias=False)
    >>> x = torch.randn(2, 6)
    >>> torch.allclose(UnpackThenMatmul(layer)(x), layer(x), atol=1e-6)
    True
    """

    def __init__(self, layer: TernaryLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        values = unpack(self.layer.packed, self.layer.in_features, x.dtype)
        return nn.functional.linear(x, values * self.layer.scale[:, None])


@dataclass(frozen=True)
class Timer:
    """A call, and what runs before it, untimed."""

    run: Callable[[], object]
    setup: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class LayerSize:
    """A layer with `width` inputs and outputs, and `rows` rows of input."""

    width: int
    rows: int


def layers(size: LayerSize, device: torch.device, dtype: torch.dtype) -> dict[str, Timer]:
    """Return, by label, a timer for a layer's forward and backward pass.

    All layers start with the same weights. The setup clears gradients and votes, as `zero_grad` does.
    """
    with seeded(0):
        dense = nn.Linear(size.width, size.width, bias=False, device=device, dtype=dtype)
        x = torch.randn(size.rows, size.width, device=device, dtype=dtype, requires_grad=True)
        dy = torch.randn(size.rows, size.width, device=device, dtype=dtype)

    def timer(module: nn.Module, flip: TernaryFlip | None = None) -> Timer:
        def clear() -> None:
            x.grad = None
            module.zero_grad()
            if flip is not None:
                flip.zero_grad()

        return Timer(lambda: module(x).backward(dy), clear)

    def ternary() -> TernaryLinear:
        return TernaryLinear.from_linear(dense)

    def by_sign() -> Timer:
        layer = ternary()
        return timer(layer, TernaryFlip(layer, process_group=False))

    def by_magnitude() -> Timer:
        layer = ternary()
        flip = TernaryFlip(layer, votes="magnitude", compile=False, process_group=False)
        return timer(layer, flip)

    return {
        DENSE: timer(dense),
        "unpack, then matmul": timer(UnpackThenMatmul(ternary())),
        "frozen weights": timer(ternary()),
        "votes by sign": by_sign(),
        "votes by magnitude": by_magnitude(),
    }


@dataclass(frozen=True)
class Pass:
    """A timer that processes all weights once, and the least bytes that this moves."""

    timer: Timer
    nbytes: int


def passes(width: int, device: torch.device, dtype: torch.dtype, *, compiled: bool) -> dict[str, Pass]:
    """Return, by label, a pass over width² weights: packing, flipping, and references.

    The references axpy and AdamW process the same number of elements of `dtype`; the copy, of int8.
    """
    shared = SharedParams.create([ParamShape("weight", (width, width))], device, dtype)
    with seeded(0):
        values = torch.randint(-1, 2, (width, width), dtype=torch.int8, device=device)
    packed = pack(values)

    def copy_pass() -> Pass:
        other = torch.empty_like(values)
        return Pass(Timer(lambda: other.copy_(values)), 2 * values.nbytes)

    def step_pass() -> Pass:
        with seeded(0):
            layer = TernaryLinear(width, width, bias=False, device=device, dtype=dtype)
        layer.set_ternary(values)
        flip = TernaryFlip(layer, process_group=False)
        x = torch.ones(1, width, device=device, dtype=dtype)
        dy = shared.grads[0][:1]

        def vote() -> None:
            layer.zero_grad()
            layer(x).backward(dy)

        updated = layer.packed.nbytes + values.nbytes
        # Counters, and votes by sign, have one byte per weight.
        return Pass(Timer(flip.step, vote), least_bytes(updated, values.nbytes, 0))

    def flip_pass(dtype: torch.dtype, max_fraction: float = 1.0) -> Pass:
        # Any ternary values can serve as votes by sign.
        initial_votes, votes = values.flip(0), torch.empty_like(values)
        weights = packed.clone()
        with seeded(0):
            # 0.75 % of the counters slightly exceed the threshold; a third of those point outward.
            initial, past = (
                torch.randint(low, low + count, values.shape, dtype=dtype, device=device)
                for low, count in ((2 - THRESHOLD, 2 * THRESHOLD - 3), (THRESHOLD + 1, 4))
            )
            initial = torch.where(torch.rand(values.shape, device=device) < 0.0075, past, initial)
        counters = torch.zeros_like(initial)
        compiles = wants_compiling(None, width**2, device)
        at_most = None if max_fraction == 1 else max(int(max_fraction * width**2), 1)

        def flip() -> None:
            flip_layer(
                weights, counters, votes, threshold=THRESHOLD, outward="cancel", zero_pull=0.0,
                at_most=at_most, key=(0, 0), compiled=compiles,
            )  # fmt: skip

        def reset() -> None:
            # The pass overwrites the votes.
            votes.copy_(initial_votes)
            counters.copy_(initial)

        nbytes = least_bytes(weights.nbytes + counters.nbytes, votes.nbytes, 0)
        return Pass(Timer(flip, reset), nbytes)

    def adamw_pass() -> Pass:
        adamw = torch.optim.AdamW([param for _, param in shared.params], lr=LR, fused=True)
        nbytes = least_bytes(shared.nbytes, shared.nbytes, 2 * shared.nbytes)
        return Pass(Timer(adamw.step, shared.set_grads), nbytes)

    moved = values.nbytes + packed.nbytes

    found = {
        AXPY: Pass(Timer(lambda: axpy(shared)), axpy_bytes(shared)),
        COPY: copy_pass(),
        "pack": Pass(Timer(lambda: pack(values)), moved),
        "pack, compiled": Pass(Timer(lambda: pack(values, compile=True)), moved),
        "unpack": Pass(Timer(lambda: unpack(packed, width)), moved),
        "unpack, compiled": Pass(Timer(lambda: unpack(packed, width, compile=True)), moved),
        "flip": flip_pass(torch.int8),
        "flip, int16 counters": flip_pass(torch.int16),
        "flip, at most 0.1 %": flip_pass(torch.int8, 0.001),
        "flip step": step_pass(),
        "AdamW, fused": adamw_pass(),
    }
    # Without a compiler, these would be the eager passes.
    if not (compiled and wants_compiling(None, 1 << 62, device)):
        found = {label: each for label, each in found.items() if not label.endswith(", compiled")}
    return found
