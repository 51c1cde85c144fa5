"""Tensor subclasses that wrap their numbers are stepped; those that store codes for them are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._pytree import tree_map_only

import steepest

from .cases import RULES, Case, by_id
from .training import gradient, make_params, same_bits


class Wrapper(Tensor):
    """Holds one tensor, on which every operation acts, as torchao's mixed-precision weights do."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["inner"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], meta: Any, *sizes: Any) -> Wrapper:
        return cls(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Wrapper, lambda each: each.inner, (args, kwargs or {}))
        result = func(*args, **kwargs)
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(result)
        return result


class Quantized(Wrapper):
    """Says that it is float, and stores int8 and scales, as torchao's quantized weights do."""

    scale: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, scale: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=scale.dtype, device=inner.device)

    def __init__(self, inner: Tensor, scale: Tensor) -> None:
        self.inner, self.scale = inner, scale

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["inner", "scale"], None

    def __repr__(self, **_: Any) -> str:
        return "Quantized()"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner, args[0].scale)
        raise NotImplementedError(f"Quantized has no {func}")


def quantized(*shape: int) -> Quantized:
    return Quantized(torch.ones(shape, dtype=torch.int8), torch.ones(shape[0]))


MESSAGE = r"is a Quantized, which stores inner \(int8\), scale \(float32\) for its numbers: .*Freeze it"


@pytest.mark.parametrize("case", RULES, ids=by_id)
def test_codes_are_refused_by_name_at_construction(case: Case):
    with pytest.raises(ValueError, match=f"parameter 'w' {MESSAGE}"):
        case.make([("w", Parameter(quantized(4, 4)))])
    optimizer = case.make([("fine", make_params(torch.float32, shapes=[(4, 4)])[0])])
    with pytest.raises(ValueError, match=f"parameter 'w' {MESSAGE}"):
        optimizer.add_param_group({"params": [("w", Parameter(quantized(4, 4)))]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("rule", ["lion", "muon", "sgd"])
def test_frozen_codes_may_stay_and_are_refused_once_they_train(rule: str):
    frozen = Parameter(quantized(4, 4), requires_grad=False)
    (param,) = make_params(torch.float32, shapes=[(4, 4)])
    optimizer = steepest.create(rule, [("frozen", frozen), ("w", param)], lr=0.1)
    param.grad = gradient(param, 0, 0)
    optimizer.step()
    before = param.detach().clone()
    frozen.requires_grad_(True)
    frozen.grad = torch.ones(4, 4)
    with pytest.raises(ValueError, match=f"parameter 'frozen' {MESSAGE}"):
        optimizer.step()
    assert same_bits(param, before)


def test_build_leaves_frozen_codes_out():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].weight = Parameter(quantized(4, 4), requires_grad=False)
    optimizer = steepest.build(model, "muon")
    assert all("0.weight" not in group["param_names"] for group in optimizer.param_groups)
    assert any("0.weight (float32)" in note for note in optimizer.explain().notes)
    model[0].weight = Parameter(quantized(4, 4))
    with pytest.raises(ValueError, match=f"parameter '0.weight' {MESSAGE}"):
        steepest.build(model, "muon")


@pytest.mark.parametrize("rule", ["lion", "muon", "adamw", "sgd"])
def test_one_wrapped_tensor_steps_as_it_does_alone(rule: str):
    (plain,) = make_params(torch.float32, shapes=[(6, 4)])
    wrapped = Parameter(Wrapper(plain.detach().clone()))
    optimizers = [steepest.create(rule, [each], lr=0.1) for each in (plain, wrapped)]
    for step in range(3):
        grad = gradient(plain, 0, step)
        for each, optimizer in zip((plain, wrapped), optimizers, strict=True):
            each.grad = grad.clone()
            optimizer.step()
    assert same_bits(wrapped.inner, plain)
