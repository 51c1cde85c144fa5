"""Views: declare that one parameter is several matrices, or is stored transposed.

A view is plain data, so that param groups and checkpoints can hold it:
``views={"attn.qkv.weight": rows(d, d, d)}``, keyed by parameter name. It is ``(kind, sizes)``, or
``(kind, sizes, "transposed")`` for a weight that its layer stores as [in, out]; rules read [out, in].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch

from steepest.hyperparameters import Hyperparameter, integer

__all__ = [
    "View",
    "check_view",
    "columns",
    "cut",
    "fused_parameters",
    "heads",
    "is_transposed",
    "merged_shape",
    "rows",
    "transposed",
]

View: TypeAlias = tuple[str, tuple[int, ...]] | tuple[str, tuple[int, ...], str]

# The dimension that each kind of view cuts; None cuts nothing.
_DIMENSIONS = {"rows": 0, "columns": 1, "whole": None}
_TRANSPOSED = "transposed"
_SIZE = integer(low=1)


def rows(*sizes: int) -> View:
    """Cut rows (dimension 0) into blocks of these sizes: a fused QKV projection is ``rows(d, d, d)``.

    Raises:
        ValueError: no sizes, or one that is not an integer ≥ 1.

    >>> rows(4, 2, 2)
    ('rows', (4, 2, 2))
    """
    return "rows", _sizes(sizes)


def columns(*sizes: int) -> View:
    """Cut columns (dimension 1) into blocks of these sizes.

    Raises:
        ValueError: no sizes, or one that is not an integer ≥ 1.

    >>> columns(3, 3)
    ('columns', (3, 3))
    """
    return "columns", _sizes(sizes)


def heads(count: int, size: int) -> View:
    """Cut rows into ``count`` blocks of ``size`` rows each: one per attention head.

    Raises:
        ValueError: ``count`` or ``size`` is not an integer ≥ 1.

    >>> heads(3, 64)
    ('rows', (64, 64, 64))
    """
    if not (_SIZE.accepts(count) and _SIZE.accepts(size)):
        raise ValueError(f"heads() takes a count and a size, integers ≥ 1, got {count!r} and {size!r}")
    return rows(*([size] * int(count)))


def transposed(view: View | None = None) -> View:
    """See a parameter that is stored as [in, out], or each block of ``view``, as [out, in].

    Blocks are cut in the dimensions as stored: GPT-2's fused ``c_attn``, a Conv1D of shape [d, 3d], is
    ``transposed(columns(d, d, d))``. Dimensions 0 and 1 are swapped even if there are more, as
    ``nn.ConvTranspose2d`` needs; in a group with ``view="batch"``, where leading dimensions count matrices,
    the last two are swapped.

    Raises:
        ValueError: ``view`` is not a view, or is already transposed.

    >>> transposed()
    ('whole', (), 'transposed')
    >>> transposed(columns(4, 4, 4))
    ('columns', (4, 4, 4), 'transposed')
    """
    if view is None:
        return "whole", (), _TRANSPOSED
    if not _is_view(view) or is_transposed(view):
        raise ValueError(f"transposed() takes rows(...), columns(...), heads(...) or None, got {view!r}")
    return view[0], view[1], _TRANSPOSED


def is_transposed(view: View | None) -> bool:
    """Return whether the rule sees the blocks transposed."""
    return view is not None and len(view) == 3


def _is_view(view: Any) -> bool:
    """Return whether the value has the form of a view; its sizes are not checked."""
    if not isinstance(view, (tuple, list)) or not 2 <= len(view) <= 3:
        return False
    return view[0] in _DIMENSIONS and (len(view) == 2 or view[2] == _TRANSPOSED)


def _sizes(sizes: tuple[int, ...]) -> tuple[int, ...]:
    if not sizes or not all(_SIZE.accepts(size) for size in sizes):
        raise ValueError(f"a view needs block sizes, integers ≥ 1, got {sizes!r}")
    # A checkpoint with other libraries' integers would not load with weights_only=True.
    return tuple(int(size) for size in sizes)


def fused_parameters() -> Hyperparameter:
    """Make the option ``views`` of rules that see matrices; each view is checked with its parameter."""
    return Hyperparameter(
        lambda value: value is None or isinstance(value, Mapping), "None or a dict of views by name"
    )


def check_view(who: str, view: Any, shape: torch.Size) -> None:
    """Raise ``ValueError`` unless the blocks fill the parameter's dimension exactly."""
    if not _is_view(view):
        raise ValueError(
            f"{who}: a view is rows(...), columns(...), heads(...) or transposed(...), got {view!r}"
        )
    kind, sizes = view[:2]
    if not isinstance(sizes, (tuple, list)) or any(type(size) is not int or size < 1 for size in sizes):
        raise ValueError(f"{who}: a view's block sizes are integers ≥ 1, got {sizes!r}")
    dim = _DIMENSIONS[kind]
    if dim is None:
        if len(sizes) > 0:
            raise ValueError(f"{who}: a view of the whole parameter has no block sizes, got {sizes!r}")
    elif len(shape) <= dim or sum(sizes) != shape[dim]:
        raise ValueError(
            f"{who} has shape {tuple(shape)}; {kind}{tuple(sizes)} covers {sum(sizes)} of dimension {dim}"
        )
    if is_transposed(view) and len(shape) < 2:
        raise ValueError(f"{who} has shape {tuple(shape)}: a vector cannot be seen transposed")


def cut(tensor: torch.Tensor, view: View | None, batch: bool = False) -> list[torch.Tensor]:
    """Cut a tensor into the blocks of a view, which share its memory; without a view it is the only block.

    ``batch`` says whether leading dimensions count matrices, as in a group with ``view="batch"``.
    """
    if view is None:
        return [tensor]
    dim = _DIMENSIONS[view[0]]
    blocks = [tensor] if dim is None else list(torch.split(tensor, list(view[1]), dim=dim))
    if is_transposed(view):
        return [block.transpose(-2, -1) if batch else block.transpose(0, 1) for block in blocks]
    return blocks


def merged_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape (n,) or (m, n) to which a rule on vectors and matrices merges a tensor.

    A tensor whose other dimensions are all 1 is a vector; three or more dimensions become the most square
    matrix of all contiguous splits, the first one among equals.

    >>> merged_shape((128, 64, 3, 3)), merged_shape((1, 7, 1)), merged_shape(())
    ((128, 576), (7,), (1,))
    """
    numel = math.prod(shape)
    if len(shape) < 2 or numel == max(shape):
        return (numel,)
    splits = [(math.prod(shape[:at]), math.prod(shape[at:])) for at in range(1, len(shape))]
    return min(splits, key=lambda split: max(split) / max(min(split), 1))
