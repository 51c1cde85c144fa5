"""Fused parameters: how to say that one parameter is several logical matrices.

A view is plain data, so that it lives in a param group and in a checkpoint:
``views={"attn.qkv.weight": rows(d, d, d)}``, keyed by parameter name.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["View", "check_view", "columns", "cut", "heads", "rows"]

View = tuple[str, tuple[int, ...]]


def rows(*sizes: int) -> View:
    """Blocks of rows (dimension 0) of these sizes: a fused QKV projection is ``rows(d, d, d)``.

    >>> rows(4, 2, 2)
    ('rows', (4, 2, 2))
    """
    return "rows", _sizes(sizes)


def columns(*sizes: int) -> View:
    """Blocks of columns, or of whatever dimension 1 is, of these sizes.

    >>> columns(3, 3)
    ('columns', (3, 3))
    """
    return "columns", _sizes(sizes)


def heads(count: int, size: int) -> View:
    """``count`` blocks of ``size`` rows each: every head by itself.

    >>> heads(3, 64)
    ('rows', (64, 64, 64))
    """
    return rows(*([size] * count))


def _sizes(sizes: tuple[int, ...]) -> tuple[int, ...]:
    if not sizes or any(not isinstance(size, int) or size < 1 for size in sizes):
        raise ValueError(f"a view needs block sizes ≥ 1, got {sizes!r}")
    return sizes


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


def cut(tensor: torch.Tensor, view: View | None) -> list[torch.Tensor]:
    """The blocks, as views of the tensor's memory; the tensor itself without a view."""
    if view is None:
        return [tensor]
    kind, sizes = view
    return list(torch.split(tensor, list(sizes), dim=0 if kind == "rows" else 1))
