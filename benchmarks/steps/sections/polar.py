"""Newton-Schulz: the error of each coefficient set and normalization, and its time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from statistics import mean
from typing import Any, get_args

import torch
from torch import Tensor

from steepest.lab.training.seeding import seeded
from steepest.linalg import COEFFICIENTS, Normalization, newton_schulz
from steepest.model_shapes import ModelShapes

from ..config import BenchConfig, log
from ..momenta import momenta, random_matrices
from ..results import Column, Result, Row, timed

SETS = ("jordan", "quintic", "polar_express", "minimax_9_17_3", "minimax_17_17_3", "minimax_17_17")
KINDS = ("gaussian", "heavy-tailed", "low rank + noise", "momenta")
TORCH = "torch.optim.Muon"

Polar = Callable[[Tensor], Tensor]

_ERRORS = (
    Column("set", "coefficients"),
    Column("norm", "norm"),
    *(Column(kind, kind) for kind in KINDS),
    Column("top", "largest σ", "ratio"),
)
_TIMES = (
    Column("set", "coefficients"),
    Column("norm", "norm"),
    Column("ms", "ms", "ms"),
    Column("times_faster", "× torch", "ratio"),
)
_ERROR_NOTE = (
    "‖Y − UVᵀ‖_F / √r, mean / worst over the matrices, for the result Y in bfloat16 and the polar factor UVᵀ "
    "of the SVD in float64; the largest singular value of all results. Random matrices: {rows} rows, as many "
    "and three times as many columns. Momenta: of a GPT of width {width} at three of {steps} steps on the "
    "text task."
)
_TIME_NOTE = (
    "Medians of {rounds} interleaved rounds over the hidden matrices of one block, one after the other, in "
    "bfloat16; torch's function over ours. Above 1, ours is faster."
)


def run(config: BenchConfig) -> Iterator[Result]:
    """Yield a table of errors, then one of times with the shapes of each model."""
    log("errors of polar factors")
    yield errors(config)
    for shapes in config.models:
        log(f"polar factors with {shapes.title}'s shapes")
        yield _times(shapes, config)


def errors(config: BenchConfig) -> Result:
    """Compare all sets and norms on all kinds of matrices."""
    rows, width, steps = (32, 16, 2) if config.toy else (256, 96, 200)
    if config.full:
        width = 256
    matrices = {**random_matrices(rows), "momenta": momenta(width, steps)}
    exact = {kind: [_polar(x) for x in each] for kind, each in matrices.items()}
    table: list[Row] = []
    for name, norm, function in _functions(get_args(Normalization)):
        row: Row = {"set": name, "norm": norm, "top": 0.0}
        for kind in KINDS:
            found = [function(x.to(config.device)).double().cpu() for x in matrices[kind]]
            off = [
                (float(torch.linalg.vector_norm(y - polar)) / min(y.shape) ** 0.5)
                for y, polar in zip(found, exact[kind], strict=True)
            ]
            row[kind] = f"{mean(off):.3f} / {max(off):.3f}"
            row[f"{kind}, mean"], row[f"{kind}, worst"] = mean(off), max(off)
            row["top"] = max(row["top"], *map(_spectral_norm, found))
        table.append(row)
    note = _ERROR_NOTE.format(rows=rows, width=width, steps=steps)
    return Result("polar", "Errors of polar factors", _ERRORS, table, [note])


def _times(shapes: ModelShapes, config: BenchConfig) -> Result:
    with seeded(0):
        matrices = [
            torch.randn(each.shape[0], each.numel // each.shape[0], device=config.device)
            for each in shapes.hidden(1)
        ]

    def all_of(function: Polar) -> None:
        for x in matrices:
            function(x)

    functions = [each for each in _functions(("frobenius", "schatten8", "aol")) if _timed(*each[:2])]
    times = config.time({f"{name} {norm}": partial(all_of, function) for name, norm, function in functions})
    theirs = next(iter(times.values()))
    rows: list[Row] = [
        {"set": name, "norm": norm, **timed(timing), "times_faster": theirs.ratio(timing)}
        for (name, norm, _), timing in zip(functions, times.values(), strict=True)
    ]
    title = f"Times of polar factors with {shapes.title}'s shapes"
    return Result("polar", title, _TIMES, rows, [_TIME_NOTE.format(rounds=config.rounds)])


def _timed(name: str, norm: str) -> bool:
    """Return whether a row is timed: each set with its own norm, and one set with each norm."""
    return name in (TORCH, "jordan") or norm == COEFFICIENTS[name].normalization


def _functions(norms: tuple[str, ...]) -> list[tuple[str, str, Polar]]:
    """Return (coefficients, norm, function), torch's own first."""
    ours: list[tuple[str, str, Polar]] = [
        (name, norm, partial(_ours, name=name, norm=norm)) for name, norm in product(SETS, norms)
    ]
    return [(TORCH, "frobenius", _torch), *ours]


def _ours(x: Tensor, *, name: str, norm: Any) -> Tensor:
    return newton_schulz(x, name, normalization=norm, dtype=torch.bfloat16)


def _torch(x: Tensor) -> Tensor:
    # Imported here because the module is private.
    from torch.optim._muon import _zeropower_via_newtonschulz

    result: Tensor = _zeropower_via_newtonschulz(x, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    return result


def _spectral_norm(x: Tensor) -> float:
    # A tenth of the time of the SVD, and the largest singular value as exact.
    gram = x @ x.mT if x.shape[0] <= x.shape[1] else x.mT @ x
    return math.sqrt(float(torch.linalg.eigvalsh(gram)[-1]))


def _polar(x: Tensor) -> Tensor:
    u, _, vt = torch.linalg.svd(x.double(), full_matrices=False)
    polar: Tensor = u @ vt
    return polar
