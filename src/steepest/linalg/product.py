"""Matrix products by the fastest library at hand: the one place that knows which multiplies what."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["differentiated", "is_plain", "product"]

# Shorter ones cost more to hand over than they save: measured on a CPU (2 threads), where 128 rows are even.
_ONEDNN_FROM = 1 << 22


def product(
    x: Tensor, y: Tensor, *, added: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    r"""β ``added`` + α X Y, [..., m, n]: what torch.baddbmm is, for any batch dimensions.

    float32 on a CPU with AVX-512 goes through oneDNN, as half precision does in torch anyway: torch's own
    choice there, MKL, runs at half of the processor's speed where Intel did not make it. The sums are
    float32's in both, in another order. ``torch.backends.mkldnn.enabled = False`` keeps MKL.

    Args:
        x: [..., m, k].
        y: [..., k, n], the batch dimensions ``x``'s.
        added: [..., m, n]; None is zero.
        alpha, beta: the factors.

    >>> product(torch.eye(2), torch.ones(2, 2), added=torch.eye(2), alpha=0.5, beta=2.0)
    tensor([[2.5000, 0.5000],
            [0.5000, 2.5000]])
    """
    if _goes_to_onednn(x, y, added):
        return _by_onednn(x, y, added, alpha, beta)
    if added is None or beta == 0:
        # Of a batch, matmul would copy a transposed operand first.
        bare = torch.bmm(x, y) if x.dim() == 3 else x @ y
        return bare if alpha == 1 else alpha * bare
    if x.dim() == 3:
        return torch.baddbmm(added, x, y, alpha=alpha, beta=beta)
    if x.dim() == 2:
        return torch.addmm(added, x, y, alpha=alpha, beta=beta)
    return beta * added + alpha * (x @ y)


def _goes_to_onednn(x: Tensor, y: Tensor, added: Tensor | None) -> bool:
    operands = [each for each in (x, y, added) if each is not None]
    if any(each.dtype != torch.float32 or each.device.type != "cpu" for each in operands):
        return False
    if x.shape[-2] * x.shape[-1] * y.shape[-1] < _ONEDNN_FROM or not torch.backends.mkldnn.enabled:
        return False
    # It has no derivative, and says nothing to a tracer or a subclass.
    if torch.compiler.is_compiling() or not is_plain(*operands):
        return False
    return not differentiated(*operands) and _onednn_linear() is not None


def differentiated(*tensors: Tensor | None) -> bool:
    """Whether what is computed of these may need a derivative, backward or forward.

    >>> x = torch.ones(1, requires_grad=True)
    >>> differentiated(x), differentiated(x.detach(), None)
    (True, False)
    """
    # A tensor that torch.func has wrapped does not say what it is differentiated by.
    if (transforming := getattr(torch._C, "_are_functorch_transforms_active", None)) and transforming():
        return True
    there = [each for each in tensors if each is not None]
    if torch.is_grad_enabled() and any(each.requires_grad for each in there):
        return True
    tangents = (forward_ad.unpack_dual(each).tangent for each in there)  # type: ignore[no-untyped-call]
    return any(tangent is not None for tangent in tangents)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether these are tensors and no subclass that computes by itself: sharded, fake, quantized.

    >>> is_plain(torch.ones(1), None), is_plain(torch.nn.Parameter(torch.ones(1)))
    (True, True)
    """
    return all(each is None or type(each).__torch_dispatch__ is _PLAIN for each in tensors)


_PLAIN = Tensor.__torch_dispatch__


@functools.cache
def _onednn_linear() -> Any:
    """X, W -> X Wᵀ, where this machine has it and it pays: the operation that torch.compile lowers to."""
    built: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    capable = built and torch.cpu.get_capabilities().get("avx512_f")
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None) if capable else None


def _by_onednn(x: Tensor, y: Tensor, added: Tensor | None, alpha: float, beta: float) -> Tensor:
    if x.dim() == 2:
        return _scaled(_linear(x, y), added, alpha, beta)
    if x.shape[:-2].numel() == 1:
        # A stack of one is not worth a copy.
        whole = _linear(x.reshape(x.shape[-2:]), y.reshape(y.shape[-2:])).view(*x.shape[:-1], y.shape[-1])
    else:
        whole = x.new_empty(*x.shape[:-1], y.shape[-1])
        each = zip(whole.flatten(0, -3), x.flatten(0, -3), y.flatten(0, -3), strict=True)
        for into, one, other in each:
            into.copy_(_linear(one, other))
    return _scaled(whole, added, alpha, beta)


def _linear(x: Tensor, y: Tensor) -> Tensor:
    # A second operand with gaps between its rows would be multiplied element by element.
    if not (y.is_contiguous() or y.mT.is_contiguous()):
        y = y.contiguous()
    result: Tensor = _onednn_linear()(x, y.mT, None, "none", [], "")
    return result


def _scaled(bare: Tensor, added: Tensor | None, alpha: float, beta: float) -> Tensor:
    if beta == 0:
        added = None
    if added is not None and beta == 1:
        return torch.add(added, bare, alpha=alpha, out=bare)
    bare = bare if alpha == 1 else bare.mul_(alpha)
    return bare if added is None else bare.add_(added, alpha=beta)
