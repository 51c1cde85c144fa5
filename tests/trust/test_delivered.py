"""What is stepped is what backward delivered: gradients divided twice, not at all, or changed in between."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import steepest
from steepest import verify

from .training import backward, make_model, rejected, train

PARTS = 4


def accumulated(
    optimizer: torch.optim.Optimizer, model: nn.Module, of_loss: float, of_gradients: float
) -> None:
    """Two steps, each of the sum of PARTS backward passes."""
    for step in range(2):
        optimizer.zero_grad()
        for part in range(PARTS):
            backward(model, PARTS * step + part, of_loss)
        for param in model.parameters():
            param.grad *= of_gradients
        optimizer.step()


@pytest.mark.parametrize("name", ["sgd", "adamw", "lion"])
def test_divided_in_the_loss_and_again_in_the_gradients(name: str):
    model = make_model()
    optimizer = steepest.create(name, model.named_parameters(), lr=0.01)
    with verify(optimizer):
        accumulated(optimizer, model, 1 / PARTS, 1)
    with verify(optimizer, gradient_scale=1 / PARTS):
        accumulated(optimizer, model, 1, 1 / PARTS)
    with rejected(r"'0.weight': .* is 0.25 times what backward .* be 1 times", optimizer):
        accumulated(optimizer, model, 1 / PARTS, 1 / PARTS)
    with verify(optimizer, gradient_scale=None):
        accumulated(optimizer, model, 1 / PARTS, 1 / PARTS)


def test_divided_after_each_backward_pass():
    # The first pass's gradients are then divided four times: no number explains the sum.
    model = make_model()
    optimizer = steepest.SGD(model.named_parameters(), lr=0.01)
    with rejected(
        "'0.weight': the gradient .* is not the one that backward", optimizer, gradient_scale=1 / PARTS
    ):
        for part in range(PARTS):
            backward(model, part)
            for param in model.parameters():
                param.grad /= PARTS
        optimizer.step()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_grad_scaler(set_to_none: bool):
    model = make_model()
    optimizer = steepest.AdamW(model.named_parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def steps(twice: bool) -> None:
        for step in range(3):
            optimizer.zero_grad(set_to_none)
            backward(model, step, scaler.scale(torch.ones(())))
            if step == 1:  # which is skipped by not being called
                model[0].weight.grad[0, 0] = torch.inf
            if twice:
                for param in model.parameters():
                    param.grad /= scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()

    with verify(optimizer, gradient_scale=lambda: 1 / scaler.get_scale()):
        steps(twice=False)
    with rejected(
        r"'0.weight': .* is 3.8147e-06 times .* be 0.00195312 times",
        optimizer,
        gradient_scale=lambda: 1 / scaler.get_scale(),
    ):
        steps(twice=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with rejected(r"be 1 times", optimizer):
        steps(twice=False)


@pytest.mark.parametrize("limit", [0.01, 100.0])
def test_clip_grad_norm(limit: float):
    model = make_model()
    optimizer = steepest.SGD(model.named_parameters(), lr=0.01)

    def clip() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), limit)

    with verify(optimizer, max_norm=limit):
        train(model, optimizer, between=clip)
    with rejected("should be", optimizer, max_norm=limit / 1e4):
        train(model, optimizer, between=clip)
    # The norm is that of the whole model, of which the optimizer may have a part.
    own = steepest.SGD([("2.weight", model[2].weight)], lr=0.01)
    rest = torch.optim.SGD([model[0].weight, model[0].bias, model[2].bias], lr=0.01)
    with verify(own, model=model, max_norm=limit):
        for step in range(3):
            model.zero_grad()
            backward(model, step)
            clip()
            rest.step()
            own.step()


def test_one_gradient_clipped_by_value():
    model = make_model()
    optimizer = steepest.SGD(model.named_parameters(), lr=0.01)
    with rejected("'2.weight': the gradient .* something changed it", optimizer):
        train(model, optimizer, between=lambda: model[2].weight.grad.clamp_(-1e-3, 1e-3))


def test_gradients_that_no_training_step_adds_are_not_counted():
    model = make_model()
    optimizer = steepest.SGD(model.named_parameters(), lr=0.01)
    batch = torch.randn(4, 6)
    with verify(optimizer):
        for step in range(2):
            optimizer.zero_grad()
            backward(model, step)
            torch.autograd.grad(model(batch).sum(), list(model.parameters()))
            optimizer.step()


def test_assigned_gradients_and_what_was_there_before_are_not_compared():
    model = make_model()
    optimizer = steepest.SGD(model.named_parameters(), lr=0.01)
    backward(model, 0)
    with verify(optimizer):
        backward(model, 1)
        optimizer.step()
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    with verify(optimizer):
        optimizer.step()


def test_sparse_gradients_and_bfloat16():
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 2)).to(torch.bfloat16)
    optimizer = steepest.SGD(model.named_parameters(), lr=0.5)
    with verify(optimizer):
        for step in range(2):
            optimizer.zero_grad()
            for _ in range(3):
                model(torch.tensor([1, 2, 2, 3 + step])).square().mean().backward()
            optimizer.step()


class Experts(nn.Module):
    """A layer that all batches use, and two of which each batch uses one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Linear(6, 6)
        self.experts = nn.ModuleList([nn.Linear(6, 4), nn.Linear(6, 4)])
        self.used = 0

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.experts[self.used](self.shared(batch))


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("limit", [None, 0.01])
def test_a_layer_that_some_steps_do_not_reach(set_to_none: bool, limit: float | None):
    model = Experts()
    optimizer = steepest.SGD(model.named_parameters(), lr=0.01)
    with verify(optimizer, model=model, max_norm=limit):
        for step in range(4):
            model.used = step % 2
            optimizer.zero_grad(set_to_none)
            backward(model, step)
            if limit is not None:
                nn.utils.clip_grad_norm_(model.parameters(), limit)
            optimizer.step()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_that_are_cleared_on_purpose_are_not_dropped(set_to_none: bool):
    model = Experts()
    optimizer = steepest.SGD(model.named_parameters(), lr=0.01)
    with verify(optimizer):
        for step in range(2):
            for used in (0, 1):
                backward(model, step)
                optimizer.zero_grad(set_to_none)
                # Both are cleared; the batch that is stepped reaches one of them.
                model.used = used
                for again in range(2):
                    backward(model, again)
                optimizer.step()
                optimizer.zero_grad(set_to_none)


def test_a_gradient_that_is_dropped():
    model = make_model()
    optimizer = steepest.SGD(model.named_parameters(), lr=0.01)

    def drop() -> None:
        model[2].bias.grad = None

    with rejected("'2.bias': backward delivered a gradient, but the step found none", optimizer):
        train(model, optimizer, between=drop)
    with verify(optimizer, gradient_scale=None, may_rest=["2.bias"]):
        train(model, optimizer, between=drop)


@pytest.mark.parametrize("how", ["unfrozen", "added", "begun before", "assigned"])
def test_the_norm_of_gradients_that_were_not_all_watched(how: str):
    model, limit = make_model(), 0.01
    if how == "unfrozen":
        model[2].requires_grad_(False)
    named = [(n, p) for n, p in model.named_parameters() if how != "added" or n[0] == "0"]
    optimizer = steepest.SGD(named, lr=0.01)
    model[2].requires_grad_(how != "added" and how != "unfrozen")

    def step(batch: int, factor: float = 1.0) -> None:
        backward(model, batch)
        if how == "assigned":
            model[2].weight.grad = torch.ones_like(model[2].weight)
        nn.utils.clip_grad_norm_(model.parameters(), limit)
        for param in model.parameters():
            if param.grad is not None:
                param.grad *= factor
        optimizer.step()
        optimizer.zero_grad()

    if how == "begun before":
        backward(model, 9)
        model[0].zero_grad()  # so that some gradients are all new
    if how == "assigned":
        named[2][1].requires_grad_(False)
    with verify(optimizer, max_norm=limit, may_rest=["2.weight"]):
        step(0)
        model[2].requires_grad_(how != "assigned")
        if how == "added":
            optimizer.add_param_group({"params": list(model[2].named_parameters("2"))})
        for batch in range(2):
            step(batch)
    if how != "assigned":  # once all of them are watched, the norm is checked again
        with rejected("is 0.[0-9]+ times", optimizer, max_norm=limit):
            step(3, 0.5)


@pytest.mark.parametrize("within", [False, True])
def test_a_hook_that_scales_belongs_to_what_is_delivered_if_it_was_there_before(within: bool):
    model = make_model()
    optimizer = steepest.SGD(model.named_parameters(), lr=0.01)
    if within:
        with rejected("'2.bias': .* is 0.5 times what backward delivered", optimizer):
            model[2].bias.register_hook(lambda gradient: gradient / 2)
            train(model, optimizer)
    else:
        model[2].bias.register_hook(lambda gradient: gradient / 2)
        with verify(optimizer):
            train(model, optimizer)
