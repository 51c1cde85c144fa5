"""An optimizer with its parameters, made from a drawn plan; the same plan always makes the same world."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

import steepest
from contract.training import identical
from strategies import REAL, Case, cases

__all__ = ["Plan", "World", "plans"]

SMALL = st.sampled_from([(), (3,), (4, 3), (2, 3, 2), (0,), (1, 1), (5,)])


@dataclass(frozen=True)
class Plan:
    """Groups of one rule each, with options, shapes and values; how the parameters are made and named."""

    groups: list[Case]
    nonfinite: str
    named: bool
    tied: bool
    one_storage: bool

    def group(self, at: int, params: list[Parameter], first: int) -> dict[str, Any]:
        """The dict of one group."""
        case = self.groups[at]
        listed: list[Any] = [*params, *params[:1]] if self.tied and not self.named else [*params]
        if self.named:
            listed = [(f"p{first + i}", param) for i, param in enumerate(params)]
        options = {"compile": False, "nonfinite": self.nonfinite, **case.options}
        return {"params": listed, "rule": case.name, **options}


@st.composite
def plans(draw: Any) -> Plan:
    """One group or two, of any rules and options."""
    groups = [draw(cases(dtypes=REAL, tensors=2, shape=SMALL)) for _ in range(draw(st.integers(1, 2)))]
    return Plan(
        groups,
        draw(st.sampled_from(["ignore", "skip", "raise"])),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
    )


class World:
    """What the actions change."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.params: list[Parameter] = []
        groups = []
        for at, case in enumerate(plan.groups):
            begins = case.begins()
            if plan.one_storage:
                # Views of one storage that do not overlap, as FSDP and flattening libraries make them.
                flat = torch.cat([value.reshape(-1) for value in begins])
                parts = flat.split([value.numel() for value in begins])
                begins = [part.view(value.shape) for part, value in zip(parts, begins, strict=True)]
            params = [Parameter(value) for value in begins]
            groups.append(plan.group(at, params, len(self.params)))
            self.params += params
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # duplicates in a group
            self.optimizer = steepest.Optimizer(groups, rule=plan.groups[0].name)

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Those of all parameters."""
        return {param.dtype for param in self.params}

    def everything(self) -> dict[str, Any]:
        """A copy of all that a refused action must leave as it was."""
        return {
            "params": [_copy(param.detach()) for param in self.params],
            "grads": [None if p.grad is None else _copy(p.grad.detach()) for p in self.params],
            "flags": [(id(p), p.requires_grad, p.data_ptr()) for p in self.params],
            "state": {id(param): _copies(state) for param, state in self.optimizer.state.items()},
            "groups": [_copies(group) for group in self.optimizer.param_groups],
            "generators": (torch.get_rng_state(), random.getstate(), str(torch.get_default_dtype())),
        }

    def is_as(self, before: dict[str, Any]) -> bool:
        """Whether nothing has changed since, to the bit."""
        return identical(self.everything(), before)


def _copies(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of a group or of a parameter's state; parameters as their ids."""
    return {
        name: [id(param) for param in value]
        if name == "params" and isinstance(value, list)
        else _copy(value)
        if isinstance(value, Tensor)
        else copy.deepcopy(value)
        for name, value in tree.items()
    }


def _copy(tensor: Tensor) -> Tensor:
    dense = tensor.to_dense() if tensor.layout is not torch.strided else tensor
    return torch.empty(dense.shape, dtype=dense.dtype).copy_(dense)
