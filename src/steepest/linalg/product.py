"""Multiply matrices in the fastest way: the only place that decides between libraries and batching."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from steepest.autotuning import choose
from steepest.scratch import borrow

__all__ = [
    "ProductShape",
    "differentiated",
    "is_free",
    "is_plain",
    "multiply",
    "multiply_one",
    "product",
    "product_way",
]

# Multiplications of one product from which its ways are timed: some 20 µs, which exceed the cost of asking.
_LARGE = 1 << 22


def product(
    x: Tensor,
    y: Tensor,
    *,
    added: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """Compute β ``added`` + α X Y, [..., m, n]: torch.baddbmm for any number of batch dimensions.

    X and Y have the same ones. With ``beta=0``, ``added`` is not read. ``out`` is memory that the result may
    take; where it does not fit the way, or autograd needs a new tensor, the result is one.

    Large products are multiplied in the way that :mod:`steepest.autotuning` found fastest: all matrices in
    one call ("batched"), one call each ("loop"), or, for float32 on a CPU with AVX-512, by oneDNN
    ("onednn"), the default there: torch itself would use MKL, which reaches half of the processor's speed
    unless Intel made the processor. ``torch.backends.mkldnn.enabled = False`` rules oneDNN out.

    >>> product(torch.eye(2), torch.ones(2, 2), added=torch.eye(2), alpha=0.5, beta=2.0)
    tensor([[2.5000, 0.5000],
            [0.5000, 2.5000]])
    """
    if beta == 0:
        added = None
    # Small products are many, and asking more of them would take as long as they do.
    if x.shape[-2] * x.shape[-1] * y.shape[-1] >= _LARGE and is_free(x, y, added):
        if x.dim() == 3:
            return multiply(product_way(ProductShape.of(x, y, added)), x, y, added, alpha, beta, out)
        shape = (*x.shape[:-1], y.shape[-1])
        lefts, rights = x.reshape(-1, *x.shape[-2:]), y.reshape(-1, *y.shape[-2:])
        addends = None if added is None else added.reshape(-1, *added.shape[-2:])
        into = None if out is None else out.view(-1, *out.shape[-2:])
        way = product_way(ProductShape.of(lefts, rights, addends))
        return multiply(way, lefts, rights, addends, alpha, beta, into).view(shape)
    if out is not None and (torch.is_grad_enabled() or not is_plain(x, y, added)):
        out = None
    if added is None:
        # torch.matmul would first copy a transposed operand of a batched product; torch.bmm does not.
        bare = torch.bmm(x, y, out=out) if x.dim() == 3 else torch.matmul(x, y, out=out)
        return bare if alpha == 1 else alpha * bare
    if x.dim() == 3:
        return torch.baddbmm(added, x, y, alpha=alpha, beta=beta, out=out)
    if x.dim() == 2:
        return torch.addmm(added, x, y, alpha=alpha, beta=beta, out=out)
    return beta * added + alpha * (x @ y)


def is_free(x: Tensor, y: Tensor, added: Tensor | None) -> bool:
    """Return whether any way may compute it: not all have derivatives, or support tracers and subclasses."""
    # This is asked for every product, so what most tensors answer comes first.
    if y.dtype != x.dtype or (added is not None and added.dtype != x.dtype):
        return False
    if not (x.is_cpu or x.is_cuda) or torch.compiler.is_compiling():
        return False
    if torch.is_autocast_enabled("cpu" if x.is_cpu else "cuda"):  # it changes the dtype of some ways only
        return False
    return is_plain(x, y, added) and not differentiated(x, y, added)


class ProductShape(NamedTuple):
    """On what the time of a product of stacks depends.

    Attributes:
        dtype, device: of all operands.
        batch, m, k, n: β ``added`` [batch, m, n] + α X [batch, m, k] · Y [batch, k, n].
        layout: "N" or "T" for X and Y: rows or columns are contiguous.
        adds: whether there is ``added``.
        settings: torch's for float32 products.
    """

    dtype: torch.dtype
    device: torch.device
    batch: int
    m: int
    k: int
    n: int
    layout: str
    adds: bool
    settings: str

    @classmethod
    def of(cls, x: Tensor, y: Tensor, added: Tensor | None) -> ProductShape:
        """Return that of a product."""
        layout = ("N" if x.stride(-1) == 1 else "T") + ("N" if y.stride(-1) == 1 else "T")
        batch, m, k = x.shape
        return cls(x.dtype, x.device, batch, m, k, y.shape[-1], layout, added is not None, _settings(x))

    def __str__(self) -> str:
        size = f"{self.batch}x{self.m}x{self.k}x{self.n}"
        return f"{str(self.dtype)[6:]} {size} {self.layout}{'+' * self.adds} {self.settings}".rstrip()

    def operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Make stacks to time ways with."""

        def stack(rows: int, columns: int, layout: str) -> Tensor:
            shape = (self.batch, rows, columns) if layout == "N" else (self.batch, columns, rows)
            # Whatever memory held could be denormal numbers, which processors multiply slowly.
            made = torch.full(shape, 0.01, dtype=self.dtype, device=self.device)
            return made if layout == "N" else made.mT

        added = stack(self.m, self.n, "N") if self.adds else None
        return stack(self.m, self.k, self.layout[0]), stack(self.k, self.n, self.layout[1]), added


def _settings(x: Tensor) -> str:
    if x.dtype != torch.float32:
        return ""
    backends: Any = torch.backends
    if x.is_cuda:
        return str(backends.cuda.matmul.fp32_precision)
    return f"{backends.mkldnn.matmul.fp32_precision}{'' if backends.mkldnn.enabled else ' without onednn'}"


def product_way(shape: ProductShape) -> str:
    """Return the way for a large product of stacks."""
    ways = ["batched", "loop"]
    if _onednn_multiplies(shape.dtype, shape.device):
        ways.insert(0, "onednn")

    def trials() -> dict[str, Callable[[], Any]]:
        x, y, added = shape.operands()
        out = x.new_empty(shape.batch, shape.m, shape.n)
        return {way: functools.partial(multiply, way, x, y, added, 1.0, 1.0, out) for way in ways}

    return choose(("product", shape), shape.device, ways, trials)


def multiply(
    way: str, x: Tensor, y: Tensor, added: Tensor | None, alpha: float, beta: float, out: Tensor | None
) -> Tensor:
    """Compute β ``added`` + α X Y of stacks [batch, ·, ·] in one of the ways, in ``out`` if that fits it."""
    if way == "batched":
        if added is not None:
            return torch.baddbmm(added, x, y, alpha=alpha, beta=beta, out=out)
        bare = torch.bmm(x, y, out=out)
        return bare if alpha == 1 else bare.mul_(alpha)
    if way == "onednn" and len(x) == 1:  # it allocates its result
        return _scaled(_linear(x[0], y[0])[None], added, alpha, beta)
    whole = borrow((*x.shape[:-1], y.shape[-1]), x.dtype, x.device) if out is None else out
    for at in range(len(x)):
        multiply_one(way, x[at], y[at], None if added is None else added[at], alpha, beta, whole[at])
    return whole


def multiply_one(
    way: str, x: Tensor, y: Tensor, added: Tensor | None, alpha: float, beta: float, out: Tensor
) -> None:
    """Write β ``added`` + α X Y of two matrices to ``out``, by oneDNN or, in all other ways, by torch."""
    if way == "onednn":
        out.copy_(_scaled(_linear(x, y), added, alpha, beta))
    elif added is not None:
        torch.addmm(added, x, y, alpha=alpha, beta=beta, out=out)
    else:
        torch.mm(x, y, out=out)
        if alpha != 1:
            out.mul_(alpha)


def differentiated(*tensors: Tensor | None) -> bool:
    """Return whether autograd may differentiate a result of these tensors, in backward or forward mode."""
    # A tensor wrapped by torch.func does not reveal whether a transform differentiates it.
    if torch._C._are_functorch_transforms_active():
        return True
    there = [each for each in tensors if each is not None]
    if torch.is_grad_enabled() and any([each.requires_grad for each in there]):  # noqa: C419
        return True
    if forward_ad._current_level < 0:
        return False
    tangents = (forward_ad.unpack_dual(each).tangent for each in there)  # type: ignore[no-untyped-call]
    return any(tangent is not None for tangent in tangents)


def is_plain(*tensors: Tensor | None) -> bool:
    """Return whether no tensor is of a subclass with its own dispatch: sharded, fake or quantized."""
    plain = Tensor.__torch_dispatch__
    kinds = [type(each) for each in tensors if each is not None]
    return all([kind is Tensor or kind.__torch_dispatch__ is plain for kind in kinds])  # noqa: C419


def _onednn_multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether torch has a product by oneDNN for this dtype apart from its own."""
    wanted = dtype == torch.float32 and device.type == "cpu" and bool(torch.backends.mkldnn.enabled)
    return wanted and _onednn_linear() is not None


@functools.cache
def _onednn_linear() -> Any:
    """Return oneDNN's X, W -> X Wᵀ, which torch.compile lowers to; None where it is missing or slower."""
    built: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    capable = built and torch.cpu.get_capabilities().get("avx512_f")
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None) if capable else None


def _linear(x: Tensor, y: Tensor) -> Tensor:
    # oneDNN multiplies element by element if the second operand has gaps between its rows.
    if not (y.is_contiguous() or y.mT.is_contiguous()):
        y = y.contiguous()
    result: Tensor = _onednn_linear()(x, y.mT, None, "none", [], "")
    return result


def _scaled(bare: Tensor, added: Tensor | None, alpha: float, beta: float) -> Tensor:
    """Return β ``added`` + α ``bare`` in the buffer of ``bare``, in one pass where β or α is 1."""
    if added is not None and beta == 1:
        return torch.add(added, bare, alpha=alpha, out=bare)
    bare = bare if alpha == 1 else bare.mul_(alpha)
    return bare if added is None else bare.add_(added, alpha=beta)
