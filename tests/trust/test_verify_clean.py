"""No false alarms: what the library does by itself verifies, whatever rule, dtype and options."""

from __future__ import annotations

import copy
import itertools
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import steepest
from contract.cases import CASES, LOW_BIT, RULES, Case, by_id
from contract.training import set_gradients
from loops import for_each
from steepest.trust.laws import LAWS

from .training import backward, make_model, train

DECAYS = ("decoupled", "independent", "untied", "l2", "palm", "sign", "cautious")
# Each case takes another of them.
SETTINGS: list[dict[str, Any]] = [
    *({"weight_decay": 0.1, "weight_decay_method": method} for method in DECAYS),
    {"maximize": True},
    {"state_dtype": torch.bfloat16},
    {"nonfinite": "skip", "weight_decay": 0.05},
]


def verified(case: Case, dtype: torch.dtype, **options: Any) -> steepest.Verification:
    params = case.params(dtype)
    named = [(f"p{index}", param) for index, param in enumerate(params)]
    try:
        optimizer = case.make(named, **options)
    except ValueError:  # such as a decay method that the rule does not take
        optimizer = case.make(named)
    # A bfloat16 number may be too large to move in two steps.
    with steepest.verify(
        optimizer, may_rest=() if dtype == torch.float32 else [n for n, _ in named]
    ) as found:
        for step in range(2):
            set_gradients(params, step)
            optimizer.step()
    return found


@for_each(("case", "options"), list(zip(CASES, itertools.cycle(SETTINGS), strict=False)))
def test_every_case_verifies_in_float32_with_some_option(case: Case, options: dict[str, Any]):
    assert verified(case, torch.float32, **options).steps == 2


@for_each("case", CASES)
def test_every_case_verifies_in_bfloat16_with_stochastic_rounding(case: Case):
    assert verified(case, torch.bfloat16, rounding="stochastic").steps == 2


@pytest.mark.parametrize(("case", "dtype"), LOW_BIT, ids=str)
def test_low_bit_state_and_masters_verify(case: Case, dtype: torch.dtype):
    assert verified(case, dtype).steps == 2


@for_each("method", DECAYS)
@for_each("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_decay_is_taken_out_of_a_sign_rule(method: str, dtype: torch.dtype):
    verified(Case("lion"), dtype, weight_decay=0.3, weight_decay_method=method)


def test_every_rule_has_a_law_or_is_named_here():
    # Their updates have no property that is not the equation itself: the copy's step is their law.
    replayed = {"sgd", "adamw", "adam_mini", "ademamix", "soap", "orthogonalized"}
    assert LAWS.keys() | replayed == set(steepest.list_optimizers())
    assert not LAWS.keys() & replayed


def test_a_report_holds_what_the_laws_measured():
    weight = nn.Parameter(torch.randn(8, 5, generator=torch.Generator().manual_seed(0)))
    optimizer = steepest.Muon({"weight": weight}.items(), lr=0.1, method="svd")
    with steepest.verify(optimizer) as verification:
        weight.grad = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
        optimizer.step()
    (report,) = verification.report.values()
    assert report == pytest.approx({"largest singular value": 1.0, "smallest singular value": 1.0}, abs=1e-5)


@pytest.mark.parametrize("case", [*RULES, Case("hyperball", {"radius": 2.0})], ids=by_id)
def test_odd_gradients_and_empty_tensors_verify(case: Case):
    # None, zeros, tiny and huge ones, sparse and constant ones, and one that is not finite, in any order.
    for seed, dtype in ((0, torch.float32), (1, torch.float16)):
        draw = torch.Generator().manual_seed(seed)
        params = case.params(dtype, shapes=((4, 3), (9, 7), (5,), (0, 3)))
        named = [(f"p{index}", param) for index, param in enumerate(params)]
        options = {"weight_decay": 0.1, "weight_decay_method": "cautious", "maximize": seed == 0}
        optimizer = case.make(named, nonfinite="skip", lr=0.001, **options)
        with steepest.verify(optimizer, may_rest=dict(named)):
            for step in range(5):
                for param in params:
                    noise = torch.randn(param.shape, generator=draw)
                    kinds = [
                        None,
                        0 * noise,
                        1e-30 * noise,
                        1e4 * noise,
                        noise.relu(),
                        torch.ones_like(noise),
                    ]
                    kind = kinds[int(torch.randint(0, len(kinds), (), generator=draw))]
                    param.grad = None if kind is None else kind.to(dtype)
                if step == 3:
                    params[0].grad = torch.full_like(params[0], torch.nan)
                optimizer.step()


@for_each("wide", [8, 128])
@for_each("name", ["muon", "scion", "polargrad", "normuon", "hyperball"])
@for_each("coefficients", ["quintic", "jordan", "minimax_17_17"])
def test_muons_band_holds_for_bad_gradients(name: str, coefficients: str, wide: int):
    # Rank-deficient, badly scaled, with a few huge or tiny columns; at 128 perhaps in half precision.
    for seed in range(6 if wide == 8 else 1):
        draw = torch.Generator().manual_seed(seed)
        weight = nn.Parameter(torch.randn(wide, wide + 5, generator=draw))
        optimizer = steepest.create(name, [weight], lr=1.0, coefficients=coefficients, weight_decay=0.0)
        with steepest.verify(optimizer):
            for _ in range(2):
                rank = 1 + seed % 4
                low = torch.randn(wide, rank, generator=draw) @ torch.randn(rank, wide + 5, generator=draw)
                spread = 10.0 ** torch.randint(-6, 3, (wide + 5,), generator=draw)
                weight.grad = 10.0 ** (8 - seed) * (low + 0.01 * torch.randn_like(weight)) * spread
                optimizer.step()


@pytest.mark.parametrize("name", ["quad", "procrustes"])
@pytest.mark.parametrize("shape", [(7,), (6, 6), (5, 6)])
def test_psgds_fit_whitens_whatever_the_gradients(name: str, shape: tuple[int, ...]):
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        weight = nn.Parameter(torch.randn(shape, generator=draw))
        optimizer = steepest.create(name, [weight], lr=0.1, max_skew_dense=float("inf"))
        scale = torch.ones(shape[-1:])
        with steepest.verify(optimizer):
            for step in range(10):
                # Its statistics change at once, and a spike comes.
                scale = 10.0 ** torch.randint(-3, 3, shape[-1:], generator=draw) if step % 6 == 0 else scale
                weight.grad = torch.randn(shape, generator=draw) * scale * (1e4 if step == 8 else 1)
                optimizer.step()


def test_users_rules_and_subclasses_verify():
    class Scaled(steepest.OrthogonalizedOptimizer):
        def orthogonalize(self, p, grad, **options):
            return grad * p.gain

    class Counting(steepest.Lion):
        calls = 0

        def step(self, closure=None):
            self.calls += 1
            return super().step(closure)

    model = make_model()
    for param in model.parameters():
        param.gain = 2.0
    matrices = [param for param in model.parameters() if param.dim() == 2]
    with steepest.verify(Scaled(matrices, lr=0.1), model=None) as verification:
        train(model, verification._optimizer)
    steepest.Lion(model.parameters())  # so that torch's hooks surround the step of the base class, too
    optimizer = Counting(model.parameters(), lr=0.1)
    with steepest.verify(optimizer, model=model) as verification:
        train(model, optimizer)
    assert verification.steps == optimizer.calls == 3


def test_closures_schedulers_tensor_rates_and_several_rules_verify():
    model = make_model()
    groups = [
        {"params": [model[0].weight, model[2].weight]},
        {"params": [model[0].bias, model[2].bias], "rule": "adamw", "lr": torch.tensor(0.01)},
    ]
    optimizer = steepest.Optimizer(groups, rule="muon", lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    def closure():
        optimizer.zero_grad()
        backward(model, 0)
        return 1.5

    with steepest.verify(optimizer, model=model) as verification:
        for _ in range(3):
            assert optimizer.step(closure) == 1.5
            schedule.step()
    assert verification.steps == 3


def test_a_skipped_step_is_one_that_changes_nothing():
    model = make_model()
    optimizer = steepest.Lion(model.named_parameters(), nonfinite="skip")
    with steepest.verify(optimizer) as verification:
        train(model, optimizer, 2)
        model[0].weight.grad[0, 0] = torch.inf
        optimizer.step()
    assert (verification.steps, optimizer.skipped_steps) == (3, 1)


def test_a_step_that_raised_is_forgotten():
    model = make_model()
    optimizer = steepest.Lion(model.named_parameters(), nonfinite="raise")
    with steepest.verify(optimizer):
        train(model, optimizer, 1)
        model[0].weight.grad[0, 0] = torch.nan
        with pytest.raises(FloatingPointError):
            optimizer.step()
        train(model, optimizer, 2)


def test_ternary_layers_verify():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    steepest.ternary.ternarize(model)
    optimizer = steepest.build(model, "lion", ternary={"threshold": 2})
    with steepest.verify(optimizer, model=model):
        for step in range(4):
            optimizer.zero_grad()
            model(
                torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
            ).square().mean().backward()
            optimizer.step()


def test_nothing_is_left_behind():
    model = make_model()
    optimizer = steepest.AdamW(model.named_parameters())
    with steepest.verify(optimizer, model=model):
        train(model, optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    for param in model.parameters():
        assert not param._backward_hooks
        assert not param._post_accumulate_grad_hooks


def test_a_verified_run_is_the_same_run():
    runs = []
    for verifying in (False, True):
        model = make_model(torch.bfloat16)
        optimizer = steepest.SOAP(model.named_parameters(), rounding="stochastic", seed=3)
        generator = torch.get_rng_state()
        if verifying:
            with steepest.verify(optimizer, model=model):
                train(model, optimizer, 4)
        else:
            train(model, optimizer, 4)
        assert torch.equal(generator, torch.get_rng_state())
        runs.append([param.detach().clone() for param in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.parametrize("changed", ["lr", "load", "add", "nothing"])
@pytest.mark.parametrize("subclass", [False, True])
def test_what_is_changed_after_a_step_that_raised_counts_for_the_next(changed: str, subclass: bool):
    class Own(steepest.Lion):
        def step(self, closure=None):
            return super().step(closure)

    model = make_model()
    steepest.Lion(model.parameters())  # so that torch's hooks surround the step of the base class, too
    optimizer = (Own if subclass else steepest.Lion)(list(model[0].named_parameters("0")), nonfinite="raise")
    with steepest.verify(optimizer) as verification:
        train(model, optimizer, 1)
        saved = copy.deepcopy(optimizer.state_dict())
        train(model, optimizer, 1)
        model[0].weight.grad[0, 0] = torch.nan
        with pytest.raises(FloatingPointError) as kept:
            optimizer.step()
        if changed == "lr":
            optimizer.param_groups[0]["lr"] /= 2
        if changed == "load":
            optimizer.load_state_dict(saved)
        if changed == "add":
            optimizer.add_param_group({"params": list(model[2].named_parameters("2"))})
        train(model, optimizer, 2)
    assert kept.value
    assert verification.steps == 4


@pytest.mark.parametrize("by_name", [False, True])
def test_the_other_arguments_of_a_subclass_reach_its_step(by_name: bool):
    class Tagged(steepest.Lion):
        def step(self, closure=None, tag=None, *, more=None):
            tags.append((tag, more))
            return super().step(closure)

    tags = []
    model = make_model()
    optimizer = Tagged(model.named_parameters())

    def closure():
        optimizer.zero_grad()
        backward(model, 0)
        return 1.5

    with steepest.verify(optimizer):
        if by_name:
            assert optimizer.step(closure=closure, tag="x", more=2) == 1.5
        else:
            assert optimizer.step(closure, "x", more=2) == 1.5
    assert tags == [("x", 2)]


def test_a_ternary_layer_whose_votes_all_became_flips():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    steepest.ternary.ternarize(model)
    optimizer = steepest.build(model, "lion", ternary={"threshold": 2})
    packed = model[0].packed.clone()
    with steepest.verify(optimizer, model=model):
        for _ in range(2):
            model(torch.ones(8, 16)).square().mean().backward()
        optimizer.step()
    assert not torch.equal(packed, model[0].packed)
    assert not any(state["accumulator"].any() for state in optimizer.state.values() if "accumulator" in state)


def test_a_state_dict_may_be_loaded_and_what_is_added_later_is_known():
    model = make_model()
    optimizer = steepest.AdamW(model[0].named_parameters("0"))
    with steepest.verify(optimizer, model=model[0]):
        train(model, optimizer, 1)
        saved = copy.deepcopy(optimizer.state_dict())
        train(model, optimizer, 2)
        optimizer.load_state_dict(saved)
        train(model, optimizer, 2)
        optimizer.add_param_group({"params": list(model[2].named_parameters("2"))})
        train(model, optimizer, 1)


def test_frozen_groups_that_build_makes():
    model = make_model()
    model[2].weight.requires_grad_(False)
    for name in ("lion", "muon"):
        optimizer = steepest.build(model, name)
        with steepest.verify(optimizer, model=model):
            train(model, optimizer)


def test_an_empty_parameter_of_the_model_needs_nobody():
    model = make_model()
    optimizer = steepest.Lion(model.named_parameters())
    model.empty = nn.Parameter(torch.zeros(0, 3))
    with steepest.verify(optimizer, model=model):
        train(model, optimizer)


def test_no_copies_are_kept_and_a_second_use_counts_anew():
    model = make_model()
    optimizer = steepest.AdamW([model[0].weight, model[0].bias])
    verification = steepest.verify(optimizer, model=model, may_rest=[])
    for steps in (3, 2):
        model.zero_grad()
        other = torch.optim.SGD(model[2].parameters(), lr=0.1)
        with verification:
            train(model, optimizer, steps, between=other.step)
            copies = [each.weights for each in verification._last.values()]
            copies += [first for _, first in verification._others.values()]
            copies += verification._delivered._sums.values()
            copies = [weakref.ref(each) for each in copies]
            assert len(copies) == 2 + 2 + 4
        assert verification.steps == steps
        assert [copy() for copy in copies] == [None] * len(copies)
