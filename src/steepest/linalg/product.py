"""Multiply matrices with the fastest library available: the only place that decides between libraries."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["differentiated", "is_plain", "product"]

# Below this many multiplications, calling oneDNN costs more than it saves, measured on a CPU with 2 threads.
_ONEDNN_FROM = 1 << 22


def product(
    x: Tensor, y: Tensor, *, added: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    """Compute β ``added`` + α X Y, [..., m, n]: torch.baddbmm for any number of batch dimensions.

    X and Y have the same ones. With ``beta=0``, ``added`` is not read.

    On a CPU with AVX-512, float32 products use oneDNN, as torch's half-precision products do anyway. torch
    itself would use MKL there, which reaches half of the processor's speed unless Intel made the processor.
    Both sum in float32, but in a different order. ``torch.backends.mkldnn.enabled = False`` selects MKL.

    >>> product(torch.eye(2), torch.ones(2, 2), added=torch.eye(2), alpha=0.5, beta=2.0)
    tensor([[2.5000, 0.5000],
            [0.5000, 2.5000]])
    """
    if beta == 0:
        added = None
    # Small products are many, and asking more of them would take as long as they do.
    large = x.shape[-2] * x.shape[-1] * y.shape[-1] >= _ONEDNN_FROM
    if large and x.is_cpu and _goes_to_onednn(x, y, added):
        return _by_onednn(x, y, added, alpha, beta)
    if added is None:
        # torch.matmul would first copy a transposed operand of a batched product; torch.bmm does not.
        bare = torch.bmm(x, y) if x.dim() == 3 else x @ y
        return bare if alpha == 1 else alpha * bare
    if x.dim() == 3:
        return torch.baddbmm(added, x, y, alpha=alpha, beta=beta)
    if x.dim() == 2:
        return torch.addmm(added, x, y, alpha=alpha, beta=beta)
    return beta * added + alpha * (x @ y)


def _goes_to_onednn(x: Tensor, y: Tensor, added: Tensor | None) -> bool:
    # The oneDNN operation has no derivative, and neither tracers nor tensor subclasses support it.
    return (
        all(each is None or (each.dtype == torch.float32 and each.is_cpu) for each in (x, y, added))
        and bool(torch.backends.mkldnn.enabled)
        and not torch.compiler.is_compiling()
        and is_plain(x, y, added)
        and not differentiated(x, y, added)
        and _onednn_linear() is not None
    )


def differentiated(*tensors: Tensor | None) -> bool:
    """Return whether autograd may differentiate a result of these tensors, in backward or forward mode."""
    # A tensor wrapped by torch.func does not reveal whether a transform differentiates it.
    if torch._C._are_functorch_transforms_active():
        return True
    there = [each for each in tensors if each is not None]
    if torch.is_grad_enabled() and any(each.requires_grad for each in there):
        return True
    tangents = (forward_ad.unpack_dual(each).tangent for each in there)  # type: ignore[no-untyped-call]
    return any(tangent is not None for tangent in tangents)


def is_plain(*tensors: Tensor | None) -> bool:
    """Return whether no tensor is of a subclass with its own dispatch: sharded, fake or quantized."""
    plain = Tensor.__torch_dispatch__
    return all(each is None or type(each).__torch_dispatch__ is plain for each in tensors)


@functools.cache
def _onednn_linear() -> Any:
    """Return oneDNN's X, W -> X Wᵀ, which torch.compile lowers to; None where it is missing or slower."""
    built: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    capable = built and torch.cpu.get_capabilities().get("avx512_f")
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None) if capable else None


def _by_onednn(x: Tensor, y: Tensor, added: Tensor | None, alpha: float, beta: float) -> Tensor:
    shape = (*x.shape[:-1], y.shape[-1])
    lefts, rights = x.reshape(-1, *x.shape[-2:]), y.reshape(-1, *y.shape[-2:])
    if len(lefts) == 1:  # no copy into a batch
        return _scaled(_linear(lefts[0], rights[0]).view(shape), added, alpha, beta)
    whole = x.new_empty(shape)
    for into, left, right in zip(whole.flatten(0, -3), lefts, rights, strict=True):
        into.copy_(_linear(left, right))
    return _scaled(whole, added, alpha, beta)


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
