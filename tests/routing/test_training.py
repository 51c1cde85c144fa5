"""build's optimizer steps as separate ones do, and everything of torch's that goes around one works."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

import steepest
from steepest.views import rows

from .zoo import GPT, LoRA, MoE, SASRec, ViT


def gradients(model: nn.Module, step: int) -> None:
    """The same gradients for models of the same shapes."""
    generator = torch.Generator().manual_seed(step)
    for param in model.parameters():
        if param.requires_grad:
            param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        gradients(model, step)
        optimizer.step()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def assert_identical(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_it_equals_separate_optimizers_by_hand():
    model = ViT()
    by_hand = copy.deepcopy(model)
    train(model, steepest.build(model, "muon", lr=0.01, weight_decay=0.1), 0, 3)
    named = dict(by_hand.named_parameters())
    hidden = [n for n in named if n.endswith(("qkv.weight", "proj.weight", "up.weight", "down.weight"))]
    tables = ["pos_embed", "head.weight"]
    rest = [name for name in named if name not in {"patch_embed.weight", *hidden, *tables}]
    separate = [
        steepest.Muon([named["patch_embed.weight"], *(named[n] for n in hidden)], lr=0.01, weight_decay=0.1),
        steepest.AdamW([named[name] for name in tables], lr=0.01, weight_decay=0.1),
        steepest.AdamW([named[name] for name in rest], lr=0.01, weight_decay=0.0),
    ]
    for step in range(3):
        gradients(by_hand, step)
        for optimizer in separate:
            optimizer.step()
    assert_identical(values(model), values(by_hand))


@pytest.mark.parametrize("rule", ["muon", "normuon", "quad", "procrustes"])
def test_a_fused_projection_steps_as_its_parts_do(rule: str):
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24, bias=False)
            self.last = nn.Linear(8, 2)

    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, 8, bias=False) for _ in range(3))
            self.last = nn.Linear(8, 2)

    fused, apart = Fused().double(), Apart().double()
    blocks = fused.qkv.weight.detach().split(8)
    for layer, block in zip((apart.q, apart.k, apart.v), blocks, strict=True):
        layer.weight.data.copy_(block)
    apart.last.load_state_dict(fused.last.state_dict())
    # Without noise: it depends on where a matrix stands among the optimizer's.
    quiet = {"noise_scale": 0.0, "norm": "exact"} if rule in ("quad", "procrustes") else {"method": "svd"}
    one = steepest.build(fused, rule, lr=0.1, views={"qkv.weight": rows(8, 8, 8)}, **quiet)
    other = steepest.build(apart, rule, lr=0.1, **quiet)
    for step in range(3):
        gradients(fused, step)
        for layer, block in zip((apart.q, apart.k, apart.v), fused.qkv.weight.grad.split(8), strict=True):
            layer.weight.grad = block.clone()
        apart.last.weight.grad, apart.last.bias.grad = fused.last.weight.grad, fused.last.bias.grad
        one.step()
        other.step()
    together = torch.cat([apart.q.weight, apart.k.weight, apart.v.weight])
    torch.testing.assert_close(fused.qkv.weight, together, rtol=0, atol=1e-12)


def test_experts_step_as_separate_matrices_do():
    model = MoE()
    up = [nn.Parameter(part.detach().clone()) for part in model.layers[0].experts.up]
    optimizer = steepest.build(model, "muon", lr=0.1)
    apart = steepest.Muon(up, lr=0.1)
    for step in range(2):
        gradients(model, step)
        for param, grad in zip(up, model.layers[0].experts.up.grad, strict=True):
            param.grad = grad.clone()
        optimizer.step()
        apart.step()
    torch.testing.assert_close(model.layers[0].experts.up.detach(), torch.stack([p.detach() for p in up]))


# -- schedules


def test_a_scheduler_sees_every_rate():
    model = GPT()
    optimizer = steepest.build(model, "muon", lr=1.0, fallback="lion", fallback_lr=0.5)
    scheduler = CosineAnnealingLR(optimizer, T_max=2)
    train(model, optimizer, 0, 1)
    scheduler.step()
    assert scheduler.get_last_lr() == [0.5, 0.25, 0.25]
    assert {row.rule: row.lr for row in optimizer.explain().rows} == {"muon": 0.5, "lion": 0.25}


@pytest.mark.parametrize("rule", ["muon", "procrustes", "lion"])
def test_one_cycle(rule: str):
    model = GPT()
    optimizer = steepest.build(model, rule, lr=0.1)
    count = len(optimizer.param_groups)
    scheduler = OneCycleLR(optimizer, max_lr=[0.5] * count, total_steps=4)
    for step in range(3):
        train(model, optimizer, step, step + 1)
        scheduler.step()
    assert len(set(scheduler.get_last_lr())) == 1
    assert all(bool(param.isfinite().all()) for param in model.parameters())


# -- checkpoints


@pytest.mark.parametrize("rule", ["muon", "procrustes", "lion"])
@pytest.mark.parametrize("model", [GPT, SASRec, MoE, LoRA])
def test_resuming_is_as_if_never_stopped(model: type[nn.Module], rule: str):
    one = model()
    whole = steepest.build(one, rule, lr=0.01)
    train(one, whole, 0, 3)
    file = io.BytesIO()
    torch.save({"model": one.state_dict(), "optimizer": whole.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    other = model()
    other.load_state_dict(loaded["model"])
    resumed = steepest.build(other, rule, lr=0.5)
    resumed.load_state_dict(loaded["optimizer"])
    train(one, whole, 3, 5)
    train(other, resumed, 3, 5)
    assert_identical(values(one), values(other))


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("model", [GPT, LoRA])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_through_torchs_distributed_checkpoint_format(model: type[nn.Module], flatten: bool):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    one, other = model(), model()
    other.load_state_dict(one.state_dict())
    whole, resumed = steepest.build(one, "muon", lr=0.01), steepest.build(other, "muon", lr=0.01)
    train(one, whole, 0, 2)
    other.load_state_dict(one.state_dict())
    saved = copy.deepcopy(get_optimizer_state_dict(one, whole, options=options))
    set_optimizer_state_dict(other, resumed, saved, options=options)
    train(one, whole, 2, 4)
    train(other, resumed, 2, 4)
    assert_identical(values(one), values(other))
    assert resumed.explain() == whole.explain()


if hasattr(torch.optim, "swap_in_optimizer_params_and_state"):  # since torch 2.13

    def test_parameters_and_state_swapped_in_from_outside():
        one, other = GPT(), GPT()
        other.load_state_dict(one.state_dict())
        optimizer, twin = steepest.build(one, "muon", lr=0.01), steepest.build(other, "muon", lr=0.01)
        train(one, optimizer, 0, 2)
        train(other, twin, 0, 2)
        swapped = copy.deepcopy(one)
        named = dict(swapped.named_parameters())
        ordered = {name: named[name] for group in optimizer.param_groups for name in group["param_names"]}
        before, saved = values(one), copy.deepcopy(optimizer.state_dict())
        with torch.optim.swap_in_optimizer_params_and_state(optimizer, ordered, saved):
            train(swapped, optimizer, 2, 4)
        train(other, twin, 2, 4)
        assert_identical(values(swapped), values(other))
        assert_identical(values(one), before)


def test_a_copy_steps_on():
    model = MoE()
    optimizer = steepest.build(model, "muon", lr=0.01)
    train(model, optimizer, 0, 1)
    other, again = copy.deepcopy((model, optimizer))
    train(model, optimizer, 1, 3)
    train(other, again, 1, 3)
    assert_identical(values(model), values(other))


# -- frozen and thawed


def test_a_thawed_layer_trains_on_with_its_rule():
    model = LoRA()
    optimizer = steepest.build(model, "muon", lr=0.01)
    before = values(model)
    train(model, optimizer, 0, 1)
    assert torch.equal(model.wrapped.base.weight, before["wrapped.base.weight"])
    model.wrapped.base.requires_grad_(True)
    train(model, optimizer, 1, 2)
    assert not torch.equal(model.wrapped.base.weight, before["wrapped.base.weight"])
    row = next(row for row in optimizer.explain().rows if row.name == "wrapped.base.weight")
    assert (row.rule, row.frozen, row.state_bytes) == ("muon", False, 256)
    train(model, optimizer, 2, 3)


def test_closure_and_skipped_steps_are_one_optimizers():
    model = GPT()
    optimizer = steepest.build(model, "muon", nonfinite="skip")
    gradients(model, 0)
    model.wte.weight.grad[0, 0] = torch.nan
    before = values(model)
    optimizer.step()
    assert_identical(values(model), before)
    assert optimizer.skipped_steps == 1
