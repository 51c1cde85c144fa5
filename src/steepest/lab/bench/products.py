"""The matrix products of a step: which they are, and how long the machine needs for them alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Which two arguments are multiplied.
_PRODUCTS = {"aten::mm": (0, 1), "aten::bmm": (0, 1), "aten::addmm": (1, 2), "aten::baddbmm": (1, 2)}
# X Wᵀ of X and W, on a CPU: our own float32 products.
_BY_ONEDNN = "mkldnn::_linear_pointwise"
_DTYPES = {
    "float": torch.float32,
    "double": torch.float64,
    "c10::BFloat16": torch.bfloat16,
    "c10::Half": torch.float16,
}


@dataclass(frozen=True)
class Product:
    """[batch, rows, inner] times [batch, inner, columns]; `turned` says which operand is a transpose.

    A transposed operand is read in another order than a plain one, so it takes another time; and so it does
    in another library: `onednn` says that oneDNN multiplies float32, where torch would take its own choice.
    """

    batch: int
    rows: int
    inner: int
    columns: int
    dtype: torch.dtype
    turned: tuple[bool, bool] = (False, False)
    onednn: bool = False

    @property
    def flops(self) -> int:
        """A multiplication and an addition for every triple of indices."""
        return 2 * self.batch * self.rows * self.inner * self.columns

    def rehearse(self, device: torch.device) -> Callable[[], Tensor]:
        """A function that computes such a product, of numbers of its own."""
        one = _operand(self.batch, self.rows, self.inner, self.turned[0], self.dtype, device)
        two = _operand(self.batch, self.inner, self.columns, self.turned[1], self.dtype, device)
        if self.onednn:
            linear = torch.ops.mkldnn._linear_pointwise
            return lambda: linear(one[0], two[0].mT, None, "none", [], "")
        out = torch.empty(self.batch, self.rows, self.columns, dtype=self.dtype, device=device)
        if self.batch == 1:
            return lambda: torch.mm(one[0], two[0], out=out[0])
        return lambda: torch.bmm(one, two, out=out)

    def __str__(self) -> str:
        batch = f"{self.batch}×" if self.batch > 1 else ""
        marks = ["ᵀ" if turned else "" for turned in self.turned]
        return (
            f"{batch}[{self.rows}×{self.inner}]{marks[0]}·[{self.inner}×{self.columns}]{marks[1]} "
            f"{str(self.dtype).removeprefix('torch.')}{' by oneDNN' * self.onednn}"
        )


def _operand(
    batch: int, rows: int, columns: int, turned: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    shape = (batch, columns, rows) if turned else (batch, rows, columns)
    made = torch.randn(shape, device=device).to(dtype)
    return made.mT if turned else made


def products_in(events: Iterable[Mapping[str, Any]]) -> dict[Product, int]:
    """The products among a profiler's trace events, with how often each is computed.

    They are seen wherever torch's own operations compute them, in compiled code too. Solvers,
    decompositions, and products that a compiler makes kernels of are not.

    Example:
        >>> event = {
        ...     "name": "aten::mm",
        ...     "args": {
        ...         "Input Dims": [[2, 3], [3, 4]],
        ...         "Input Strides": [[3, 1], [1, 3]],
        ...         "Input type": ["float", "float"],
        ...     },
        ... }
        >>> {str(product): count for product, count in products_in([event, event]).items()}
        {'[2×3]·[3×4]ᵀ float32': 2}
    """
    counted: Counter[Product] = Counter()
    for event in events:
        name = str(event.get("name"))
        if name == _BY_ONEDNN:
            counted[_by_onednn(event["args"])] += 1
        places = _PRODUCTS.get(name)
        if places is None:
            continue
        args = event["args"]
        one, two = (args["Input Dims"][place] for place in places)
        strides = [args["Input Strides"][place] for place in places]
        dtype = _DTYPES.get(args["Input type"][places[0]])
        if dtype is not None:
            batch = one[0] if len(one) == 3 else 1
            turned = (_is_turned(strides[0]), _is_turned(strides[1]))
            counted[Product(batch, one[-2], one[-1], two[-1], dtype, turned)] += 1
    return dict(counted)


def _by_onednn(args: Mapping[str, Any]) -> Product:
    (rows, inner), (columns, _) = args["Input Dims"][:2]
    one, two = args["Input Strides"][:2]
    # What it is given is the second operand's transpose.
    turned = (_is_turned(one), two[-1] == 1)
    return Product(1, rows, inner, columns, _DTYPES[args["Input type"][0]], turned, onednn=True)


def _is_turned(strides: Sequence[int]) -> bool:
    return strides[-1] != 1 and strides[-2] == 1


def flops_of(products: Mapping[Product, int]) -> int:
    """Of all of them."""
    return sum(count * product.flops for product, count in products.items())
