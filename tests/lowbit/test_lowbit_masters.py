"""Master weights: read, written before and between steps, and in a model's state dict."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import Parameter

import steepest
from contract.cases import CASES, Case
from contract.recording import configure
from contract.training import identical, steps
from loops import for_each
from steepest import AdamW, Lion, Muon, master_state_dict
from steepest.engine import grad_check

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def step(optimizer: Any, param: Tensor, seeds: range) -> None:
    for seed in seeds:
        param.grad = normal(*param.shape, seed=seed).to(BF16).to(param.dtype)
        optimizer.step()


OPTIMIZERS = {
    "lion": lambda p, **options: Lion([p], lr=1e-3, weight_decay=0.1, state_dtype=F32, **options),
    "adamw": lambda p, **options: AdamW([p], lr=1e-3, weight_decay=0.1, state_dtype=F32, **options),
    "muon": lambda p, **options: Muon([p], lr=1e-3, state_dtype=F32, **options),
}
# Muon's products follow the gradient's dtype.
ELEMENTWISE = ["lion", "adamw"]


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_a_split16_master_is_the_float32_run_s_parameter(name):
    narrow = Parameter(normal(8, 64).to(BF16))
    wide = Parameter(narrow.detach().float())
    optimizer, float32 = OPTIMIZERS[name](narrow, master="split16"), OPTIMIZERS[name](wide)
    step(optimizer, narrow, range(5))
    step(float32, wide, range(5))
    assert torch.equal(optimizer.master_weight(narrow), wide)
    assert not torch.equal(narrow.float(), wide), "control: the parameter alone is not"


@pytest.mark.parametrize("when", [0, 1, 4])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_a_written_master_is_where_the_run_goes_on(name, when):
    """Also where the engine keeps its plan between steps, and before there is any state."""
    narrow, wide = Parameter(torch.zeros(8, 64, dtype=BF16)), Parameter(torch.zeros(8, 64))
    optimizer, float32 = OPTIMIZERS[name](narrow, master="split16"), OPTIMIZERS[name](wide)
    step(optimizer, narrow, range(when))
    step(float32, wide, range(when))
    value = normal(8, 64, seed=99)
    optimizer.set_master_weight(narrow, value)
    with torch.no_grad():
        wide.copy_(value)
    step(optimizer, narrow, range(10, 13))
    step(float32, wide, range(10, 13))
    assert torch.equal(optimizer.master_weight(narrow), wide)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("master", ["split8", "split16"])
def test_one_set_before_the_first_step_is_saved_and_loaded(name, master):
    def made() -> tuple[Parameter, Any]:
        param = Parameter(torch.zeros(64, 64, dtype=BF16))
        return param, OPTIMIZERS[name](param, master=master)

    (param, optimizer), (twin, again) = made(), made()
    optimizer.set_master_weight(param, normal(64, 64))
    assert set(optimizer.state[param]) >= {"correction"}
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        twin.copy_(param)
    assert torch.equal(again.master_weight(twin), optimizer.master_weight(param))
    step(optimizer, param, range(2))
    step(again, twin, range(2))
    assert torch.equal(again.master_weight(twin), optimizer.master_weight(param))
    steps = optimizer.state[param].get("step")
    assert steps is None or steps.item() == 2, "a correction does not count as a step"


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_a_master_that_is_asked_for_late(name):
    narrow, wide = Parameter(torch.zeros(8, 64, dtype=BF16)), Parameter(torch.zeros(8, 64))
    optimizer, float32 = OPTIMIZERS[name](narrow), OPTIMIZERS[name](wide)
    step(optimizer, narrow, range(4))
    step(float32, wide, range(4))
    state = {name: value.clone() for name, value in optimizer.state[narrow].items()}
    for entry, value in state.items():
        float32.state[wide][entry].copy_(value)
    optimizer.param_groups[0]["master"] = "split16"
    value = normal(8, 64, seed=99)
    optimizer.set_master_weight(narrow, value)
    with torch.no_grad():
        wide.copy_(value)
    step(optimizer, narrow, range(10, 13))
    step(float32, wide, range(10, 13))
    assert torch.equal(optimizer.master_weight(narrow), wide)


NUMBERS = [1.0001, -3.3333, 0.0, -0.0, 1e-30, -1e30, float("inf"), float("-inf"), float("nan"), 3.4e38]


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("master", ["split8", "split16", None])
def test_what_is_written_is_read(dtype, master):
    param = Parameter(torch.ones(len(NUMBERS) + 1000, dtype=dtype))
    optimizer = Lion([param], master=master)
    assert torch.equal(optimizer.master_weight(param), torch.ones(param.shape))
    value = torch.cat([torch.tensor(NUMBERS), normal(1000)])
    optimizer.set_master_weight(param, value)
    read = optimizer.master_weight(param)
    assert read.dtype == F32
    finite = value.isfinite() & (value.abs() < torch.finfo(dtype).max)
    assert torch.equal(read.isnan(), value.isnan())
    assert torch.equal(read.isinf(), value.isinf() | (~finite & value.isfinite()))
    # float16's subnormal numbers have a fixed spacing.
    error = (read - value)[finite].abs() / (value[finite].abs() + (2.0**-14 if dtype == F16 else 0)).clamp(
        min=1e-38
    )
    bound = {
        (BF16, "split16"): 0,
        (BF16, "split8"): 2**-16,
        (F16, "split16"): 2**-22,
        (F16, "split8"): 2**-18,
        (BF16, None): 2**-8,
        (F16, None): 2**-10,
    }[dtype, master]
    assert error.max() <= bound
    assert master != "split8" or error.max() > bound / 16, "control: the bound is near"
    optimizer.set_master_weight(param, read)
    assert torch.equal(optimizer.master_weight(param).nan_to_num(7.0), read.nan_to_num(7.0))


def test_a_transposed_parameter():
    param = Parameter(normal(6, 16, 3, 4).to(BF16).contiguous(memory_format=torch.channels_last))
    optimizer = Lion([param], master="split16")
    value = normal(6, 16, 3, 4, seed=1)
    optimizer.set_master_weight(param, value)
    assert optimizer.state[param]["correction"].stride() == param.stride()
    assert torch.equal(optimizer.master_weight(param), value)


@pytest.mark.parametrize("dtype", [F32, torch.float64, torch.complex64])
def test_wider_parameters_are_their_own_masters(dtype):
    param = Parameter(torch.ones(3, dtype=dtype))
    optimizer = Lion([param, other := Parameter(torch.ones(2, dtype=BF16))], master="split8")
    value = torch.tensor([0.1, 0.2, 0.3], dtype=dtype)
    optimizer.set_master_weight(param, value)
    read = optimizer.master_weight(param)
    assert read.dtype == dtype
    assert torch.equal(read, value)
    assert torch.equal(param, value)
    assert not optimizer.state.get(param)
    read.zero_()
    assert torch.equal(param, value), "it is a copy"
    assert optimizer.master_weight(other).dtype == F32


def test_reading_makes_no_state():
    param = Parameter(torch.ones(3, dtype=BF16))
    optimizer = Lion([param], master="split8")
    optimizer.master_weight(param)
    assert not optimizer.state


def test_a_shape_or_a_parameter_that_does_not_fit():
    param = Parameter(torch.ones(3, dtype=BF16))
    optimizer = Lion([param], master="split8")
    with pytest.raises(ValueError, match=r"shape \(4,\) for a parameter of shape \(3,\)|\(4,\).*\(3,\)"):
        optimizer.set_master_weight(param, torch.zeros(4))
    for call in (
        lambda: optimizer.master_weight(param.detach()),
        lambda: optimizer.set_master_weight(Parameter(param.detach()), torch.zeros(3)),
    ):
        with pytest.raises(ValueError, match=r"shape \(3,\) is no"):
            call()
    assert torch.equal(param, torch.ones(3, dtype=BF16))
    assert not optimizer.state


class Tied(torch.nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(64, 64, dtype=dtype)
        self.norm = torch.nn.BatchNorm1d(64, dtype=dtype)
        self.frozen = torch.nn.Linear(64, 64, dtype=dtype).requires_grad_(False)
        self.head = torch.nn.Linear(64, 64, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight


def trained() -> tuple[Tied, steepest.Optimizer]:
    torch.manual_seed(0)
    model = Tied(BF16)
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = AdamW(params, lr=1e-3, master="split16", state_dtype="int8")
    for seed in range(3):
        for param in params:
            param.grad = normal(*param.shape, seed=seed).to(BF16)
        optimizer.step()
    return model, optimizer


def test_a_model_s_masters():
    model, optimizer = trained()
    plain, masters = model.state_dict(), master_state_dict(model, optimizer)
    assert list(masters) == list(plain)
    assert masters._metadata == plain._metadata
    assert masters["embed.weight"] is masters["head.weight"]
    assert torch.equal(masters["embed.weight"], optimizer.master_weight(model.embed.weight))
    assert not torch.equal(masters["embed.weight"], plain["embed.weight"].float()), "it has more bits"
    for name, value in masters.items():
        assert not value.requires_grad, name
        if name.startswith(("frozen", "norm.running", "norm.num")):
            assert value.dtype == plain[name].dtype
            assert torch.equal(value, plain[name])
        else:
            assert value.dtype == F32
            assert torch.equal(value.to(BF16), plain[name]), name


def test_a_float32_model_goes_on_from_them():
    model, optimizer = trained()
    wide = Tied(F32)
    wide.load_state_dict(master_state_dict(model, optimizer))
    again = AdamW([p for p in wide.parameters() if p.requires_grad])
    with pytest.warns(UserWarning, match="3 parameters"):
        again.load_state_dict(optimizer.state_dict())
    for param, narrow in zip(wide.parameters(), model.parameters(), strict=True):
        if param.requires_grad:
            assert torch.equal(again.master_weight(param), optimizer.master_weight(narrow))


def test_a_model_of_somebody_else_s():
    model, optimizer = trained()
    with pytest.raises(ValueError, match="no parameter of this optimizer"):
        master_state_dict(Tied(BF16), optimizer)
    with pytest.raises(ValueError, match="SGD keeps no master weights"):
        master_state_dict(model, torch.optim.SGD(model.parameters()))


def test_subclasses_and_several_rules_have_masters():
    matrix, vector = Parameter(normal(64, 64).to(BF16)), Parameter(normal(64).to(BF16))
    groups = [{"params": [matrix], "rule": "muon"}, {"params": [vector], "master": None}]
    optimizer = steepest.Optimizer(groups, rule="lion", master="split16")
    value = normal(64, 64, seed=1)
    optimizer.set_master_weight(matrix, value)
    optimizer.set_master_weight(vector, value[0])
    assert torch.equal(optimizer.master_weight(matrix), value)
    assert torch.equal(optimizer.master_weight(vector), value[0].to(BF16).float())


class OwnDecay(steepest.OrthogonalizedOptimizer):
    """Decays by its own code, which calls the library's; it has no products."""

    def _apply_weight_decay_inplace(self, p: Tensor, grad: Tensor, lr: Any, weight_decay: float) -> None:
        super()._apply_weight_decay_inplace(p, grad, lr, weight_decay)

    def orthogonalize(self, p: Tensor, grad: Tensor, **options: Any) -> Tensor:
        return grad.float().sign()


@pytest.mark.parametrize("method", ["decoupled", "sign"])
def test_a_subclass_s_decay_moves_the_master(method: str):
    """A decay of a millionth would not move a bfloat16 parameter alone."""
    start = normal(64, 64).to(BF16)
    runs = []
    for dtype, options in ((F32, {}), (BF16, {"master": "split16"})):
        param = Parameter(start.to(dtype))
        optimizer = OwnDecay(
            [param], lr=1e-5, weight_decay=0.1, weight_decay_method=method, state_dtype=F32, **options
        )
        step(optimizer, param, range(5))
        runs.append(optimizer.master_weight(param))
    assert torch.equal(*runs)
    assert not torch.equal(runs[0].to(BF16), runs[0])


def test_a_subclass_s_decay_is_undone_where_the_device_skips_a_step(monkeypatch: pytest.MonkeyPatch):
    param = Parameter(normal(64, 64).to(BF16))
    optimizer = OwnDecay([param], lr=0.01, weight_decay=0.1, master="split16", nonfinite="skip")
    step(optimizer, param, range(2))
    before = optimizer.master_weight(param)
    check = grad_check.check_gradients
    monkeypatch.setattr(grad_check, "check_gradients", lambda batches: torch.tensor(check(batches)))
    configure(monkeypatch, counts_on_device=lambda group: True)
    param.grad = torch.full_like(param, torch.nan)
    optimizer.step()
    assert torch.equal(optimizer.master_weight(param), before)
    step(optimizer, param, range(2, 3))
    assert not torch.equal(optimizer.master_weight(param), before)


@for_each("case", CASES)
def test_state_that_is_made_before_the_first_step_is_the_first_step_s(case: Case):
    params, twins = case.params(BF16), case.params(BF16)
    optimizer, other = (case.make(some, master="split16") for some in (params, twins))
    optimizer.set_master_weight(params[0], params[0].detach().float())
    assert set(optimizer.state) == set(params)
    steps(optimizer, params, range(3))
    steps(other, twins, range(3))
    assert identical(params, twins)
    assert identical(optimizer.state_dict()["state"], other.state_dict()["state"])


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_a_checkpoint_loads_whole_after_a_master_was_set(flat: bool, tmp_path: Path):
    """torch makes no state where there is some, and loads only the entries that there are."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)

    def made() -> tuple[torch.nn.Module, AdamW]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 3)).to(BF16)
        return model, AdamW(model.named_parameters(), state_dtype="int8", master="split8")

    (model, optimizer), (other, again) = made(), made()
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.zero_grad()
    saved = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
    dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)
    again.set_master_weight(other[0].weight, normal(64, 64))
    found = {"optimizer": get_optimizer_state_dict(other, again, options=options)}
    dcp.load(found, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(other, again, found["optimizer"], options=options)
    assert identical(again.state_dict()["state"], optimizer.state_dict()["state"])


def test_a_model_that_is_widened_after_a_step_has_no_corrections():
    model = torch.nn.Linear(64, 64, dtype=BF16)
    optimizer = Lion(model.parameters(), lr=0.01, master="split8", state_dtype=F32)
    step(optimizer, model.weight, range(1))
    model.float()
    assert torch.equal(optimizer.master_weight(model.weight), model.weight)
    assert torch.equal(master_state_dict(model, optimizer)["weight"], model.weight)
    optimizer.set_master_weight(model.weight, normal(64, 64))
    assert torch.equal(model.weight, normal(64, 64))
    step(optimizer, model.weight, range(1, 2))
    # Or it would be applied when the model becomes narrow again.
    assert "correction" not in optimizer.state[model.weight]
