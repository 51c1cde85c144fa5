"""Products that are known to be symmetric, at little more than half of the price."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from steepest.linalg.operand import require_matrices, require_shape
from steepest.linalg.product import differentiated, is_plain, product

__all__ = [
    "SymmetricKernel",
    "gram",
    "mirrored_product",
    "preferred_symmetric_kernel",
    "symmetric_product",
]

SymmetricKernel: TypeAlias = Literal["default", "triton"]

# Process-wide, as torch.backends' preferences are.
_preferred: SymmetricKernel = "default"

# Measured on a CPU (2 threads, AVX-512), as shares of the whole product's time. float32: 0.77 for 768 rows
# and columns, 0.68 for 2304 columns, 0.56 for 2304 rows. bfloat16: 0.86, 0.72, 0.64; no gain below 512 rows.
# Narrower panels lose the processor's speed. Accelerators have not been measured.
_NARROWEST = {torch.float32: 192, torch.float64: 192, torch.bfloat16: 256}
_MOST_PANELS = 6


def preferred_symmetric_kernel(kernel: SymmetricKernel | None = None) -> SymmetricKernel:
    """What computes symmetric products on CUDA, for the whole process; with an argument, it is set first.

    ``"default"`` is cuBLAS's plain product. ``"triton"`` computes the tiles on and below the diagonal, about
    half of the flops, and copies the others: of float16, bfloat16 and float32 matrices of more than 128
    rows (64 of float32 without TF32), on devices of compute capability 8.0 or more. All else goes on as by
    default: the CPU, float64, small matrices, ``torch.compile``, whatever is differentiated. Sums are
    float32's, in an order that depends on the shapes alone; float32 is multiplied in TF32 if torch is told
    to do so (``torch.set_float32_matmul_precision``). Choose before a CUDA graph is captured, and before
    the steps that prepare it.

    It is not the default, since half of the flops are not half of the time, and it has not been measured
    which is faster where: ``steepest bench --sections symmetric --device cuda`` tells. Nothing chooses by
    the clock, since the two round differently, and runs could not be repeated.

    Raises:
        ValueError: another kernel.
        ModuleNotFoundError: ``"triton"`` where Triton is not installed; the choice stays as it was.

    >>> preferred_symmetric_kernel()
    'default'
    """
    global _preferred
    if kernel is not None:
        if kernel not in get_args(SymmetricKernel):
            known = " or ".join(map(repr, get_args(SymmetricKernel)))
            raise ValueError(f"preferred_symmetric_kernel needs {known}, got {kernel!r}")
        if kernel == "triton":
            from steepest.linalg import triton_symmetric

            if not triton_symmetric.AVAILABLE:
                raise ModuleNotFoundError("symmetric products in Triton need it: pip install triton")
        _preferred = kernel
    return _preferred


def gram(x: Tensor) -> Tensor:
    r"""The Gram matrix :math:`X X^\top` of X [..., m, n], in X's dtype.

    Where it pays (on a CPU, from 384 rows in float32 and float64 and from 512 in bfloat16) only the lower
    blocks are computed and the upper ones copied, which makes the result exactly symmetric; so it is on CUDA
    where :func:`preferred_symmetric_kernel` says so. Elsewhere, and where a derivative may be asked for, it
    is the plain product.

    Raises:
        TypeError: ``x`` is no floating point tensor.
        ValueError: fewer than two dimensions.

    >>> gram(torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
    tensor([[5., 6.],
            [6., 9.]])
    """
    require_matrices("gram", x)
    if _panels(x) > 1:
        x = x.contiguous()  # once, and not each of its panels
    return mirrored_product(x, x.mT, exactly=True)


def symmetric_product(x: Tensor, y: Tensor, *, added: Tensor | None = None, alpha: float = 1.0) -> Tensor:
    r"""``added`` + α X Y for operands whose result is symmetric but for rounding; exactly symmetric.

    Computed by blocks where :func:`gram` is; elsewhere as the mean of the product and its transpose.

    Args:
        x: [..., n, k].
        y: [..., k, n].
        added: [..., n, n]; None is zero. Need not be symmetric by itself.
        alpha: α.

    Raises:
        TypeError: ``x`` is no floating point tensor, ``y`` or ``added`` no tensor.
        ValueError: ``x`` has fewer than two dimensions, or ``y`` or ``added`` another shape than above;
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
    whole = mirrored_product(x, y, added=added, alpha=alpha, exactly=True)
    halved = _goes_to_triton(x, y, added) or _panels(x, y, added) > 1
    return whole if halved else (whole + whole.mT) / 2


def mirrored_product(
    x: Tensor,
    y: Tensor,
    *,
    added: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    exactly: bool = False,
) -> Tensor:
    """β ``added`` + α X Y for operands whose result is symmetric but for rounding, at the least cost.

    Where that pays, the blocks below the diagonal are computed and those above it copied. The diagonal
    ones, or where it does not pay the whole, stay as rounding leaves them; ``exactly`` makes diagonal
    blocks symmetric. The operands' shapes are not checked.

    >>> mirrored_product(torch.eye(2), torch.ones(2, 2), alpha=3.0)
    tensor([[3., 3.],
            [3., 3.]])
    """
    if _goes_to_triton(x, y, added):
        from steepest.linalg.triton_symmetric import mirrored

        return mirrored(x, y, added=added, alpha=alpha, beta=beta)
    if (panels := _panels(x, y, added)) == 1:
        return product(x, y, added=added, alpha=alpha, beta=beta)
    rows, inner = x.shape[-2:]
    out = x.new_empty(*x.shape[:-2], rows, rows)
    count = out.shape[:-2].numel()
    columns = [None] * count if added is None else [*added.reshape(count, rows, rows)]
    each = zip(
        out.view(count, rows, rows),
        x.reshape(count, rows, inner),
        y.reshape(count, inner, rows),
        columns,
        strict=True,
    )
    for whole, left, right, sum_ in each:
        for first, end in _cuts(rows, panels):
            lower = product(
                left[first:],
                right[:, first:end],
                added=None if sum_ is None else sum_[first:, first:end],
                alpha=alpha,
                beta=beta,
            )
            whole[first:, first:end] = lower
            whole[first:end, end:] = lower[end - first :].mT
            if exactly:
                corner = lower[: end - first]
                whole[first:end, first:end] = (corner + corner.mT).mul_(0.5)
    return out


def _goes_to_triton(x: Tensor, y: Tensor, added: Tensor | None) -> bool:
    # Triton is imported when somebody wants it, and not before.
    if _preferred != "triton" or torch.compiler.is_compiling() or not is_plain(x, y, added):
        return False
    from steepest.linalg.triton_symmetric import serves

    return serves(x, y, added) and not differentiated(x, y, added)


def _panels(x: Tensor, *others: Tensor | None) -> int:
    """Into how many panels a symmetric product [n, n] of X [n, k] is cut; 1 where it does not pay.

    What is written panel by panel into one tensor loses derivatives: then it is 1 too.
    """
    if x.device.type != "cpu" or x.dtype not in _NARROWEST:
        return 1
    panels = max(1, min(_MOST_PANELS, x.shape[-2] // _NARROWEST[x.dtype]))
    return 1 if panels > 1 and differentiated(x, *others) else panels


def _cuts(rows: int, panels: int) -> Iterator[tuple[int, int]]:
    size = -(-rows // panels)
    for first in range(0, rows, size):
        yield first, min(first + size, rows)
