"""Options of low-bit state: what is refused, by name and with the reason, and what has no effect."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import steepest
from peak_memory import highest


def matrix(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (64, 128)) -> Parameter:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Parameter(values.to(dtype))


def step(optimizer: torch.optim.Optimizer, params: list[Parameter], count: int = 1) -> None:
    for _ in range(count):
        for param in params:
            param.grad = (0.5 * param.detach() + 0.25).to(param.dtype)
        optimizer.step()


@pytest.mark.parametrize("value", ["int4", "uint4", torch.uint4], ids=str)
def test_four_bits_are_refused_with_what_was_measured(value: object):
    with pytest.raises(ValueError, match=r"state_dtype.*40 to 50 %.*0\.08 bits per byte"):
        steepest.create("muon", [matrix()], state_dtype=value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_float64_is_not_coded(dtype: torch.dtype):
    with pytest.raises(ValueError, match=r"'layer\.weight'.*float64|'layer\.weight'.*complex128"):
        steepest.create("adamw", [("layer.weight", matrix(dtype))], state_dtype="int8")
    # A rule without averages ignores the option.
    params = [matrix(dtype)]
    step(steepest.create("signgsd", params, state_dtype="int8"), params)


def test_the_dtype_is_the_name_also_in_a_live_group():
    params, twins, named = ([matrix()] for _ in range(3))
    optimizer = steepest.create("lion", params, state_dtype=torch.int8)
    assert optimizer.param_groups[0]["state_dtype"] == "int8"
    live = steepest.create("lion", twins)
    live.param_groups[0]["state_dtype"] = torch.int8
    other = steepest.create("lion", named, state_dtype="int8")
    for each, some in ((optimizer, params), (live, twins), (other, named)):
        step(each, some, 3)
    states = [each.state[some[0]] for each, some in ((optimizer, params), (live, twins), (other, named))]
    assert states[0]["exp_avg"].dtype == torch.int8
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[name], value) for name, value in states[0].items())
    assert torch.equal(params[0], twins[0])


def test_a_master_without_narrow_parameters_is_refused():
    for given in ([matrix()], [{"params": [matrix()], "master": "split16"}]):
        with pytest.raises(ValueError, match=r"Lion: master='split(8|16)' has no effect"):
            steepest.create("lion", given, master="split8")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_one_narrow_parameter_in_any_group_is_enough(dtype: torch.dtype):
    wide, narrow, later = matrix(), matrix(dtype), matrix()
    optimizer = steepest.create("lion", [{"params": [wide]}, {"params": [narrow]}], master="split8")
    optimizer.add_param_group({"params": [later]})
    step(optimizer, [wide, narrow, later])
    assert "correction" in optimizer.state[narrow]
    assert "correction" not in optimizer.state[wide]
    assert "correction" not in optimizer.state[later]


def transposed(rows: int, columns: int, dtype: torch.dtype) -> Parameter:
    return Parameter(matrix(dtype, (rows, columns)).detach().t().contiguous().t())


@pytest.mark.parametrize("name", ["lion", "adamw"])
def test_long_rows_of_other_strides_are_cut_between_blocks(name: str, monkeypatch: pytest.MonkeyPatch):
    """Bit for bit what contiguous parameters become, noise included."""
    monkeypatch.setattr("steepest.engine.chunks.chunk_length", lambda *_, **__: 256)
    options = {"state_dtype": "int8", "master": "split8", "rounding": "stochastic", "compile": False}
    straight, other = [matrix(torch.bfloat16, (3, 1600))], [transposed(3, 1600, torch.bfloat16)]
    optimizers = [steepest.create(name, some, lr=0.01, **options) for some in (straight, other)]
    for optimizer, some in zip(optimizers, (straight, other), strict=True):
        step(optimizer, some, 4)
    states = [optimizers[0].state[straight[0]], optimizers[1].state[other[0]]]
    assert torch.equal(straight[0], other[0])
    assert all(torch.equal(states[1][entry], value) for entry, value in states[0].items())


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("master", [None, "split8", "split16"])
@pytest.mark.parametrize("name", ["lion", "adamw"])
def test_temporaries_stay_within_the_chunk_s_room(name: str, master: str | None, rounding: str):
    dtype = torch.float32 if master is None else torch.bfloat16
    for make in (lambda: matrix(dtype, (1 << 8, 1 << 12)), lambda: transposed(2, 1 << 19, dtype)):
        param: Tensor = make()
        options = {"state_dtype": "int8", "master": master, "rounding": rounding, "compile": False}
        optimizer = steepest.create(name, [param], weight_decay=0.1, maximize=True, **options)
        param.grad = torch.full_like(param, 0.25)
        optimizer.step()
        assert highest(optimizer.step) <= 1 << 20


@pytest.mark.parametrize("view", [steepest.views.columns(64, 64), steepest.views.transposed()], ids=str)
def test_a_view_that_cuts_codes_is_refused_after_a_step(view: Any):
    weight = matrix()
    optimizer = steepest.Muon([("w", weight)], state_dtype="int8")
    step(optimizer, [weight])
    before, codes = weight.detach().clone(), optimizer.state[weight]["momentum_buffer"].clone()
    optimizer.param_groups[0]["views"] = {"w": view}
    with pytest.raises(
        ValueError, match=r"'w': its averages are stored as one-byte codes.*Nothing was stepped"
    ):
        step(optimizer, [weight])
    assert torch.equal(weight, before)
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], codes)
    again = steepest.Muon([("w", weight)], state_dtype="int8", views={"w": view})
    saved = optimizer.state_dict()
    saved["param_groups"][0]["views"] = {"w": view}
    again.load_state_dict(saved)
    step(again, [weight])
    assert again.state[weight]["momentum_buffer"].dtype == torch.float32


def test_a_dtype_in_a_live_group_is_the_name_when_state_is_loaded():
    coded, floats = ([matrix()] for _ in range(2))
    one, other = steepest.Lion(coded, state_dtype="int8"), steepest.Lion(floats, state_dtype=torch.float32)
    one.param_groups[0]["state_dtype"] = torch.int8
    step(one, coded)
    step(other, floats)
    saved = copy.deepcopy(one.state_dict()), copy.deepcopy(other.state_dict())
    one.load_state_dict(saved[1])
    other.load_state_dict(saved[0])
    assert one.state[coded[0]]["exp_avg"].dtype == torch.int8
    assert other.state[floats[0]]["exp_avg"].dtype == torch.float32
    assert other.param_groups[0]["state_dtype"] == torch.float32


def test_explain_shows_what_is_stored():
    weight, vector = matrix(), Parameter(torch.zeros(5))
    optimizer = steepest.Lion([weight, vector], state_dtype=torch.float32)
    step(optimizer, [weight, vector])
    optimizer.param_groups[0]["state_dtype"] = "int8"
    assert [row.state for row in optimizer.explain().rows] == ["float32 (stored before)", "float32 (vector)"]
    optimizer.state.clear()
    assert optimizer.explain().rows[0].state == "int8/64"


def test_what_is_not_coded_is_float32_after_loading_too():
    weight, vector = matrix(torch.bfloat16), Parameter(torch.zeros(5, dtype=torch.bfloat16))
    theirs = torch.optim.AdamW([weight, vector])
    step(theirs, [weight, vector])
    optimizer = steepest.AdamW([weight, vector], state_dtype="int8")
    optimizer.load_state_dict(theirs.state_dict())
    assert optimizer.state[vector]["exp_avg_sq"].dtype == torch.float32
    assert optimizer.state[weight]["exp_avg_sq"].dtype == torch.uint8
    assert optimizer.state_bytes() == sum(row.state_bytes for row in optimizer.explain().rows)
