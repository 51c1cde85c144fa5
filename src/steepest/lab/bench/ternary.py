"""The timers of the ternary section: layers, and passes over packed weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from steepest.compile.available import wants_compiling
from steepest.ternary import TernaryFlip, TernaryLinear, pack, unpack
from steepest.ternary.flipping import flip_layer

from ..seeding import seeded
from .bandwidth import AXPY, COPY, axpy, axpy_bytes, least_bytes
from .case import LR
from .interleaved import Timer
from .params import SharedParams
from .shapes import ParamShape

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
class LayerSize:
    """A layer with `width` inputs and outputs, and `rows` rows of input."""

    width: int
    rows: int

    def estimated_bytes(self, dtype: torch.dtype) -> int:
        """Estimate the bytes that all `layers` need together."""
        # Dense weights and their gradient, the unpacked weights in the graph, and results of products.
        return dtype.itemsize * (8 * self.width**2 + 8 * self.rows * self.width)


def layers(size: LayerSize, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Timer]]:
    """Return, by label, functions that make a timer for a layer's forward and backward pass.

    All layers start with the same weights. The setup clears gradients and votes, as `zero_grad` does.
    """
    with seeded(0):
        dense = nn.Linear(size.width, size.width, bias=False, device=device, dtype=dtype)
        x = torch.randn(size.rows, size.width, device=device, dtype=dtype, requires_grad=True)
        dy = torch.randn(size.rows, size.width, device=device, dtype=dtype)

    def timer(label: str, module: nn.Module, flip: TernaryFlip | None = None) -> Timer:
        def clear() -> None:
            x.grad = None
            module.zero_grad()
            if flip is not None:
                flip.zero_grad()

        return Timer(label, lambda: module(x).backward(dy), clear)

    def ternary() -> TernaryLinear:
        return TernaryLinear.from_linear(dense)

    def by_sign() -> Timer:
        layer = ternary()
        return timer("votes by sign", layer, TernaryFlip(layer, process_group=False))

    def by_magnitude() -> Timer:
        layer = ternary()
        flip = TernaryFlip(layer, votes="magnitude", compile=False, process_group=False)
        return timer("votes by magnitude", layer, flip)

    return {
        DENSE: lambda: timer(DENSE, dense),
        "unpack, then matmul": lambda: timer("unpack, then matmul", UnpackThenMatmul(ternary())),
        "frozen weights": lambda: timer("frozen weights", ternary()),
        "votes by sign": by_sign,
        "votes by magnitude": by_magnitude,
    }


@dataclass(frozen=True)
class Pass:
    """A timer that processes all weights once, and the least bytes that this moves."""

    timer: Timer
    nbytes: int


def estimated_pass_bytes(width: int, dtype: torch.dtype) -> int:
    """Estimate the bytes that all `passes` need together."""
    # Parameters, gradients and AdamW's state; then the values, and votes and counters of four flips.
    return width**2 * (4 * dtype.itemsize + 22)


def passes(width: int, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Pass]]:
    """Return, by label, functions that make a pass over width² weights: packing, flipping, and references.

    The references axpy and AdamW process the same number of elements of `dtype`; the copy, of int8.
    """
    shared = SharedParams.create([ParamShape("weight", (width, width))], device, dtype)
    with seeded(0):
        values = torch.randint(-1, 2, (width, width), dtype=torch.int8, device=device)
    packed = pack(values)

    def copy_pass() -> Pass:
        other = torch.empty_like(values)
        return Pass(Timer(COPY, lambda: other.copy_(values)), 2 * values.nbytes)

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
        return Pass(Timer("flip step", flip.step, vote), least_bytes(updated, values.nbytes, 0))

    def flip_pass(label: str, dtype: torch.dtype, max_fraction: float = 1.0) -> Pass:
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
        compiled = wants_compiling(None, width**2, device)
        at_most = None if max_fraction == 1 else max(int(max_fraction * width**2), 1)

        def flip() -> None:
            flip_layer(
                weights, counters, votes, threshold=THRESHOLD, outward="cancel", zero_pull=0.0,
                at_most=at_most, key=(0, 0), compiled=compiled,
            )  # fmt: skip

        def reset() -> None:
            # The pass overwrites the votes.
            votes.copy_(initial_votes)
            counters.copy_(initial)

        nbytes = least_bytes(weights.nbytes + counters.nbytes, votes.nbytes, 0)
        return Pass(Timer(label, flip, reset), nbytes)

    def adamw_pass() -> Pass:
        adamw = torch.optim.AdamW([param for _, param in shared.params], lr=LR, fused=True)
        nbytes = least_bytes(shared.nbytes, shared.nbytes, 2 * shared.nbytes)
        return Pass(Timer("AdamW, fused", adamw.step, shared.set_grads), nbytes)

    moved = values.nbytes + packed.nbytes

    def compiled_pass(label: str, run: Callable[[], Tensor]) -> Pass:
        if not wants_compiling(None, 1 << 62, device):
            raise RuntimeError(f"no compiler for {device.type!r} is available")
        return Pass(Timer(label, run), moved)

    return {
        AXPY: lambda: Pass(Timer(AXPY, lambda: axpy(shared)), axpy_bytes(shared)),
        COPY: copy_pass,
        "pack": lambda: Pass(Timer("pack", lambda: pack(values)), moved),
        "pack, compiled": lambda: compiled_pass("pack, compiled", lambda: pack(values, compile=True)),
        "unpack": lambda: Pass(Timer("unpack", lambda: unpack(packed, width)), moved),
        "unpack, compiled": lambda: compiled_pass(
            "unpack, compiled", lambda: unpack(packed, width, compile=True)
        ),
        "flip": lambda: flip_pass("flip", torch.int8),
        "flip, int16 counters": lambda: flip_pass("flip, int16 counters", torch.int16),
        "flip, at most 0.1 %": lambda: flip_pass("flip, at most 0.1 %", torch.int8, 0.001),
        "flip step": step_pass,
        "AdamW, fused": adamw_pass,
    }
