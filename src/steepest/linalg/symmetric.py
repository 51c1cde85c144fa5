"""Compute products whose result is symmetric for little more than half the cost."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from steepest.autotuning import choose
from steepest.linalg.operand import require_choice, require_matrices, require_shape
from steepest.linalg.product import (
    ProductShape,
    differentiated,
    is_free,
    is_plain,
    multiply,
    multiply_one,
    product,
    product_way,
)

__all__ = ["SymmetricKernel", "gram", "mirrored_product", "preferred_symmetric_kernel", "symmetric_product"]

SymmetricKernel: TypeAlias = Literal["default", "triton"]

# Process-wide, like the preferences in torch.backends.
_preferred: SymmetricKernel = "default"

# Fewest rows per panel, and most panels, unless a measured choice says otherwise. As a share of the full
# product's time on an AMD processor (2 threads, AVX-512): in float32 0.77 for 768 rows and columns, 0.68 for
# 2304 columns, 0.56 for 2304 rows; in bfloat16 0.86, 0.72 and 0.64, with no gain below 512 rows.
_NARROWEST = {torch.float32: 192, torch.float64: 192, torch.bfloat16: 256}
_FEWEST = 2 * min(_NARROWEST.values())
_MOST_PANELS = 6
_PANELS = ("1", "2", "3", "6")


def preferred_symmetric_kernel(kernel: SymmetricKernel | None = None) -> SymmetricKernel:
    """Return the kernel for symmetric products on CUDA, after setting it if one is passed.

    The setting applies to the whole process. ``"default"`` is cuBLAS's full product. ``"triton"`` computes
    the tiles on and below the diagonal, about half of the flops, and copies the others. It serves float16,
    bfloat16 and float32 matrices of more than 128 rows (64 rows for float32 without TF32) on devices of
    compute capability 8.0 or higher. Everything else keeps the default, also under ``torch.compile`` and
    where autograd differentiates. The kernel sums in float32, in an order that depends only on the shapes,
    and multiplies float32 in TF32 if the user has allowed that (``torch.set_float32_matmul_precision``).
    Choose before a CUDA graph is captured, and before its warm-up steps.

    Triton is not the default because nobody has measured yet where it is faster; ``python -m benchmarks.steps
    --sections symmetric --device cuda`` does. It is not among the ways that :func:`steepest.autotune` times.

    Raises:
        ValueError: an unknown kernel.
        ModuleNotFoundError: ``"triton"`` without Triton installed; the setting does not change.

    >>> preferred_symmetric_kernel()
    'default'
    """
    global _preferred
    if kernel is not None:
        require_choice("preferred_symmetric_kernel", "kernel", kernel, get_args(SymmetricKernel))
        if kernel == "triton":
            from steepest.linalg import triton_symmetric

            if not triton_symmetric.AVAILABLE:
                raise ModuleNotFoundError("the symmetric kernel 'triton' needs Triton: pip install triton")
        _preferred = kernel
    return _preferred


def gram(x: Tensor) -> Tensor:
    r"""Compute the Gram matrix :math:`X X^\top` of X [..., m, n], in X's dtype.

    The result is exactly symmetric on a CPU from 384 rows in float32 and float64 and from 512 in bfloat16,
    and on CUDA if :func:`preferred_symmetric_kernel` selects Triton: there, blocks below the diagonal are
    computed and copied to the other side, unless the whole product has been timed to be faster. In all other
    cases, and whenever autograd may need a derivative, this is the plain product.

    Raises:
        TypeError: ``x`` is not a floating-point tensor.
        ValueError: ``x`` has fewer than two dimensions.

    >>> gram(torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
    tensor([[5., 6.],
            [6., 9.]])
    """
    require_matrices("gram", x)
    if not _narrow(x):
        x = x.contiguous()  # one copy here, instead of one per panel
    return mirrored_product(x, x.mT, exactly=True)


def symmetric_product(x: Tensor, y: Tensor, *, added: Tensor | None = None, alpha: float = 1.0) -> Tensor:
    r"""Compute ``added`` + α X Y, exactly symmetric, of operands whose result is symmetric up to rounding.

    The blocks are computed as in :func:`gram`; without blocks, the result is the mean of the product and
    its transpose.

    Args:
        x: [..., n, k].
        y: [..., k, n].
        added: [..., n, n]; None means zero. It need not be symmetric itself.
        alpha: α.

    Raises:
        TypeError: ``x`` is not a floating-point tensor, or ``y`` or ``added`` is not a tensor.
        ValueError: ``x`` has fewer than two dimensions, or ``y`` or ``added`` has another shape than above;
            they are not broadcast.

    >>> q, s = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.eye(2)
    >>> symmetric_product(q, s, added=q, alpha=-0.5)
    tensor([[1.0000, 0.5000],
            [0.5000, 1.0000]])
    """
    require_matrices("symmetric_product", x)
    *batch, n, k = x.shape
    require_shape("symmetric_product", "y", y, (*batch, k, n))
    if added is not None:
        require_shape("symmetric_product", "added", added, (*batch, n, n))
    return mirrored_product(x, y, added=added, alpha=alpha, exactly=True, averaged=True)


def mirrored_product(
    x: Tensor,
    y: Tensor,
    *,
    added: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    exactly: bool = False,
    averaged: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Compute β ``added`` + α X Y of operands whose result is symmetric up to rounding, at the least cost.

    Blocks on the diagonal keep their rounding errors unless ``exactly`` is set, and the plain product, where
    it is faster, unless ``averaged`` is. ``out`` is memory that the result may take. Callers must have
    checked the shapes.
    """
    if _preferred == "triton" and not torch.compiler.is_compiling() and is_plain(x, y, added):
        # Import Triton only after the user has selected it.
        from steepest.linalg.triton_symmetric import mirrored, serves

        if serves(x, y, added) and not differentiated(x, y, added):
            return mirrored(x, y, added=added, alpha=alpha, beta=beta)
    rows, inner = x.shape[-2:]
    if rows < _FEWEST or inner == 0 or _narrow(x) or not is_free(x, y, added):
        # Writing panels into a preallocated tensor would lose derivatives.
        whole = product(x, y, added=added, alpha=alpha, beta=beta, out=out)
        return (whole + whole.mT) / 2 if averaged else whole
    if out is None:
        out = x.new_empty(*x.shape[:-2], rows, rows)
    stack = out
    if x.dim() != 3:
        stack = out.view(-1, rows, rows)
        count = len(stack)
        x, y = x.reshape(count, rows, inner), y.reshape(count, inner, rows)
        added = None if added is None else added.reshape(count, rows, rows)
    shape = ProductShape.of(x, y, added)
    panels, way = int(_symmetric_way(shape)), product_way(shape)
    _in_panels(panels, way, x, y, added, alpha, beta, exactly or averaged, stack)
    return out


def _in_panels(
    panels: int,
    way: str,
    x: Tensor,
    y: Tensor,
    added: Tensor | None,
    alpha: float,
    beta: float,
    exactly: bool,
    out: Tensor,
) -> None:
    """Compute stacks [batch, n, n]: panels of columns from the diagonal down, copied to the other side."""
    if panels == 1:
        whole = multiply(way, x, y, added, alpha, beta, out)
        if exactly:
            torch.add(whole, whole.mT, out=out).mul_(0.5) if whole is not out else out.copy_(
                (whole + whole.mT).mul_(0.5)
            )
        elif whole is not out:
            out.copy_(whole)
        return
    rows = out.shape[-1]
    size = -(-rows // panels)
    for at, into in enumerate(out):
        left, right, addend = x[at], y[at], None if added is None else added[at]
        for first in range(0, rows, size):
            end = first + size
            panel = into[first:, first:end]
            below = None if addend is None else addend[first:, first:end]
            multiply_one(way, left[first:], right[:, first:end], below, alpha, beta, panel)
            if exactly:
                corner = panel[:size]
                corner.copy_((corner + corner.mT).mul_(0.5))
            if end < rows:
                into[first:end, end:] = panel[size:].mT


def _narrow(x: Tensor) -> bool:
    """Return whether a product of that many rows is not worth cutting."""
    return not x.is_cpu or x.dtype not in _NARROWEST or x.shape[-2] < 2 * _NARROWEST[x.dtype]


def _symmetric_way(shape: ProductShape) -> str:
    """Return the number of panels, as a word, for stacks [batch, n, n]."""
    default = str(min(_MOST_PANELS, shape.m // _NARROWEST[shape.dtype]))
    ways = [default, *(panels for panels in _PANELS if panels != default)]

    def trials() -> dict[str, Callable[[], Any]]:
        x, y, added = shape.operands()
        out = x.new_empty(shape.batch, shape.m, shape.n)
        way = product_way(shape)
        return {
            panels: partial(_in_panels, int(panels), way, x, y, added, 1.0, 1.0, False, out)
            for panels in ways
        }

    return choose(("symmetric", shape), shape.device, ways, trials)
