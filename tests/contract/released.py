"""A module and a backward pass that gives every parameter the gradient that a step's number says."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn

import steepest
from steepest.freed_gradient import FreedGradient

from .training import gradient, set_gradients

__all__ = ["backward", "holder", "ordinary_run", "released_run"]


def holder(params: Sequence[Any]) -> nn.Module:
    """A module that owns these parameters."""
    return nn.ParameterList(params)


def backward(params: Sequence[Tensor], step: int, without: Collection[int] = ()) -> None:
    """Give the parameters exactly ``gradient(param, index, step)``, as backward does."""
    terms = [
        (param * gradient(param, index, step).conj()).real.sum().double()
        for index, param in enumerate(params)
        if index not in without
    ]
    sum(terms).backward()


def are_freed(params: Sequence[Any]) -> bool:
    """Whether no gradient takes memory; in the first step a placeholder watches for readers."""
    return all(param.grad is None or type(param.grad) is FreedGradient for param in params)


def released_run(optimizer: steepest.Optimizer, params: Sequence[Any], steps: Sequence[int]) -> None:
    """Steps with gradients released; every third step leaves a parameter without one."""
    with steepest.release_gradients(holder(params), optimizer):
        for step in steps:
            backward(params, step, {0} if step % 3 == 2 else ())
            assert are_freed(params)
            optimizer.step()


def ordinary_run(optimizer: steepest.Optimizer, params: Sequence[Any], steps: Sequence[int]) -> None:
    """The same steps, ordinarily."""
    for step in steps:
        set_gradients(params, step)
        if step % 3 == 2:
            params[0].grad = None
        optimizer.step()
        optimizer.zero_grad()
