"""A state dict that was changed at random is refused as a whole, or loaded into an optimizer that steps."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from . import gradients
from .mutations import mutate
from .oracles import assert_twins, refused
from .profile import cases
from .world import Plan, World, plans


def _train(world: World, seed: int, steps: int) -> None:
    for step in range(steps):
        for at, param in enumerate(world.params):
            param.grad = gradients.values("finite", param.shape, param.dtype, seed + 31 * step + at)
        world.optimizer.step()


@cases(0.3, few=200)
@given(plans(), st.data(), st.integers(1, 3))
def test_changed_at_random(plan: Plan, data: Any, mutations: int):
    source, world, twin = World(plan), World(plan), World(plan)
    _train(source, 0, 2)
    _train(world, 100, 1)
    _train(twin, 100, 1)
    broken: Any = source.optimizer.state_dict()
    for _ in range(mutations):
        if not (isinstance(broken, dict) and _is_whole(broken)):
            break
        broken = mutate(data.draw, broken)
    if refused(world, lambda: world.optimizer.load_state_dict(broken)):
        return
    twin.optimizer.load_state_dict(broken)
    assert_twins(world, twin)
    for some in (world, twin):
        for param in some.params:
            param.grad = torch.ones_like(param)
    if not refused(world, world.optimizer.step):
        twin.optimizer.step()
    assert_twins(world, twin)


def _is_whole(saved: dict[str, Any]) -> bool:
    groups, states = saved.get("param_groups"), saved.get("state")
    return (
        isinstance(groups, list)
        and bool(groups)
        and all(isinstance(group, dict) and group for group in groups)
        and isinstance(states, dict)
        and all(isinstance(key, int) for key in states)
        and all(isinstance(state, dict) for state in states.values())
        and all(_is_dense(value) for state in states.values() for value in state.values())
    )


def _is_dense(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_meta
