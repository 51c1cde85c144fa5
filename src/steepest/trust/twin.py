"""Copy an optimizer, with copies of its parameters and gradients, to step the copy and see what follows."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor

from steepest.optimizer import Optimizer

__all__ = ["Twin"]

# The class's own step, without the hooks that torch wraps around it and without a subclass's override.
_own_step = inspect.unwrap(Optimizer.step)


class Twin:
    """An optimizer as it was before a step, on parameters of its own; stepping it changes nothing else.

    Attributes:
        optimizer: the copy. Its gradients are those of :meth:`take_gradients`.
        params: the copy's parameters, by the original's.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        originals = [param for group in optimizer.param_groups for param in group["params"]]
        self.params: dict[Tensor, Tensor] = {param: _copied(param) for param in originals}
        memo: dict[int, Any] = {id(param): twin for param, twin in self.params.items()}
        self.optimizer: Optimizer = copy.deepcopy(optimizer, memo)
        for group in self.optimizer.param_groups:
            group["compile"] = False  # equal to the bit, and compiled for nothing else
        self.take_gradients()

    def take_gradients(self) -> None:
        """Copy the gradients that the original's parameters have now."""
        for param, twin in self.params.items():
            twin.grad = None if param.grad is None else param.grad.detach().clone()

    @torch.no_grad()
    def step(self) -> None:
        """Take the step that the library's own code takes, whatever the original's ``step`` does."""
        _own_step(self.optimizer)


def _copied(param: Tensor) -> Tensor:
    values = param.detach().clone()
    is_parameter = isinstance(param, torch.nn.Parameter)
    twin = torch.nn.Parameter(values, param.requires_grad) if is_parameter else values
    twin.requires_grad_(param.requires_grad)
    twin.__dict__.update(param.__dict__)  # what a subclass's code may read, such as ``is_qkv``
    return twin
