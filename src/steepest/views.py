"""Views: declare that one parameter is several matrices, or is stored transposed.

A view is plain data, so that param groups and checkpoints can hold it:
``views={"attn.qkv.weight": rows(d, d, d)}``, keyed by parameter name. It is ``(kind, sizes)``, followed by
the number of repetitions if the blocks are interleaved, and by ``"transposed"`` for a weight that its layer
stores as [in, out]; rules read [out, in].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch

from steepest.hyperparameters import Hyperparameter, integer

__all__ = [
    "View",
    "along",
    "check_view",
    "columns",
    "cut",
    "fused_parameters",
    "heads",
    "interleaved",
    "is_interleaved",
    "is_transposed",
    "matrices",
    "matrix_shapes",
    "merged_shape",
    "repetitions",
    "rows",
    "transposed",
]

View: TypeAlias = (
    tuple[str, tuple[int, ...]]
    | tuple[str, tuple[int, ...], int | str]
    | tuple[str, tuple[int, ...], int, str]
)

# The dimension that each kind of view cuts; None cuts nothing.
_DIMENSIONS = {"rows": 0, "columns": 1, "dim 2": 2, "dim 3": 3, "whole": None}
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


def along(dim: int, *sizes: int) -> View:
    """Cut dimension ``dim`` into blocks of these sizes; 0 and 1 are :func:`rows` and :func:`columns`.

    For experts stored as [experts, in, out], whose fused outputs are in dimension 2.

    Raises:
        ValueError: ``dim`` is not 0, 1, 2 or 3; no sizes, or one that is not an integer ≥ 1.

    >>> along(2, 8, 8)
    ('dim 2', (8, 8))
    """
    kind = next((kind for kind, cuts in _DIMENSIONS.items() if cuts is not None and cuts == dim), None)
    if kind is None or isinstance(dim, bool):
        raise ValueError(f"along() takes a dimension, 0, 1, 2 or 3, got {dim!r}")
    return kind, _sizes(sizes)


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


def interleaved(count: int, view: View) -> View:
    """Repeat the pattern of a view ``count`` times; block j is the j-th part of every repetition.

    GPT-NeoX and BLOOM store query, key and value of a head together, head after head:
    ``interleaved(heads, rows(size, size, size))``. gpt-oss alternates the gate's and the other columns:
    ``interleaved(n, along(2, 1, 1))``. A block is one matrix, as if its parts were stored together.

    Raises:
        ValueError: ``count`` is not an integer ≥ 1; ``view`` is whole, interleaved or transposed
            (``transposed(interleaved(...))`` is the order).

    >>> interleaved(12, rows(64, 64, 64))
    ('rows', (64, 64, 64), 12)
    """
    if not _SIZE.accepts(count):
        raise ValueError(f"interleaved() takes a number of repetitions, an integer ≥ 1, got {count!r}")
    if not _is_view(view) or len(view) > 2 or _DIMENSIONS[view[0]] is None:
        raise ValueError(f"interleaved() takes rows(...), columns(...) or along(...), got {view!r}")
    return view if int(count) == 1 else (view[0], view[1], int(count))


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
        raise ValueError(
            "transposed() takes rows(...), columns(...), heads(...), along(...), interleaved(...) or None, "
            f"got {view!r}"
        )
    if is_interleaved(view):
        return view[0], view[1], repetitions(view), _TRANSPOSED
    return view[0], view[1], _TRANSPOSED


def is_transposed(view: View | None) -> bool:
    """Return whether the rule sees the blocks transposed."""
    return view is not None and view[-1] == _TRANSPOSED


def is_interleaved(view: View | None) -> bool:
    """Return whether each block is spread over the dimension that is cut, rather than contiguous in it."""
    return view is not None and repetitions(view) > 1


def repetitions(view: View) -> int:
    """Return how often the pattern of a view repeats: 1 unless it is interleaved."""
    return view[2] if len(view) > 2 and isinstance(view[2], int) else 1


def _is_view(view: Any) -> bool:
    """Return whether the value has the form of a view; its sizes are not checked."""
    if not isinstance(view, (tuple, list)) or not 2 <= len(view) <= 4:
        return False
    if not isinstance(view[0], str) or view[0] not in _DIMENSIONS:
        return False
    more = list(view[2:])
    if more and type(more[0]) is int and more[0] > 1 and view[0] != "whole":
        del more[0]
    return more in ([], [_TRANSPOSED])


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
            f"{who}: a view is rows(...), columns(...), heads(...), along(...), interleaved(...) or "
            f"transposed(...), got {view!r}"
        )
    kind, sizes = view[:2]
    if not isinstance(sizes, (tuple, list)) or any(type(size) is not int or size < 1 for size in sizes):
        raise ValueError(f"{who}: a view's block sizes are integers ≥ 1, got {sizes!r}")
    dim, times = _DIMENSIONS[kind], repetitions(view)
    if dim is None:
        if len(sizes) > 0:
            raise ValueError(f"{who}: a view of the whole parameter has no block sizes, got {sizes!r}")
    elif not sizes or len(shape) <= dim or times * sum(sizes) != shape[dim]:
        repeated = f" {times} times" if times > 1 else ""
        raise ValueError(
            f"{who} has shape {tuple(shape)}; {kind}{tuple(sizes)}{repeated} covers {times * sum(sizes)} of "
            f"dimension {dim}"
        )
    if is_transposed(view) and len(shape) < 2:
        raise ValueError(f"{who} has shape {tuple(shape)}: a vector cannot be seen transposed")


def cut(tensor: torch.Tensor, view: View | None, batch: bool = False) -> list[torch.Tensor]:
    """Cut a tensor into the blocks of a view, which share its memory; without a view it is the only block.

    An interleaved block has one dimension more, where it is spread: [repetitions, size, ...] instead of
    [repetitions·size, ...], which :func:`matrices` merges.

    ``batch`` says whether leading dimensions count matrices, as in a group with ``view="batch"``.
    """
    if view is None:
        return [tensor]
    dim, times, axes = _DIMENSIONS[view[0]], repetitions(view), [[at] for at in range(tensor.dim())]
    if dim is None:
        blocks = [tensor]
    elif times == 1:
        blocks = list(torch.split(tensor, list(view[1]), dim))
    else:
        before, after = tensor.shape[:dim], tensor.shape[dim + 1 :]
        folded = tensor.view(*before, times, sum(view[1]), *after)
        blocks = list(torch.split(folded, list(view[1]), dim + 1))
        axes = [*axes[:dim], [dim, dim + 1], *([at + 1] for [at] in axes[dim + 1 :])]
    if is_transposed(view):
        _swap(axes, batch)
        order = [each for dims in axes for each in dims]
        blocks = [block.permute(order) for block in blocks]
    return blocks


def matrices(tensor: torch.Tensor, view: View | None, batch: bool = False) -> list[torch.Tensor]:
    """Cut a tensor as :func:`cut` does, and merge what is interleaved, which copies it.

    >>> fused = torch.tensor([[0], [1], [2], [10], [11], [12]])  # of two heads: query, key, value
    >>> [block.flatten().tolist() for block in matrices(fused, interleaved(2, rows(1, 1, 1)))]
    [[0, 10], [1, 11], [2, 12]]
    """
    shapes = matrix_shapes(tensor.shape, view, batch)
    return [block.reshape(shape) for block, shape in zip(cut(tensor, view, batch), shapes, strict=True)]


def matrix_shapes(shape: Sequence[int], view: View | None, batch: bool = False) -> list[torch.Size]:
    """Return the shapes of :func:`matrices`.

    >>> matrix_shapes((12, 5), interleaved(2, rows(2, 4)))
    [torch.Size([4, 5]), torch.Size([8, 5])]
    """
    sizes = list(shape)
    if view is None:
        return [torch.Size(sizes)]
    dim, times = _DIMENSIONS[view[0]], repetitions(view)
    found = [sizes]
    if dim is not None:
        found = [[*sizes[:dim], times * size, *sizes[dim + 1 :]] for size in view[1]]
    for each in found if is_transposed(view) else ():
        _swap(each, batch)
    return [torch.Size(each) for each in found]


def _swap(dims: list[Any], batch: bool) -> None:
    one, other = (-2, -1) if batch else (0, 1)
    dims[one], dims[other] = dims[other], dims[one]


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
