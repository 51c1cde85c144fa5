"""Who takes turns in the section about ternary weights: layers, and passes over packed weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from steepest.compile.available import wants_compiling
from steepest.ternary import TernaryFlip, TernaryLinear, pack, unpack
from steepest.ternary.flipping import flip_layer

from ..seeding import seeded
from .entry import LR
from .limits import AXPY, COPY, axpy, axpy_bytes, least_bytes
from .material import Material
from .shapes import Tensor as Shaped
from .turns import Turn

THRESHOLD = 24
DENSE = "dense"


class UnpackThenMatmul(nn.Module):
    """A ternary layer without an operation of its own: the weight is made dense in the graph.

    >>> layer = TernaryLinear(6, 3, bias=False)
    >>> x = torch.randn(2, 6)
    >>> torch.allclose(UnpackThenMatmul(layer)(x), layer(x), atol=1e-6)
    True
    """

    def __init__(self, layer: TernaryLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [..., in] to [..., out]."""
        values = unpack(self.layer.packed, self.layer.in_features, x.dtype)
        return nn.functional.linear(x, values * self.layer.scale[:, None])


@dataclass(frozen=True)
class LayerSize:
    """A square layer of `width` inputs and outputs, over `rows` rows of input."""

    width: int
    rows: int

    def need(self, dtype: torch.dtype) -> int:
        """Bytes that the layers below take together, about."""
        # Dense weights and their gradient, those of the graph that unpacks, and what a product makes.
        return dtype.itemsize * (8 * self.width**2 + 8 * self.rows * self.width)


def layers(size: LayerSize, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Turn]]:
    """By label, what makes a turn that is one forward and backward of a layer; all begin at the same weights.

    Gradients and votes are dropped between turns, untimed, as `zero_grad` does between steps.
    """
    with seeded(0):
        dense = nn.Linear(size.width, size.width, bias=False, device=device, dtype=dtype)
        x = torch.randn(size.rows, size.width, device=device, dtype=dtype, requires_grad=True)
        dy = torch.randn(size.rows, size.width, device=device, dtype=dtype)

    def turn(label: str, module: nn.Module, flip: TernaryFlip | None = None) -> Turn:
        def ready() -> None:
            x.grad = None
            module.zero_grad()
            if flip is not None:
                flip.zero_grad()

        return Turn(label, lambda: module(x).backward(dy), ready)

    def ternary() -> TernaryLinear:
        return TernaryLinear.from_linear(dense)

    def by_sign() -> Turn:
        layer = ternary()
        return turn("votes by sign", layer, TernaryFlip(layer, process_group=False))

    def by_magnitude() -> Turn:
        layer = ternary()
        flip = TernaryFlip(layer, votes="magnitude", compile=False, process_group=False)
        return turn("votes by magnitude", layer, flip)

    return {
        DENSE: lambda: turn(DENSE, dense),
        "unpack, then matmul": lambda: turn("unpack, then matmul", UnpackThenMatmul(ternary())),
        "weights that stay": lambda: turn("weights that stay", ternary()),
        "votes by sign": by_sign,
        "votes by magnitude": by_magnitude,
    }


@dataclass(frozen=True)
class Pass:
    """A turn that goes over all weights once, and the bytes that it cannot do without."""

    turn: Turn
    nbytes: int


def passes_need(width: int, dtype: torch.dtype) -> int:
    """Bytes that the passes below take together, about."""
    # Parameters, gradients and AdamW's state; then numbers, and votes and counters of four flips.
    return width**2 * (4 * dtype.itemsize + 22)


def passes(width: int, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Pass]]:
    """By label, what makes a pass over width² weights: packing, flipping, and what they are held against.

    axpy and AdamW go over as many numbers of `dtype`, the copy over as many int8.
    """
    material = Material.of([Shaped("weight", (width, width))], device, dtype)
    with seeded(0):
        values = torch.randint(-1, 2, (width, width), dtype=torch.int8, device=device)
    packed = pack(values)

    def copying() -> Pass:
        other = torch.empty_like(values)
        return Pass(Turn(COPY, lambda: other.copy_(values)), 2 * values.nbytes)

    def flipping() -> Pass:
        with seeded(0):
            layer = TernaryLinear(width, width, bias=False, device=device, dtype=dtype)
        layer.set_ternary(values)
        flip = TernaryFlip(layer, process_group=False)
        x = torch.ones(1, width, device=device, dtype=dtype)
        dy = material.grads[0][:1]

        def vote() -> None:
            layer.zero_grad()
            layer(x).backward(dy)

        kept = layer.packed.nbytes + flip.accumulators[""].nbytes
        # The votes of one pass by sign are as many bytes as the weights.
        return Pass(Turn("flip step", flip.step, vote), least_bytes(kept, values.nbytes, 0))

    def passing(label: str, dtype: torch.dtype, share: float = 1.0) -> Pass:
        # Any ternary numbers are votes by sign.
        cast, votes = values.flip(0), torch.empty_like(values)
        mine = packed.clone()
        with seeded(0):
            # Past the threshold by little are 0.75 %; of those a third point outward, and come to nothing.
            begin, past = (
                torch.randint(low, low + count, values.shape, dtype=dtype, device=device)
                for low, count in ((2 - THRESHOLD, 2 * THRESHOLD - 3), (THRESHOLD + 1, 4))
            )
            begin = torch.where(torch.rand(values.shape, device=device) < 0.0075, past, begin)
        counters = torch.zeros_like(begin)
        compiled = wants_compiling(None, width**2, device)
        at_most = None if share == 1 else max(int(share * width**2), 1)

        def flip() -> None:
            flip_layer(
                mine, counters, votes, threshold=THRESHOLD, outward="cancel", zero_pull=0.0,
                at_most=at_most, key=(0, 0), compiled=compiled,
            )  # fmt: skip

        def ready() -> None:
            # The pass leaves nothing that means anything in the votes.
            votes.copy_(cast)
            counters.copy_(begin)

        return Pass(Turn(label, flip, ready), least_bytes(mine.nbytes + counters.nbytes, votes.nbytes, 0))

    def stepping() -> Pass:
        adamw = torch.optim.AdamW([param for _, param in material.params], lr=LR, fused=True)
        nbytes = least_bytes(material.nbytes, material.nbytes, 2 * material.nbytes)
        return Pass(Turn("AdamW, fused", adamw.step, material.lend_gradients), nbytes)

    moved = values.nbytes + packed.nbytes

    def graph(label: str, run: Callable[[], Tensor]) -> Pass:
        if not wants_compiling(None, 1 << 62, device):
            raise RuntimeError(f"there is no compiler for {device.type!r} here")
        return Pass(Turn(label, run), moved)

    return {
        AXPY: lambda: Pass(Turn(AXPY, lambda: axpy(material)), axpy_bytes(material)),
        COPY: copying,
        "pack": lambda: Pass(Turn("pack", lambda: pack(values)), moved),
        "pack, compiled": lambda: graph("pack, compiled", lambda: pack(values, compile=True)),
        "unpack": lambda: Pass(Turn("unpack", lambda: unpack(packed, width)), moved),
        "unpack, compiled": lambda: graph("unpack, compiled", lambda: unpack(packed, width, compile=True)),
        "flip": lambda: passing("flip", torch.int8),
        "flip, int16 counters": lambda: passing("flip, int16 counters", torch.int16),
        "flip, at most 0.1 %": lambda: passing("flip, at most 0.1 %", torch.int8, 0.001),
        "flip step": flipping,
        "AdamW, fused": stepping,
    }
