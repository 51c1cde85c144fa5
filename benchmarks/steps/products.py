"""Matrix products (matmuls): find those of a step in a profile, and run each one alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# The positions of the two factors among the arguments.
_FACTORS = {"aten::mm": (0, 1), "aten::bmm": (0, 1), "aten::addmm": (1, 2), "aten::baddbmm": (1, 2)}
# X Wᵀ of X and W on a CPU, which steepest uses for float32 products.
_BY_ONEDNN = "mkldnn::_linear_pointwise"
_DTYPES = {
    "float": torch.float32,
    "double": torch.float64,
    "c10::BFloat16": torch.bfloat16,
    "c10::Half": torch.float16,
}


@dataclass(frozen=True)
class Product:
    """[batch, rows, inner] times [batch, inner, columns].

    The time also depends on which operands are `transposed` views, because memory is read in another
    order, and on the library: with `onednn`, oneDNN computes a float32 product instead of torch's default.
    """

    batch: int
    rows: int
    inner: int
    columns: int
    dtype: torch.dtype
    transposed: tuple[bool, bool] = (False, False)
    onednn: bool = False

    @property
    def flops(self) -> int:
        """Number of multiplications and additions."""
        return 2 * self.batch * self.rows * self.inner * self.columns

    def runner(self, device: torch.device) -> Callable[[], Tensor]:
        """Return a function that computes such a product of random matrices."""
        one = _operand(self.batch, self.rows, self.inner, self.transposed[0], self.dtype, device)
        two = _operand(self.batch, self.inner, self.columns, self.transposed[1], self.dtype, device)
        if self.onednn:
            linear = torch.ops.mkldnn._linear_pointwise
            return lambda: linear(one[0], two[0].mT, None, "none", [], "")
        out = torch.empty(self.batch, self.rows, self.columns, dtype=self.dtype, device=device)
        if self.batch == 1:
            return lambda: torch.mm(one[0], two[0], out=out[0])
        return lambda: torch.bmm(one, two, out=out)

    def __str__(self) -> str:
        batch = f"{self.batch}×" if self.batch > 1 else ""
        marks = ["ᵀ" if transposed else "" for transposed in self.transposed]
        return (
            f"{batch}[{self.rows}×{self.inner}]{marks[0]}·[{self.inner}×{self.columns}]{marks[1]} "
            f"{str(self.dtype).removeprefix('torch.')}{' by oneDNN' * self.onednn}"
        )


def _operand(
    batch: int, rows: int, columns: int, transposed: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    shape = (batch, columns, rows) if transposed else (batch, rows, columns)
    values = torch.randn(shape, device=device).to(dtype)
    return values.mT if transposed else values


def count_products(events: Iterable[Mapping[str, Any]]) -> dict[Product, int]:
    """Count the products among a profiler's trace events.

    This finds all products that torch's operations compute, also in compiled code, but not solvers,
    decompositions, and products inside compiler-generated kernels.

    Example:
        >>> event = {
        ...     "name": "aten::mm",
        ...     "args": {
        ...         "Input Dims": [[2, 3], [3, 4]],
        ...         "Input Strides": [[3, 1], [1, 3]],
        ...         "Input type": ["float", "float"],
        ...     },
        ... }
        >>> {str(product): count for product, count in count_products([event, event]).items()}
        {'[2×3]·[3×4]ᵀ float32': 2}
    """
    counted: Counter[Product] = Counter()
    for event in events:
        name = str(event.get("name"))
        if name == _BY_ONEDNN:
            counted[_by_onednn(event["args"])] += 1
        factors = _FACTORS.get(name)
        if factors is None:
            continue
        args = event["args"]
        one, two = (args["Input Dims"][index] for index in factors)
        strides = [args["Input Strides"][index] for index in factors]
        dtype = _DTYPES.get(args["Input type"][factors[0]])
        if dtype is not None:
            batch = one[0] if len(one) == 3 else 1
            transposed = (_is_transposed(strides[0]), _is_transposed(strides[1]))
            counted[Product(batch, one[-2], one[-1], two[-1], dtype, transposed)] += 1
    return dict(counted)


def _by_onednn(args: Mapping[str, Any]) -> Product:
    (rows, inner), (columns, _) = args["Input Dims"][:2]
    one, two = args["Input Strides"][:2]
    # The operation receives the transpose of the second factor.
    transposed = (_is_transposed(one), two[-1] == 1)
    return Product(1, rows, inner, columns, _DTYPES[args["Input type"][0]], transposed, onednn=True)


def _is_transposed(strides: Sequence[int]) -> bool:
    return strides[-1] != 1 and strides[-2] == 1


def total_flops(products: Mapping[Product, int]) -> int:
    """Return the flops of all products together."""
    return sum(count * product.flops for product, count in products.items())
