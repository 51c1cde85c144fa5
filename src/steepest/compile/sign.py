"""The sign of float32 in integer arithmetic, as Inductor is told to compute it on a CPU.

Inductor's own takes two comparisons, whose masks it turns into vectors and back: half of the time of a sign
rule's loop over data in the cache. Integers need neither.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["name", "sign", "with_sign"]

_ONE, _INFINITY, _MAGNITUDE = 0x3F800000, 0x7F800000, 0x7FFFFFFF


def sign(x: Tensor) -> Tensor:
    """Compute ``torch.sign(x)`` of float32, bit by bit the same: 0 for ±0 and NaN.

    >>> sign(torch.tensor([-2.0, -0.0, 1e-45, float("nan")]))
    tensor([-1.,  0.,  1.,  0.])
    """
    bits = x.view(torch.int32)
    magnitude = bits & _MAGNITUDE
    nonzero = -magnitude.clamp(max=1)  # all ones, or 0
    number = ~((_INFINITY - magnitude) >> 31)  # 0 for NaN
    return ((bits & ~_MAGNITUDE | _ONE) & nonzero & number).view(torch.float32)


def with_sign(table: dict[Any, Any]) -> dict[Any, Any]:
    """Return Inductor's table of decompositions with this one of ``sign`` for the CPU."""
    return _Nameable({**table, torch.ops.aten.sign.default: _sign_on_cpu})


def _sign_on_cpu(x: Tensor) -> Any:
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return NotImplemented
    return sign(x)


def name() -> str:
    """Return what names this definition in Inductor's caches on disk."""
    codes = [each.__code__ for each in (sign, _sign_on_cpu)]
    parts = [(code.co_code, code.co_consts, code.co_names) for code in codes]
    return f"steepest.sign {parts} {_ONE} {_INFINITY} {_MAGNITUDE}"


class _Nameable(dict[Any, Any]):
    """A table of decompositions that Inductor's cache on disk can name.

    The cache finds code by what it was made with, pickled. A table whose functions cannot be pickled has no
    name: nothing made with it is cached, and every process compiles anew. Torch's version, which is in every
    name, stands for torch's functions.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (name(),)
