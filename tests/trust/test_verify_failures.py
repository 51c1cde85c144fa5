"""What verification finds, each by a run that went wrong in just this way; the tensor is named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import steepest
from loops import for_each
from steepest import VerificationError, verify
from steepest.registry import optimizer_class

from .training import backward, make_model, rejected, train


class Wrapper:
    """A wrapper that says it trains with the given optimizer, and trains with another."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.own = torch.optim.AdamW(p for group in optimizer.param_groups for p in group["params"])

    def step(self) -> None:
        self.own.step()

    def zero_grad(self) -> None:
        self.own.zero_grad()


def test_a_wrapper_that_trains_with_another_optimizer():
    model = make_model()
    optimizer = steepest.Muon(
        [{"params": [("w", model[0].weight)]}, {"params": [("b", model[0].bias)], "rule": "lion"}]
    )
    with rejected("'w' changed before any optimizer.step", optimizer):
        train(model, Wrapper(optimizer))


def test_a_wrapper_that_calls_both():
    model = make_model()
    optimizer = steepest.Lion(model.named_parameters())
    wrapper = Wrapper(optimizer)
    with rejected(r"'0.weight' changed after the last", optimizer):
        train(model, optimizer, 1)
        wrapper.step()
        train(model, optimizer, 1)


@for_each("name", steepest.list_optimizers())
def test_a_step_that_is_another_optimizers_inside(name: str):
    weight = nn.Parameter(torch.randn(8, 6, generator=torch.Generator().manual_seed(0)))
    cls = optimizer_class(name)

    class Disguised(cls):
        def step(self, closure=None):
            torch.optim.RMSprop(self.param_groups[0]["params"], lr=0.01).step()

    named = {"layer.weight": weight}.items()
    options = {"scaled_orthogonalize_fn": lambda u: u} if name == "orthogonalized" else {}
    with rejected("'layer.weight'", Disguised(named, **options)) as run:
        weight.grad = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
        run._optimizer.step()


class ClippedMuon(steepest.Muon):
    """Clips the norm after orthogonalizing, where the norm is what was chosen."""

    def orthogonalize(self, p, grad, **options):
        polar = super().orthogonalize(p, grad, **options)
        return polar * (0.3 / polar.norm()).clamp(max=1)


def test_clipping_after_orthogonalization_by_a_subclass():
    # The copy has the same subclass's code, so that only the singular values tell.
    model = make_model()
    optimizer = ClippedMuon({"0.weight": model[0].weight}.items())
    with rejected(r"'0.weight', stepped by 'muon': 6 singular values .* ≥ 0.4", optimizer):
        train(model, optimizer)


def test_clipping_after_orthogonalization_by_a_hook():
    model = make_model()
    weight = model[0].weight
    optimizer = steepest.Muon({"0.weight": weight}.items(), weight_decay=0.0)
    kept = {}

    def keep(optimizer, args, kwargs):
        kept["p"] = weight.detach().clone()

    def clip(optimizer, args, kwargs):
        with torch.no_grad():
            weight.copy_(kept["p"] + 0.9 * (weight - kept["p"]))

    optimizer.register_step_pre_hook(keep)
    optimizer.register_step_post_hook(clip)
    # 0.9 leaves the singular values in the band; the comparison with the copy tells.
    with rejected(r"'0.weight', in a group of 'muon': it moved by", optimizer):
        train(model, optimizer)


def dead(kind: str) -> tuple[nn.Module, steepest.Optimizer]:
    """A model and its optimizer, whose second group is dead."""
    model = make_model()
    groups = [
        {"params": list(model[0].named_parameters("0"))},
        {"params": list(model[2].named_parameters("2")), **({"lr": 0.0} if kind == "learning rate" else {})},
    ]
    optimizer = steepest.AdamW(groups, lr=0.01, weight_decay=0.0)
    if kind in ("requires", "no gradient"):
        model[2].requires_grad_(False)
    if kind == "no gradient":
        for param in optimizer.param_groups[1]["params"]:
            param.requires_grad_(True)
        model[2].forward = lambda x: torch.nn.functional.linear(
            x, model[2].weight.detach(), model[2].bias.detach()
        )
    if kind == "gradient is 0":
        model[2].register_forward_hook(lambda module, args, out: 0 * out + args[0][:, :4])
    return model, optimizer


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("learning rate", "'2.weight' did not move in 3 steps: its learning rate is 0; 2 of the 2"),
        (
            "requires",
            "group 1 is dead: none of its 2 tensors requires a gradient; the first is parameter '2.weight'",
        ),
        ("no gradient", "'2.weight' did not move in 3 steps: it had no gradient"),
        ("gradient is 0", "'2.weight' did not move in 3 steps: its gradient is 0"),
    ],
)
def test_a_dead_group(kind: str, said: str):
    model, optimizer = dead(kind)
    with rejected(said, optimizer):
        train(model, optimizer)


def test_a_step_lost_to_rounding_and_the_master_that_keeps_it():
    for options in ({}, {"master": "split16"}):
        weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        optimizer = steepest.Lion({"weight": weight}.items(), lr=1e-4, **options)
        run = verify(optimizer)
        run.__enter__()
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        if options:
            run.__exit__(None, None, None)
        else:
            with pytest.raises(VerificationError, match=r"'weight' did not move .*bfloat16 to represent"):
                run.__exit__(None, None, None)


def test_tensors_that_may_rest_are_named():
    model, optimizer = dead("learning rate")
    with verify(optimizer, may_rest=["2.weight", "2.bias"]):
        train(model, optimizer)
    with rejected("'2.bias' did not move", optimizer, may_rest=["2.weight"]):
        train(model, optimizer)


def test_a_parameter_that_nobody_steps():
    model = make_model()
    named = [(name, param) for name, param in model.named_parameters() if name != "2.bias"]
    optimizer = steepest.Lion(named)
    with verify(optimizer):
        train(model, optimizer)
    with rejected("'2.bias' of the model is in no group .* nothing stepped it", optimizer, model=model):
        train(model, optimizer)
    # A second optimizer's parameters are stepped by somebody, frozen ones by nobody on purpose.
    other = torch.optim.SGD([model[2].bias], lr=0.1)
    with verify(optimizer, model=model):
        train(model, optimizer, between=other.step)
    model[2].bias.requires_grad_(False)
    with verify(optimizer, model=model):
        train(model, optimizer)


def test_names_of_the_model_are_used_if_the_optimizer_has_none():
    model = make_model()
    optimizer = steepest.Lion(model.parameters(), lr=0.0)
    with rejected(r"parameter '0.weight' did not move", optimizer, model=model):
        train(model, optimizer)
    with rejected(r"parameter 0 of group 0 \(shape \(8, 6\)\) did not move", optimizer):
        train(model, optimizer)


def test_no_step_at_all():
    model = make_model()
    with rejected("no step was taken", steepest.Lion(model.parameters())):
        backward(model, 0)


def test_a_step_that_should_have_been_skipped():
    model = make_model()
    optimizer = steepest.Lion(model.named_parameters(), nonfinite="skip")

    def write(optimizer, args, kwargs):
        with torch.no_grad():
            model[0].bias.add_(1)

    optimizer.register_step_post_hook(write)
    with rejected(r"'0.bias' changed in a step that had to be skipped", optimizer):
        backward(model, 0)
        model[2].weight.grad[0, 0] = torch.nan
        optimizer.step()


def test_packed_weights_that_somebody_else_flips():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    steepest.ternary.ternarize(model)
    optimizer = steepest.build(model, "lion", ternary={"threshold": 2})
    optimizer.register_step_post_hook(lambda *_: model[0].packed[0, 0].bitwise_xor_(1))
    with rejected("'0.votes'.*1 bytes of packed weights", optimizer):
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()


def test_what_is_not_served_is_refused():
    model = make_model()
    with pytest.raises(TypeError, match=r"takes an optimizer of steepest, got torch.optim.adamw.AdamW"):
        verify(torch.optim.AdamW(model.parameters()))
    optimizer = steepest.Lion(model.parameters())
    with steepest.release_gradients(model, optimizer), pytest.raises(ValueError, match="are released"):
        verify(optimizer).__enter__()
    with verify(optimizer) as run:
        train(model, optimizer)
        with pytest.raises(ValueError, match="entered already"):
            run.__enter__()


def test_an_error_in_the_context_is_not_hidden():
    model = make_model()
    optimizer = steepest.Lion(model.parameters())
    with pytest.raises(KeyError), verify(optimizer):
        raise KeyError("ours")
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("name", ["adamw", "lion", "soap", "muon", "quad"])
@pytest.mark.parametrize("early", [True, False])
def test_state_that_somebody_else_writes(name: str, early: bool):
    model = make_model()
    optimizer = steepest.create(name, {"0.weight": model[0].weight}.items())

    def write(optimizer, args, kwargs):
        for entry in optimizer.state[model[0].weight].values():
            if entry.shape == model[0].weight.shape:
                entry.mul_(100)

    if early:  # before verify sees what the step has left
        optimizer.register_step_post_hook(write)
    said = (
        r"in a group of .*: the state '.*' is not what"
        if early
        else r"the state '.*' of parameter '0.weight'"
    )
    with rejected(said, optimizer):
        train(model, optimizer, 1)
        if not early:
            optimizer.register_step_post_hook(write)
        train(model, optimizer, 2)


@pytest.mark.parametrize("early", [True, False])
def test_state_that_is_cleared_before_each_step(early: bool):
    model = make_model()
    optimizer = steepest.AdamW(model.named_parameters())
    if early:
        optimizer.register_step_pre_hook(lambda *_: optimizer.state.clear())
        with rejected(r"the state '\w+' of parameter '0.weight' changed after the last", optimizer):
            train(model, optimizer)
    else:
        with rejected(r"'0.weight', in a group of 'adamw'", optimizer):
            train(model, optimizer, 1)
            optimizer.register_step_pre_hook(lambda *_: optimizer.state.clear())
            train(model, optimizer, 1)


@pytest.mark.parametrize("options", [{"state_dtype": "int8"}, {"state_dtype": torch.bfloat16}], ids=str)
def test_stored_state_that_somebody_else_writes(options):
    weight = nn.Parameter(torch.ones(512))
    optimizer = steepest.AdamW({"w": weight}.items(), **options)

    def write(optimizer, args, kwargs):
        optimizer.state[weight]["exp_avg"][3] = 0

    optimizer.register_step_post_hook(write)
    with rejected("'w', in a group of 'adamw': the state 'exp_avg' is not what", optimizer):
        weight.grad = torch.randn(512, generator=torch.Generator().manual_seed(0))
        weight.grad[3] = 9.0
        optimizer.step()


def test_a_dead_layer_that_decays():
    model, _ = dead("gradient is 0")
    optimizer = steepest.AdamW(model.named_parameters(), weight_decay=0.01)
    with rejected("'2.weight' moved in 3 steps by weight decay or old momentum alone: its grad", optimizer):
        train(model, optimizer)
    with verify(optimizer, may_rest=["2.weight", "2.bias"]):
        train(model, optimizer)


def test_numbers_that_are_not_finite_are_compared():
    model = make_model()
    with torch.no_grad():
        model[0].weight[0, :3] = torch.tensor([torch.nan, torch.inf, 1.0])
    optimizer = steepest.Lion(model.named_parameters())
    for at, value in ((0, 0.0), (1, torch.finfo(torch.float32).max), (2, torch.nan)):
        with rejected("'0.weight' changed before any", optimizer), torch.no_grad():
            model[0].weight[0, at] = value


def test_a_group_added_after_the_last_step():
    model = make_model()
    optimizer = steepest.Lion(model[0].named_parameters("0"))
    with rejected(r"'2.weight' did not move in 3 steps: its group was added after the last one", optimizer):
        train(model, optimizer)
        optimizer.add_param_group({"params": list(model[2].named_parameters("2"))})


def test_arguments_that_would_be_ignored_are_refused():
    optimizer = steepest.Lion(make_model().named_parameters())
    with pytest.raises(ValueError, match="loin"):
        verify(optimizer, laws={"loin": None})
    with pytest.raises(ValueError, match="gradient_scale=None compares no gradients, so max_norm"):
        verify(optimizer, gradient_scale=None, max_norm=1.0)
    with pytest.raises(TypeError, match=r"may_rest=\['2.bias'\]"):
        verify(optimizer, may_rest="2.bias")
