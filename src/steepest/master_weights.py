"""Read and write the float32 master weights that narrow parameters and their corrections hold together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from steepest.distributed.local import is_dtensor, local_part, shard_of, sharded_like
from steepest.engine.state import make_state
from steepest.engine.storage import CORRECTION
from steepest.engine.update import LOW_PRECISION
from steepest.formats.master import join, part
from steepest.rule import Group, find_rule

__all__ = ["master_state_dict", "master_weight", "set_master_weight"]


@torch.no_grad()
def master_weight(self: Any, param: Tensor) -> Tensor:
    r"""Return a parameter in float32, with the bits that its own dtype drops if ``master`` keeps them.

    .. math:: w = p + 2^{e}\,c

    where c is the parameter's correction and 2ᵉ its unit, the last place of 24 or 32 bits: see
    :mod:`steepest.formats.master`. Before the first step, and without a master, w is p. float64 and complex
    parameters are returned in their own dtype.

    Args:
        param: one of this optimizer's, of any shape.

    Returns:
        A copy of the parameter's shape, on its device.

    Raises:
        ValueError: the parameter is not one of this optimizer's.

    >>> from steepest import Lion
    >>> weight = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    >>> optimizer = Lion([weight], lr=2**-12, master="split8")
    >>> weight.grad = torch.ones_like(weight)
    >>> optimizer.step()
    >>> weight.tolist(), (1 - optimizer.master_weight(weight)).mul(2**12).tolist()
    ([1.0, 1.0], [1.0, 1.0])
    """
    _group_of(self, param)
    correction = self.state.get(param, {}).get(CORRECTION)
    if param.dtype not in LOW_PRECISION:
        correction = None  # the model was converted after a step
    if correction is not None and is_dtensor(param):
        own = join(local_part(param).detach(), local_part(correction))
        return sharded_like(param, own)
    if correction is not None:
        return join(param.detach(), correction.to(param.device))
    return param.detach().to(torch.promote_types(param.dtype, torch.float32), copy=True)


@torch.no_grad()
def set_master_weight(self: Any, param: Tensor, value: Tensor) -> None:
    """Write a master weight: part it into the parameter, which is rounded to nearest, and its correction.

    With ``master="split16"``, :meth:`master_weight` of a bfloat16 parameter then returns the very value; with
    ``"split8"`` the value rounded to 24 bits, within 2⁻¹⁶ of it. Without a master this only rounds. A
    parameter that is overwritten otherwise keeps its old correction, up to half of its last place.

    It may be called at any time. Before the first step it makes the state of all parameters, as that would;
    for sharded parameters of matrix rules, all processes must then call it.

    Args:
        param: one of this optimizer's.
        value: a real tensor of the parameter's shape, of any dtype and device. For a DTensor, one that is
            laid out as it is, or the whole tensor, of which each process takes its part.

    Raises:
        ValueError: the parameter is not one of this optimizer's, or the value has another shape or is a
            DTensor with another layout. Nothing was written.

    >>> from steepest import Lion
    >>> weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    >>> optimizer = Lion([weight], master="split16")
    >>> optimizer.set_master_weight(weight, torch.tensor([1.0001, -3.3333]))
    >>> weight.tolist(), optimizer.master_weight(weight)
    ([1.0, -3.328125], tensor([ 1.0001, -3.3333]))
    """
    group = _group_of(self, param)
    if value.shape != param.shape:
        raise ValueError(
            f"a master weight of shape {tuple(value.shape)} for a parameter of {tuple(param.shape)}"
        )
    if is_dtensor(value) and not (
        is_dtensor(param) and (value.device_mesh, value.placements) == (param.device_mesh, param.placements)
    ):
        raise ValueError(
            "a master weight must have its parameter's placements, or be a whole plain tensor: "
            "redistribute it"
        )
    home = param
    if is_dtensor(param):
        home, value = local_part(param), shard_of(param, value)
    narrow = param.dtype in LOW_PRECISION
    if narrow and group["master"] and CORRECTION not in self.state.get(param, {}):
        _make_states(self)
    correction = self.state.get(param, {}).get(CORRECTION) if narrow else None
    if correction is None:
        home.copy_(value)
        return
    rounded, rest = part(value.detach().to(home.device, torch.float32), param.dtype, correction.dtype)
    home.copy_(rounded)
    (local_part(correction) if is_dtensor(correction) else correction).copy_(rest)


def _make_states(optimizer: Any) -> None:
    """Make what the first step would make, for all parameters.

    torch.distributed.checkpoint loads only the entries that an optimizer has, if it has any.
    """
    groups, collector = optimizer.param_groups, optimizer._collector
    collector.check(type(optimizer).__name__, groups)
    sharding = collector.sharding(groups, optimizer._user_functions)
    ordinal = 0
    for index, group in enumerate(groups):
        moves = find_rule(group["rule"]).moves
        for at, param in enumerate(group["params"]):
            if param.requires_grad and not moves:
                batch = collector.one(groups, index, at, ordinal + at, optimizer.state)
                if sharding is not None:
                    sharding.bind([batch])
                make_state([batch], optimizer.state)
        ordinal += len(group["params"])


def master_state_dict(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the model's state dict with parameters in float32: their master weights.

    Each is its :meth:`~steepest.Optimizer.master_weight`: what a float32 run would have saved, to evaluate or
    to publish the trained model, or to go on with wider parameters. Buffers, and parameters that the
    optimizer does not have, stay as they are; tensors that are tied stay tied.

    Args:
        model: any module that has parameters of the optimizer.
        optimizer: one of this library's.

    Returns:
        A new dict with the keys of ``model.state_dict()``. It shares memory with the model where it holds
        what stays as it is.

    Raises:
        ValueError: the model has no parameter of this optimizer, or the optimizer is another library's.

    >>> from steepest import Lion, master_state_dict
    >>> model = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    >>> optimizer = Lion(model.parameters(), master="split8")
    >>> {name: value.dtype for name, value in master_state_dict(model, optimizer).items()}
    {'weight': torch.float32, 'bias': torch.float32}
    """
    if not hasattr(optimizer, "master_weight"):
        raise ValueError(f"{type(optimizer).__name__} keeps no master weights: it is not one of steepest's")
    own = {param for group in optimizer.param_groups for param in group["params"]}
    # The parameters themselves, whatever hooks make of their names.
    saved = model.state_dict(keep_vars=True)
    masters: dict[Tensor, Tensor] = {}
    for name, value in saved.items():
        if isinstance(value, Tensor) and value in own:
            if value not in masters:
                masters[value] = optimizer.master_weight(value)
            saved[name] = masters[value]
        elif isinstance(value, Tensor):
            saved[name] = value.detach()
    if not masters:
        raise ValueError("the model has no parameter of this optimizer")
    return saved


def _group_of(optimizer: Any, param: Tensor) -> Group:
    for group in optimizer.param_groups:
        if any(param is each for each in group["params"]):
            known: Mapping[str, Any] = group
            return known
    raise ValueError(
        f"a tensor of shape {tuple(param.shape)} is not a parameter of this {type(optimizer).__name__}"
    )
