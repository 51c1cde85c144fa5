"""Adam-mini: Adam with one second moment for each block of a tensor that shares a learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from steepest.arithmetic import average_in_place
from steepest.constructor import constructor
from steepest.hyperparameters import Hyperparameter, at_least, betas, integer, learning_rate
from steepest.optimizer import Optimizer
from steepest.rule import Group, MatrixOptions, Rule, Scalar, StateSpec
from steepest.views import matrix_shapes

__all__ = ["AdamMini", "AdamMiniRule", "Blocks"]

Blocks: TypeAlias = "Literal['rows', 'tensor'] | Sequence[tuple[int, int]]"

_SIZE = integer(low=1)


def _partition() -> Hyperparameter:
    def accepts(value: Any) -> bool:
        if isinstance(value, str):
            return value in ("rows", "tensor")
        pairs = isinstance(value, (tuple, list)) and len(value) > 0
        return pairs and all(len(pair) == 2 and all(map(_SIZE.accepts, pair)) for pair in value)

    return Hyperparameter(accepts, "'rows', 'tensor', or pairs (number of blocks, rows of each)")


class AdamMiniRule(Rule):
    """m ← β₁m + (1−β₁)g,  v ← β₂v + (1−β₂)·mean(g² of a block),  p ← p − η·m̂ / (√v̂ + ε)."""

    name = "adam_mini"
    hyper = {
        "lr": learning_rate(),
        "betas": betas(2),
        "eps": at_least(0),
        "weight_decay": at_least(0),
        "blocks": _partition(),
    }
    counts_steps = True
    # The momentum and the gradient; both are overwritten.
    working_copies = 2
    streams = True

    def moves_like_adamw(self, group: Group) -> bool:
        """Return True: it is Adam's update with the mean of a block's second moments."""
        return True

    def check_param(self, who: str, name: str | None, param: Tensor, group: Group) -> None:
        """Refuse blocks that do not add up to the rows of a parameter, or of a view's matrix."""
        super().check_param(who, name, param, group)
        blocks = group["blocks"]
        if isinstance(blocks, str):
            return
        view = (group["views"] or {}).get(name)
        covered = sum(count * rows for count, rows in blocks)
        for shape in matrix_shapes(param.shape, view):
            if len(shape) < 2 or shape[0] != covered:
                raise ValueError(
                    f"{who} has shape {tuple(param.shape)}; blocks={blocks!r} covers {covered} rows of a "
                    f"matrix of shape {tuple(shape)}"
                )

    def matrix_shape(self, shape: torch.Size, group: Group) -> tuple[int, ...]:
        """Return [rows, rest], where a tensor that is one block has one row."""
        if not isinstance(group["blocks"], str):
            return shape[0], math.prod(shape[1:])
        first = next((at for at, size in enumerate(shape) if size != 1), len(shape))
        if group["blocks"] == "rows" and len(shape) - first == 2:
            return shape[-2], shape[-1]
        return 1, math.prod(shape)

    def rows_apart(self, group: Group) -> bool:
        """Return whether rows are the blocks."""
        return bool(group["blocks"] == "rows")

    def cost(self, shape: tuple[int, ...], group: Group) -> float:
        """Return the flops of a few passes."""
        return 6.0 * math.prod(shape)

    def state_specs(self, group: Group) -> dict[str, StateSpec]:
        return {"exp_avg": StateSpec(range="signed", beta=group["betas"][0])}

    def matrix_specs(self, shape: tuple[int, ...], dtype: torch.dtype, group: Group) -> dict[str, StateSpec]:
        """Return √v, one number a block."""
        blocks = group["blocks"]
        number = shape[0] if isinstance(blocks, str) else sum(count for count, _ in blocks)
        return {"block_rms": StateSpec("matrix", torch.promote_types(dtype, torch.float32), (number,))}

    def scalars(self, step: Scalar, **hyper: Any) -> dict[str, Scalar]:
        beta1, beta2 = hyper["betas"]
        return {"correction1": 1 / (1 - beta1**step), "correction2": (1 - beta2**step) ** -0.5}

    def transform_inputs(self, group: Group) -> int:
        return 2

    def update(
        self, grad: Tensor, param: Tensor, exp_avg: Tensor, *, betas: tuple[Any, Any]
    ) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
        """Return the momentum and the gradient."""
        average = average_in_place(exp_avg, betas[0], grad)
        return (average, grad), {"exp_avg": average}

    def transform(
        self,
        u: Tensor,
        gradient: Tensor,
        *,
        block_rms: Tensor,
        betas: tuple[Any, Any],
        eps: Scalar,
        blocks: Blocks,
        correction1: Scalar,
        correction2: Scalar,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Divide the momentum by each block's √v, which no square of a large gradient overflows."""
        now = _block_mean(_row_rms(gradient), blocks)
        beta2 = betas[1]
        second = torch.hypot(beta2**0.5 * block_rms.to(u.dtype), (1 - beta2) ** 0.5 * now)
        # The lower bound prevents 0/0 with eps = 0.
        size = (second * _each(correction2, u)).clamp_(min=torch.finfo(u.dtype).tiny) + eps
        u /= _per_row(size / _each(correction1, u), blocks).unsqueeze(-1)
        return u, {"block_rms": second}


def _row_rms(rows: Tensor) -> Tensor:
    """Return the root mean square of each row; overwrite the rows, which are scaled to squares below 1."""
    # Two reductions take a tenth of the time of vector_norm's maximum norm on a CPU.
    largest = torch.maximum(rows.amax(dim=-1), rows.amin(dim=-1).neg_())
    rows /= torch.where(largest > 0, largest, 1.0).unsqueeze(-1)
    norm: Tensor = torch.linalg.vector_norm(rows, dim=-1)
    return norm.mul_(largest).div_(math.sqrt(rows.shape[-1]))


def _block_mean(rms: Tensor, blocks: Blocks) -> Tensor:
    """Return the root mean square of each block [batch, blocks] from those of its rows [batch, rows]."""
    if isinstance(blocks, str):
        return rms
    found, start = [], 0
    for count, rows in blocks:
        section = rms[:, start : start + count * rows].reshape(-1, count, rows)
        found.append(section[..., 0] if rows == 1 else _row_rms(section.contiguous()))
        start += count * rows
    return torch.cat(found, dim=1)


def _per_row(values: Tensor, blocks: Blocks) -> Tensor:
    """Return a block's value [batch, blocks] for each of its rows [batch, rows]."""
    if isinstance(blocks, str):
        return values
    sections = torch.split(values, [count for count, _ in blocks], dim=1)
    return torch.cat(
        [s.repeat_interleave(r, dim=1) for s, (_, r) in zip(sections, blocks, strict=True)], dim=1
    )


def _each(number: Scalar, like: Tensor) -> Scalar:
    """Reshape numbers that only a device knows, one for each matrix, to multiply [batch, blocks]."""
    return number.to(like.dtype).view(-1, 1) if isinstance(number, Tensor) else number


class AdamMini(Optimizer, rule=AdamMiniRule()):
    r"""Adam with one second moment for each block of a tensor, where Adam has one for each element.

    .. math::
        m \leftarrow \beta_1 m + (1-\beta_1) g, \quad
        v_b \leftarrow \beta_2 v_b + (1-\beta_2)\,\mathrm{mean}_{i \in b}(g_i^2), \quad
        p_i \leftarrow p_i - \eta\lambda p_i -
            \eta\,\frac{m_i/(1-\beta_1^t)}{\sqrt{v_b/(1-\beta_2^t)}+\epsilon}
        \quad \text{for } i \in b

    The blocks follow the Hessian's: a head of a query or key projection; a row (output neuron) of a value
    projection, attention output or MLP; a token's row of an embedding or output layer; every other tensor as
    a whole (norms, biases, convolutions). With blocks of one element this is AdamW.

    The constructor sees shapes only: each row of a matrix is a block, and so is every other tensor; leading
    dimensions of size 1 do not count. :func:`steepest.build` finds queries and keys, also in fused
    projections, and sets ``blocks`` to their heads; ``explain()`` says where. Heads are contiguous rows of
    the [out, in] matrix. The authors' code gives biases one number per element; here, as in the paper, they
    have one per tensor.

    State: ``exp_avg``, of the parameter's shape in ``state_dtype`` (4 bytes per float32 parameter), and
    ``block_rms``, √v, float32 (float64 for float64 parameters), one number per block, which gradients of any
    finite size leave finite; and one step count per tensor.

    Shards (DTensors) of whole rows are stepped where they are. Others, and those of tensors with heads,
    travel to the process that steps them, as for Muon (``distributed``, ``exchange_dtype``).
    ``state_device="cpu"`` is refused.

    Args:
        params: tensors of any shape, ``(name, tensor)`` pairs, or group dicts.
        lr: learning rate η ≥ 0, a float or a 1-element tensor; AdamW's carries over.
        betas: β₁ and β₂ of the two averages, each in [0, 1). The authors train language models with 0.95.
        eps: ε ≥ 0.
        weight_decay: λ ≥ 0, acting as ``weight_decay_method`` says.
        blocks: ``"rows"`` as above; ``"tensor"``, one block; or pairs (number of blocks, rows of each) that
            cover the rows of each matrix in the group: ``((12, 64),)`` for twelve heads of 64 rows,
            ``((24, 64), (768, 1))`` for a fused projection, in which only queries and keys have heads.
        **options: :class:`~steepest.rule.MatrixOptions` and :class:`~steepest.CommonOptions`. ``views`` cut
            a parameter first, and ``blocks`` then holds for each of its matrices.

    Raises:
        TypeError: an unknown keyword, or parameters that are not tensors.
        ValueError: a value out of range; ``blocks`` or a view that do not fit a parameter, by name.

    Tuning:
        - ``lr``: AdamW's (the authors). Measured here: 0.0016 on a small GPT, AdamW's is 0.0018
          (docs/which-optimizer.md).
        - ``weight_decay``: AdamW's (the authors).
        - ``betas``: AdamW's; the authors train language models with β₂ = 0.95.
        - batch size: keep lr, and search around it. Measured here: with 16 times the batch and as many
          steps the best lr is 0.32 times as large on digits (docs/learning_rates.md).

    When not to use it:
        On small models from scratch it may fall behind AdamW: 2.99 bits per byte on a small GPT, AdamW 2.90
        (docs/which-optimizer.md). The constructor alone cannot tell a model's heads; :func:`steepest.build`
        finds them. State in host memory (``state_device``) is refused.

    Source: Zhang et al., "Adam-mini: Use Fewer Learning Rates To Gain More", arXiv 2406.16793 (2024); the
    defaults are those of the authors' code, zyushun/Adam-mini 1.1.1.

    >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
    >>> optimizer = AdamMini([weight], lr=0.5, eps=0.0)
    >>> weight.grad = torch.tensor([[3.0, 3.0], [0.0, -0.1]])
    >>> optimizer.step()  # both rows move by 0.5 in root mean square
    >>> [[round(value, 4) for value in row] for row in weight.tolist()]
    [[-0.5, -0.5], [0.0, 0.7071]]
    """

    @constructor
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        blocks: Blocks = "rows",
        **options: Unpack[MatrixOptions],
    ) -> None: ...
