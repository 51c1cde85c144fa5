"""What a step did to one tensor, in float64, as a law sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steepest.distributed.local import is_dtensor, local_part
from steepest.engine.batches import ParamBatch, ParamUpdate
from steepest.engine.blocks import view_of
from steepest.engine.layout import real_view
from steepest.engine.update import UpdateConfig, decayed
from steepest.optimizer import Optimizer
from steepest.rule import Group, Rule
from steepest.views import matrices

__all__ = [
    "AppliedStep",
    "applied_step",
    "dense",
    "own_part",
    "spacing",
    "values_of",
    "weight_of",
    "widened",
]

# How finely parameters with masters are stored, relative to their magnitude: 16 bits, and 24.
_MASTER_EPS = {torch.int8: 2.0**-15, torch.int16: 2.0**-23}


@dataclass(frozen=True)
class AppliedStep:
    r"""One tensor before and after a step; complex ones are pairs of reals, DTensors their local shards.

    Attributes:
        rule, group: the tensor's, as they were when the step began.
        lr: the learning rate of the step, above 0.
        before, after: the weights in float64, with what a master keeps.
        gradient: what the rule was given: −g with ``maximize``, g + λp with ``weight_decay_method="l2"``.
        direction: (decayed p − p′)/lr: what the rule must have returned.
        rounding: a bound on \|direction's error\| by rounding, for each element.
        state_before, state_after: the tensor's state, entries in codes decoded. It is empty before the first
            step.
        grad_dtype: the gradient's dtype.
        report: what a law measures, by name; a :class:`~steepest.trust.Verification`'s ``report`` shows it.
    """

    rule: Rule
    group: Group
    lr: float
    before: Tensor
    after: Tensor
    gradient: Tensor
    direction: Tensor
    rounding: Tensor
    state_before: Mapping[str, Tensor]
    state_after: Mapping[str, Tensor]
    grad_dtype: torch.dtype
    view: Any = None
    report: dict[str, float] = field(default_factory=dict)

    def matrices(self, tensor: Tensor) -> list[tuple[str, Tensor]]:
        """Return (suffix in the state, matrices [..., m, n]) of a tensor that has the parameter's shape."""
        blocks = matrices(tensor, self.view, self.rule.counts_matrices(self.group))
        several = self.view is not None and bool(self.view[1])
        return [
            (f".{at}" if several else "", block.reshape(self.rule.matrix_shape(block.shape, self.group)))
            for at, block in enumerate(blocks)
        ]


def applied_step(
    optimizer: Optimizer, twin: Optimizer, batch: ParamBatch, member: ParamUpdate, owner: Tensor
) -> AppliedStep | None:
    """Return what a step did to a tensor; None if nothing follows: lr is 0, it is empty, or not finite.

    Args:
        optimizer: after the step.
        twin: its copy from before the step.
        batch, member: the twin's parameter.
        owner: the optimizer's.
    """
    config, group = batch.config, batch.config.group
    numbers = config.numbers()
    lr, strength = float(numbers["lr"]), numbers["decay"]
    gradient = widened(member.grad)
    before, after = (
        widened(real_view(own_part(weight)))
        for weight in (weight_of(twin, member.owner), weight_of(optimizer, owner))
    )
    if (
        lr <= 0
        or gradient.numel() == 0
        or not all(bool(each.isfinite().all()) for each in (gradient, before, after))
    ):
        return None
    if group["maximize"]:
        gradient = -gradient
    method = config.method if config.decays else None
    if method == "l2":
        gradient = gradient + float(strength) * before
    plain = (before - after) / lr
    direction = plain
    if method not in (None, "l2"):
        direction = (decayed(before, float(strength), method or "") - after) / lr
    if method == "cautious":
        # Decayed only where the step also goes toward 0: of the two readings the smaller is the true one.
        shrunk = (before * float(strength) - after) / lr
        direction = torch.where(plain.abs() < shrunk.abs(), plain, shrunk)
    # Products, sums and the learning rate are rounded in the dtype of the computation, then p is stored.
    largest = torch.maximum(before.abs(), after.abs())
    computing = 4 * torch.finfo(config.compute).eps * (largest + lr * plain.abs())
    rounding = (computing + spacing(config.dtype, config.storage.correction, largest)) / lr
    return AppliedStep(
        config.rule,
        group,
        lr,
        before,
        after,
        gradient,
        direction,
        rounding,
        _decoded(config, member.state),
        _decoded(config, _local(optimizer.state.get(owner, {}))),
        config.grad_dtype,
        view_of(config, member.label) if config.rule.transforms else None,
    )


def spacing(dtype: torch.dtype, correction: torch.dtype | None, magnitude: Tensor) -> Tensor:
    """Return a bound on the distance between neighbouring numbers, as a parameter of ``dtype`` is stored.

    ``correction`` is the dtype of what a master keeps beside it, or None.
    """
    stored = torch.finfo(dtype)
    eps = stored.eps if correction is None else _MASTER_EPS[correction]
    return magnitude * eps + stored.smallest_normal * eps


def weight_of(optimizer: Optimizer, param: Tensor) -> Tensor:
    """Return a parameter's value in float32 at least, with the bits that a master keeps."""
    weight: Tensor = optimizer.master_weight(param)
    return weight


def own_part(tensor: Tensor) -> Tensor:
    """Return a tensor, or the local shard of a DTensor."""
    return local_part(tensor) if is_dtensor(tensor) else tensor


def values_of(optimizer: Optimizer, param: Tensor) -> Tensor:
    """Return a copy of a parameter's values, as :func:`weight_of` does, or of its local shard's."""
    return own_part(weight_of(optimizer, param))


def dense(tensor: Tensor) -> Tensor:
    """Return a tensor without sparse storage."""
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def widened(tensor: Tensor) -> Tensor:
    """Return a copy in float64, or float32 on Apple's GPUs, which have no float64."""
    return tensor.detach().to(torch.float32 if tensor.device.type == "mps" else torch.float64, copy=True)


def _local(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: own_part(entry) if isinstance(entry, Tensor) else entry for name, entry in state.items()}


def _decoded(config: UpdateConfig, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the state with codes as numbers, and complex entries as pairs of reals."""
    found = {name: real_view(entry) for name, entry in state.items() if isinstance(entry, Tensor)}
    if found and config.storage.ranges:
        found |= config.storage.decode(found, config.compute)
    return {name: entry.detach().clone() for name, entry in found.items()}
