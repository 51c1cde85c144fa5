"""Fused parameters: how to say that one parameter is several logical matrices.

A view is plain data, so that it lives in a param group and in a checkpoint:
``views={"attn.qkv.weight": rows(d, d, d)}``, keyed by parameter name.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

import torch

from steepest.hyperparameters import Hyperparameter

__all__ = ["View", "check_view", "columns", "cut", "fused_parameters", "heads", "rows"]

View = tuple[str, tuple[int, ...]]


def rows(*sizes: int) -> View:
    """Blocks of rows (dimension 0) of these sizes: a fused QKV projection is ``rows(d, d, d)``.

    Raises:
        ValueError: no sizes, or one that is not an integer ≥ 1.

    >>> rows(4, 2, 2)
    ('rows', (4, 2, 2))
    """
    return "rows", _sizes(sizes)


def columns(*sizes: int) -> View:
    """Blocks of columns, or of whatever dimension 1 is, of these sizes.

    Raises:
        ValueError: no sizes, or one that is not an integer ≥ 1.

    >>> columns(3, 3)
    ('columns', (3, 3))
    """
    return "columns", _sizes(sizes)


def heads(count: int, size: int) -> View:
    """``count`` blocks of ``size`` rows each: every head by itself.

    Raises:
        ValueError: ``count`` or ``size`` is not an integer ≥ 1.

    >>> heads(3, 64)
    ('rows', (64, 64, 64))
    """
    if not (_is_size(count) and _is_size(size)):
        raise ValueError(f"heads() takes how many and their size, integers ≥ 1, got {count!r} and {size!r}")
    return rows(*([size] * int(count)))


def _sizes(sizes: tuple[int, ...]) -> tuple[int, ...]:
    if not sizes or not all(_is_size(size) for size in sizes):
        raise ValueError(f"a view needs block sizes, integers ≥ 1, got {sizes!r}")
    # Other libraries' integers would keep a checkpoint from loading.
    return tuple(int(size) for size in sizes)


def _is_size(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 1


def fused_parameters() -> Hyperparameter:
    """The option ``views`` of rules that see matrices; what the views are is checked with the parameters."""
    return Hyperparameter(
        None, lambda value: value is None or isinstance(value, Mapping), "None or a dict of views by name"
    )


def check_view(who: str, view: Any, shape: torch.Size) -> None:
    """Raise ``ValueError`` unless the blocks fill the parameter's dimension exactly."""
    kind, sizes = view if isinstance(view, (tuple, list)) and len(view) == 2 else (None, ())
    if kind not in ("rows", "columns"):
        raise ValueError(f"{who}: a view is rows(...), columns(...) or heads(...), got {view!r}")
    if not isinstance(sizes, (tuple, list)) or any(type(size) is not int or size < 1 for size in sizes):
        raise ValueError(f"{who}: a view's block sizes are integers ≥ 1, got {sizes!r}")
    dim = 0 if kind == "rows" else 1
    if len(shape) <= dim or sum(sizes) != shape[dim]:
        raise ValueError(
            f"{who} has shape {tuple(shape)}; {kind}{tuple(sizes)} covers {sum(sizes)} of dimension {dim}"
        )


def cut(tensor: torch.Tensor, view: View | None, batch: bool = False) -> list[torch.Tensor]:
    """The blocks, as views of the tensor's memory; the tensor itself without a view."""
    if view is None:
        return [tensor]
    kind, sizes = view
    return list(torch.split(tensor, list(sizes), dim=0 if kind == "rows" else 1))
