"""Choose how a Newton-Schulz run computes its polynomials: the form, the dtype, and the side it works on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from steepest.autotuning import choose
from steepest.linalg.gram_polynomial import DEGREES, Polynomial
from steepest.linalg.normalization import Normalization
from steepest.linalg.product import is_free, product

__all__ = ["Form", "Iterations", "Way", "choose_way", "cpu_multiplies_bfloat16", "runs_of"]

Form = Literal["auto", "plain", "gram"]

# Multiplications of a Gram matrix from which ways are compared.
_COMPARED = 1 << 21

# Columns of tall matrices from which transposing them saves more time in products than it takes.
_TURNED = 512

_FEW = 32
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Iterations(NamedTuple):
    """What a run computes.

    Attributes:
        schedule: the polynomials.
        normalization: the norm by which X is divided first.
        margin: a factor on that norm.
        first_run: iterations of the first run in bfloat16.
    """

    schedule: tuple[Polynomial, ...]
    normalization: Normalization
    margin: float
    first_run: int = 1

    @property
    def words(self) -> str:
        """Its name, as far as time depends on it, such as "5 iterations" or "degrees 9 17 3, schatten8"."""
        degrees = [DEGREES[len(polynomial)] for polynomial in self.schedule]
        name = f"{len(degrees)} iterations"
        if {*degrees} != {5}:
            name = f"degrees {' '.join(map(str, degrees))}"
        return name if self.normalization == "frobenius" else f"{name}, {self.normalization}"


class Way(NamedTuple):
    """A way to run the iterations.

    Attributes:
        by_gram: the Gram form.
        dtype: of the products.
        turned: tall matrices are transposed first, and back by the last product.
    """

    by_gram: bool
    dtype: torch.dtype
    turned: bool

    @property
    def words(self) -> str:
        """Its name, such as "gram bfloat16 turned"."""
        return f"{'gram' if self.by_gram else 'plain'} {str(self.dtype)[6:]}{' turned' * self.turned}"


def choose_way(
    x: Tensor,
    plan: Iterations,
    form: Form,
    dtype: torch.dtype | None,
    gram_in_bfloat16: bool,
    iterate: Callable[[Tensor, Iterations, Way], Tensor] | None,
) -> Way:
    """Return the way for matrices [b, m, n]; ``iterate`` runs it, to be timed; None times nothing.

    The default is the form with fewer flops, in bfloat16 where the processor has instructions for it.
    """
    m, n = x.shape[-2:]
    rows, columns = min(m, n), max(m, n)
    # k iterations cost 4r²n + (8k − 6)r³ flops as one Gram run and k·(4r²n + 2r³) in the plain form: each one
    # that continues a run costs 6r³ instead of 4r²n, whatever its degree, which is less for n > 1.5 r.
    measured = rows * rows * columns >= _COMPARED and is_free(x, x, None)
    if (
        measured
        and dtype is None
        and x.is_cpu
        and _computing_dtype(x.dtype, "cpu", False, rows) == torch.bfloat16
    ):
        dtype = _faster_dtype(rows, timed=iterate is not None)
    default = _way(x, form, dtype, 2 * columns > 3 * rows, m > n and n >= _TURNED, gram_in_bfloat16)
    if not measured:
        return default
    others = {
        _way(x, form, dtype, by_gram, turned, gram_in_bfloat16)
        for by_gram in (False, True)
        for turned in {False, m > n}
    }
    if len(others | {default}) == 1:
        return default
    ways = {way.words: way for way in (default, *sorted(others - {default}, key=str))}

    def trials() -> dict[str, Callable[[], Tensor]]:
        assert iterate is not None
        run = iterate

        def timed(way: Way) -> Tensor:
            given = torch.full_like(x, x[0].numel() ** -0.5, memory_format=torch.contiguous_format)
            return run(given, plan, way)

        return {words: partial(timed, way) for words, way in ways.items()}

    # Options that exclude ways make it another question.
    among = "/".join(sorted(ways))
    question = ("newton_schulz", str(x.dtype)[6:], f"{m}x{n}", plan.words, f"({among})")
    return ways[choose(question, x.device, list(ways), None if iterate is None else trials)]


def _faster_dtype(rows: int, timed: bool) -> torch.dtype:
    """Return the dtype in which a CPU multiplies squares faster."""
    host = torch.device("cpu")

    def trials() -> dict[str, Callable[[], Tensor]]:
        squares = [torch.full((1, rows, rows), 0.01, dtype=each, device=host) for each in _DTYPES.values()]
        return {words: partial(product, each, each) for words, each in zip(_DTYPES, squares, strict=True)}

    question = ("newton_schulz dtype", f"{rows} rows")
    return _DTYPES[choose(question, host, list(_DTYPES), trials if timed else None)]


def _way(
    x: Tensor, form: Form, dtype: torch.dtype | None, by_gram: bool, turned: bool, gram_in_bfloat16: bool
) -> Way:
    by_gram = form == "gram" or (form == "auto" and by_gram)
    dtype = dtype or _computing_dtype(x.dtype, x.device.type, by_gram, min(x.shape[-2:]))
    if form == "auto" and dtype == torch.bfloat16 and not gram_in_bfloat16:
        by_gram = False
    return Way(by_gram, dtype, turned)


def runs_of(plan: Iterations, by_gram: bool, dtype: torch.dtype) -> list[tuple[Polynomial, ...]]:
    """Split the schedule into runs that start by computing R from X; the plain form has runs of one."""
    schedule = plan.schedule
    if not by_gram:
        starts = [*range(len(schedule))]
    elif any(len(polynomial) > 3 for polynomial in schedule):
        starts = _starts_of_high_degrees(schedule, dtype)
    elif dtype == torch.bfloat16:
        # 8 bits tolerate one amplification of a rounding error, but not by the steepest triples, unless
        # another run follows, which corrects it.
        first = plan.first_run if len(schedule) > plan.first_run else 1
        starts = [0, *range(first, len(schedule), 2)]
    else:
        starts = [0, *range(2, len(schedule), 3)]
    return [schedule[start:end] for start, end in zip(starts, [*starts[1:], len(schedule)], strict=True)]


def _starts_of_high_degrees(schedule: tuple[Polynomial, ...], dtype: torch.dtype) -> list[int]:
    """Return where runs start: in half precision, before all steep polynomials, which amplify errors."""
    half = dtype.itemsize == 2
    starts = [0]
    for index, polynomial in enumerate(schedule[1:], 1):
        length = index - starts[-1]
        if length == (2 if half else 3) or (half and len(polynomial) > 3):
            starts.append(index)
    return starts


def _computing_dtype(dtype: torch.dtype, device_type: str, by_gram: bool, rows: int) -> torch.dtype:
    if dtype == torch.float64:
        return dtype
    if device_type == "cpu":
        # With fewer rows, converting to bfloat16 costs more time than the faster products save.
        return torch.bfloat16 if rows >= 128 and cpu_multiplies_bfloat16() else torch.float32
    # In half precision, rounding errors of a few rows can leave the band without bound.
    if rows < _FEW or device_type != "cuda" or not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float32
    return torch.float16 if by_gram or dtype == torch.float16 else torch.bfloat16


@functools.cache
def cpu_multiplies_bfloat16() -> bool:
    """Return whether this CPU has bfloat16 products (AVX-512 BF16, AMX); without them, emulation is slow."""
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))
