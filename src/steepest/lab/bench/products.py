"""The matrix products of a step: which they are, and how long the machine needs for them alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
# Which two arguments are multiplied.
_PRODUCTS: dict[Any, tuple[int, int]] = {
    _aten.mm: (0, 1),
    _aten.bmm: (0, 1),
    _aten.addmm: (1, 2),
    _aten.baddbmm: (1, 2),
}


@dataclass(frozen=True)
class Product:
    """[batch, rows, inner] times [batch, inner, columns]; `turned` says which operand is a transpose.

    A transposed operand is read in another order than a plain one, so it takes another time.
    """

    batch: int
    rows: int
    inner: int
    columns: int
    dtype: torch.dtype
    turned: tuple[bool, bool] = (False, False)

    @property
    def flops(self) -> int:
        """A multiplication and an addition for every triple of indices."""
        return 2 * self.batch * self.rows * self.inner * self.columns

    def rehearse(self, device: torch.device) -> Callable[[], Tensor]:
        """A function that computes such a product, of numbers of its own."""
        one = _operand(self.batch, self.rows, self.inner, self.turned[0], self.dtype, device)
        two = _operand(self.batch, self.inner, self.columns, self.turned[1], self.dtype, device)
        out = torch.empty(self.batch, self.rows, self.columns, dtype=self.dtype, device=device)
        if self.batch == 1:
            return lambda: torch.mm(one[0], two[0], out=out[0])
        return lambda: torch.bmm(one, two, out=out)

    def __str__(self) -> str:
        batch = f"{self.batch}×" if self.batch > 1 else ""
        marks = ["ᵀ" if turned else "" for turned in self.turned]
        return (
            f"{batch}[{self.rows}×{self.inner}]{marks[0]}·[{self.inner}×{self.columns}]{marks[1]} "
            f"{str(self.dtype).removeprefix('torch.')}"
        )


def _operand(
    batch: int, rows: int, columns: int, turned: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    shape = (batch, columns, rows) if turned else (batch, rows, columns)
    made = torch.randn(shape, device=device).to(dtype)
    return made.mT if turned else made


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[Product] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        places = _PRODUCTS.get(func.overloadpacket)
        if places is not None:
            one, two = (args[place] for place in places)
            batch = one.shape[0] if one.dim() == 3 else 1
            rows, inner, columns = one.shape[-2], one.shape[-1], two.shape[-1]
            turned = (_is_turned(one), _is_turned(two))
            self.products[Product(batch, rows, inner, columns, one.dtype, turned)] += 1
        return func(*args, **(kwargs or {}))


def _is_turned(operand: Tensor) -> bool:
    return operand.stride(-1) != 1 and operand.stride(-2) == 1


def products_of(act: Callable[[], object]) -> dict[Product, int]:
    """The products that `act` computes by torch's operations, with how often it does.

    Solvers, decompositions and what a compiler has made kernels of are not seen.

    Example:
        >>> a, b = torch.ones(2, 3), torch.ones(3, 4)
        >>> {str(product): count for product, count in products_of(lambda: a @ b).items()}
        {'[2×3]·[3×4] float32': 1}
    """
    with _Recorder() as recorder:
        act()
    return dict(recorder.products)


def flops_of(products: Mapping[Product, int]) -> int:
    """Of all of them."""
    return sum(count * product.flops for product, count in products.items())
