"""Check on the device, for all gradients at once, whether they are finite."""

from __future__ import annotations

import torch
from torch import Tensor

from steepest.engine.collect import ParamBatch, ParamUpdate

__all__ = ["all_finite", "both", "check_gradients"]


def all_finite(tensors: list[Tensor]) -> Tensor:
    """Return whether no element is infinite or NaN, as a 0-dim bool tensor on the first tensor's device.

    The largest magnitude is finite exactly when every element is, and computing it needs no temporary
    of the tensors' size.

    >>> all_finite([torch.ones(2), torch.tensor([float("nan")])])
    tensor(False)
    """
    filled = [tensor for tensor in tensors if tensor.numel() > 0]
    if not filled:
        return torch.tensor(True, device="cpu")
    if all(tensor.is_cpu for tensor in filled):
        # On a CPU, many times faster than the norm. An extreme of what holds NaN is NaN.
        extremes = [extreme for tensor in filled for extreme in tensor.aminmax()]
        return torch.stack(extremes).isfinite().all()
    return torch.nn.utils.get_total_norm(filled, norm_type=float("inf")).isfinite()


def both(one: bool | Tensor, other: bool | Tensor) -> bool | Tensor:
    """Return whether both are true; a tensor if only the device knows.

    >>> both(True, torch.tensor(False)), both(torch.tensor(True), torch.tensor(True)), both(False, True)
    (tensor(False), tensor(True), False)
    """
    if one is False or other is False:
        return False
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one & other.to(one.device)
    return one if isinstance(one, Tensor) else other


def check_gradients(batches: list[ParamBatch]) -> bool | Tensor:
    """Return whether this step may be taken; a tensor if only the device knows.

    Gradients of groups with ``nonfinite="ignore"`` are not looked at.

    Raises:
        FloatingPointError: a group with ``nonfinite="raise"`` has a gradient that is not finite.
    """
    watched: list[Tensor] = []
    for batch in batches:
        wanted = batch.config.group["nonfinite"]
        if wanted == "ignore":
            continue
        grads = [member.grad for member in batch.members]
        if wanted == "skip":
            watched += grads
        elif not all_finite(grads):
            raise FloatingPointError(_complaint(batch.members))
    if not watched:
        return True
    finite = all_finite(watched)
    return bool(finite) if finite.device.type == "cpu" else finite


def _complaint(members: list[ParamUpdate]) -> str:
    bad = [member for member in members if not all_finite([member.grad])]
    more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
    wrong = int((~bad[0].grad.isfinite()).sum())
    return (
        f"the gradient of {bad[0].name}{more} has {wrong} infinite or NaN of {bad[0].grad.numel()} elements; "
        "nothing was changed. Use nonfinite='skip' to pass over such steps."
    )
