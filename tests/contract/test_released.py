"""Released gradients: the same steps as ever, within backward."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import steepest
from loops import for_each
from steepest.compile.available import compiler_available
from steepest.lab.models.gpt import GPT, GPTConfig

from .cases import CASES, LOW_BIT, RULES, Case, able, by_id, related, spread
from .released import are_freed, backward, holder, ordinary_run, released_run
from .training import identical, make_params, set_gradients, values

DTYPES = [torch.float32, torch.bfloat16, torch.complex64]
RELEASABLE = [case for case in CASES if not related(case)]
OPTIONS: dict[str, Any] = {"rounding": "stochastic", "weight_decay": 0.125, "seed": 5}


def agree(case: Case, ours: Any, theirs: Any) -> bool:
    """Bit for bit; a stack of matrices may be multiplied in another order than one alone."""
    if case.rule.scope == "matrix":
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-2)
        return True
    return identical(ours, theirs)


@pytest.mark.parametrize(("case", "dtype"), [*spread(RELEASABLE, DTYPES), *LOW_BIT], ids=str)
def test_it_takes_the_steps_of_the_ordinary_loop(case: Case, dtype: torch.dtype):
    params, twins = case.params(dtype), case.params(dtype)
    optimizer, twin = case.make(params, **OPTIONS), case.make(twins, **OPTIONS)
    released_run(optimizer, params, range(6))
    ordinary_run(twin, twins, range(6))
    assert agree(case, values(params), values(twins))
    ours, theirs = optimizer.state_dict(), twin.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert agree(case, ours["state"], theirs["state"])


@pytest.mark.parametrize(
    "weight_decay_method", ["decoupled", "independent", "l2", "palm", "sign", "cautious"]
)
def test_every_weight_decay_acts_as_ever(weight_decay_method: str):
    params, twins = make_params(), make_params()
    options = {"weight_decay": 0.3, "weight_decay_method": weight_decay_method}
    released_run(Case("adamw").make(params, **options), params, range(4))
    ordinary_run(Case("adamw").make(twins, **options), twins, range(4))
    assert identical(params, twins)


@pytest.mark.skipif(not compiler_available("cpu"), reason="torch.compile needs a C++ compiler")
def test_compiled_it_takes_the_same_steps():
    params, twins = (make_params(shapes=[(4, 3), (4, 3)]) for _ in range(2))
    released_run(Case("adamw").make(params, compile=True), params, range(3))
    ordinary_run(Case("adamw").make(twins, compile=False), twins, range(3))
    assert identical(params, twins)


def test_gradients_of_another_dtype_than_the_parameter():
    def run(some: list[Any], drive: Any) -> None:
        for param in some:
            param.grad_dtype = torch.float32
        drive(Case("adamw").make(some), some, range(3))

    params, twins = make_params(torch.bfloat16), make_params(torch.bfloat16)

    def plain(optimizer: Any, some: Any, steps: Any) -> None:
        for step in steps:
            backward(some, step, {0} if step % 3 == 2 else ())
            assert some[1].grad.dtype == torch.float32
            optimizer.step()
            optimizer.zero_grad()

    run(params, released_run)
    run(twins, plain)
    assert identical(params, twins)


# -- a real model


def gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(width=16, depth=2, heads=2, context=8, tied=True))


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    tokens = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(step))
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize("name", ["adamw", "lion", "signgsd"])
def test_a_tied_gpt_trains_to_the_same_bits_with_a_schedule(name: str):
    model, twin = gpt(), gpt()
    ours, theirs = (steepest.create(name, m.parameters(), lr=1e-2) for m in (model, twin))
    steepest.release_gradients(model, ours)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (ours, theirs)]
        for step in range(4):
            for m, optimizer, schedule in ((model, ours, schedules[0]), (twin, theirs, schedules[1])):
                loss_of(m, step).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    assert identical(list(model.parameters()), list(twin.parameters()))
    assert identical(ours.state_dict()["state"], theirs.state_dict()["state"])


def test_no_two_gradients_ever_exist_together():
    model = gpt()
    params = list(model.parameters())
    optimizer = steepest.Lion(model.parameters())
    alive: list[int] = []
    for param in params:  # before the release, so that it sees what the release is about to free
        param.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(not are_freed([p]) for p in params))
        )
    loss_of(model, 0).backward()
    assert max(alive) == len(params)
    alive.clear()
    optimizer.zero_grad()
    steepest.release_gradients(model, optimizer)
    loss_of(model, 0).backward()
    assert alive == [1] * len(params)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_see_the_parameters_of_the_forward_pass(reentrant: bool):
    class Checkpointed(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self:
                x = checkpoint(layer, x, use_reentrant=reentrant)
            return x

    torch.manual_seed(0)
    model = Checkpointed(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)))
    twin = copy.deepcopy(model)
    x = torch.randn(5, 4, requires_grad=True)
    ours, theirs = (steepest.AdamW(m.parameters(), lr=0.1) for m in (model, twin))
    steepest.release_gradients(model, ours)
    for _ in range(3):
        for m, optimizer in ((model, ours), (twin, theirs)):
            m(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert identical(list(model.parameters()), list(twin.parameters()))


def test_a_layer_that_is_checkpointed_twice_with_nested_backward_is_an_error_not_two_steps():
    layer = nn.Linear(4, 4)
    optimizer = steepest.SGD(layer.named_parameters(), lr=0.1)
    steepest.release_gradients(layer, optimizer)
    x = torch.randn(5, 4, requires_grad=True)
    hidden = checkpoint(layer, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="was stepped already and got another gradient"):
        checkpoint(layer, hidden, use_reentrant=True).sum().backward()


def test_sparse_gradients():
    model, twin = (nn.Embedding(6, 3, sparse=True) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    ours, theirs = (steepest.Lion(m.parameters(), lr=0.1) for m in (model, twin))
    steepest.release_gradients(model, ours, clip_value=10.0)
    for m, optimizer in ((model, ours), (twin, theirs)):
        m(torch.tensor([1, 1, 4])).sum().backward()
        optimizer.step()
    assert identical(model.weight, twin.weight)


# -- the loop around it


@for_each("rule", RULES)
def test_the_hooks_of_step_fire_once_and_a_closure_is_called_once(rule: Case):
    params, twins = rule.params(), rule.params()
    optimizer, twin = rule.make(params), rule.make(twins)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure() -> float:
        calls.append("closure")
        optimizer.zero_grad()
        backward(params, 0)
        return 2.5

    with steepest.release_gradients(holder(params), optimizer):
        assert optimizer.step(closure) == 2.5
        assert optimizer.step(closure=closure) == 2.5
    assert calls == ["pre", "closure", "post"] * 2
    for _ in range(2):
        set_gradients(twins, 0)  # depends on the parameters, so the second is another
        twin.step()
    assert agree(rule, values(params), values(twins))


def test_gradients_that_are_accumulated_step_once_with_their_sum():
    params, twins = make_params(), make_params()
    optimizer, twin = Case("adamw").make(params), Case("adamw").make(twins)
    with steepest.release_gradients(holder(params), optimizer) as released:
        for start in (0, 10):
            before = values(params)
            with released.accumulate():
                backward(params, start)
                # The last pass does not reach the first parameter: step() must.
                backward(params, start + 1)
            assert identical(values(params), before)
            backward(params, start + 2, {0})
            assert params[0].grad is not None
            assert are_freed(params[1:2])
            optimizer.step()
            assert params[0].grad is None
    for start in (0, 10):
        for step in range(start, start + 3):
            backward(twins, step, {0} if step == start + 2 else ())
        twin.step()
        twin.zero_grad()
    assert identical(params, twins)


def test_a_second_gradient_in_one_step_is_an_error_by_name():
    weight = nn.Linear(2, 1, bias=False)
    optimizer = steepest.SGD(weight.named_parameters(), lr=0.5)
    released = steepest.release_gradients(weight, optimizer)
    weight(torch.ones(2)).sum().backward()
    once = values(weight.parameters())
    with pytest.raises(RuntimeError, match=r"parameter 'weight' was stepped already.*optimizer\.step\(\)"):
        weight(torch.ones(2)).sum().backward()
    with released.accumulate(), pytest.raises(RuntimeError, match="stepped already"):
        weight(torch.ones(2)).sum().backward()
    with pytest.raises(RuntimeError, match="stepped already"):
        optimizer.step()
    assert identical(values(weight.parameters()), once)
    optimizer.zero_grad()
    optimizer.step()
    weight(torch.ones(2)).sum().backward()
    assert identical(values(weight.parameters()), [once[0] - 0.5])


def test_after_a_backward_that_failed_training_goes_on():
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("out of luck")

    early, late = nn.Linear(2, 2), nn.Linear(2, 2)
    model = nn.ModuleList([early, late])
    optimizer = steepest.AdamW(model.parameters(), lr=0.1)
    steepest.release_gradients(model, optimizer)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="out of luck"):
        late(Fails.apply(early(torch.ones(2)))).sum().backward()
    assert identical(early.weight, before["0.weight"])
    assert not identical(late.weight, before["1.weight"])
    optimizer.zero_grad()
    optimizer.step()
    late(early(torch.ones(2))).sum().backward()
    optimizer.step()
    assert {float(optimizer.state[p]["step"]) for p in early.parameters()} == {1.0}
    assert {float(optimizer.state[p]["step"]) for p in late.parameters()} == {2.0}


def test_parameters_that_come_later_are_stepped_and_then_released():
    params, twins = make_params(), make_params()
    params[1].requires_grad_(False)
    model = holder(params)
    optimizer, twin = (steepest.AdamW(some[:2], lr=0.1) for some in (params, twins))
    with steepest.release_gradients(model, optimizer):
        for step in range(4):
            if step == 1:
                params[1].requires_grad_(True)
            if step == 2:
                optimizer.add_param_group({"params": [params[2]], "lr": 0.5})
                twin.add_param_group({"params": [twins[2]], "lr": 0.5})
            absent = {index for index, came in ((1, 1), (2, 2)) if step < came}
            backward(params, step, absent)
            late = {index for index, came in ((1, 1), (2, 2)) if step == came}
            assert {i for i, p in enumerate(params) if not are_freed([p])} == late
            optimizer.step()
            for index, param in enumerate(twins):
                param.grad = None if index in absent else 0 * param.detach()
            backward(twins, step, absent)
            twin.step()
            twin.zero_grad()
    assert identical(params, twins)


# -- copies, checkpoints, the end of it


@pytest.mark.parametrize("rule", [rule for rule in RULES if not related(rule)], ids=by_id)
def test_copies_and_checkpoints_are_ordinary_and_interchange(rule: Case):
    params = rule.params()
    model = holder(params)
    optimizer = rule.make(params)
    released = steepest.release_gradients(model, optimizer)
    for step in range(2):
        backward(params, step)
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    twins = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    assert pickle.loads(pickle.dumps(optimizer)).state_dict().keys() == saved.keys()
    again = rule.make(list(twins.parameters()))
    again.load_state_dict(saved)
    ordinary = copy.deepcopy(optimizer)
    ordinary.step()
    backward(list(twins.parameters()), 2)
    assert all(param.grad is not None for param in twins.parameters()), "a copy's backward is ordinary"
    again.step()
    backward(params, 2)
    assert agree(rule, values(params), values(twins.parameters()))
    optimizer.step()
    released.remove()
    backward(params, 3)
    assert all(param.grad is not None for param in params)
    optimizer.step()
    assert not hasattr(optimizer, "_step_supports_amp_scaling")
    with steepest.release_gradients(model, optimizer):
        pass


def test_loading_into_a_released_optimizer_goes_on():
    params, twins = make_params(), make_params()
    optimizer, twin = Case("adamw").make(params), Case("adamw").make(twins)
    ordinary_run(twin, twins, range(2))
    with torch.no_grad():
        for param, other in zip(params, twins, strict=True):
            param.copy_(other)
    with steepest.release_gradients(holder(params), optimizer) as released:
        optimizer.load_state_dict(twin.state_dict())
        backward(params, 3)
        optimizer.step()
        released.remove()
        again = steepest.release_gradients(holder(params), optimizer)
        released.remove()  # a second time: it must not undo the other
        backward(params, 4)
        assert are_freed(params)
        optimizer.step()
        again.remove()
    ordinary_run(twin, twins, [3, 4])
    assert identical(params, twins)


def test_nothing_outlives_the_model():
    model = nn.Linear(2, 2)
    optimizer = steepest.Lion(model.parameters())
    steepest.release_gradients(model, optimizer)
    model(torch.ones(2)).sum().backward()
    gone = weakref.ref(model.weight)
    del model, optimizer
    gc.collect()
    assert gone() is None


@pytest.mark.gpu
@pytest.mark.parametrize("case", able(RULES), ids=by_id)
def test_on_a_device(case: Case):
    params, twins = case.params(device="cuda"), case.params(device="cuda")
    released_run(case.make(params, compile=False), params, range(4))
    ordinary_run(case.make(twins, compile=False), twins, range(4))
    torch.testing.assert_close(values(params), values(twins), rtol=1e-4, atol=1e-5)
