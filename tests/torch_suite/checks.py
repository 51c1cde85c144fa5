"""What torch's test_optim.py asks of every optimizer, as functions of an optimizer's class and options.

Each takes (make, case): ``make(params, **more)`` makes the optimizer with the options of one input.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.lr_scheduler import StepLR
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from contract.cases import Case
from contract.training import identical, set_gradients, train, values

from .infos import SCHEDULERS

__all__ = ["CHECKS"]

Make = Callable[..., Any]
CHECKS: dict[str, Callable[[Make, Case], None]] = {}


def check(function: Callable[[Make, Case], None]) -> Callable[[Make, Case], None]:
    """Add a check to the table."""
    CHECKS[function.__name__] = function
    return function


# -- does it optimize


def _linear(case: Case, contiguous: bool) -> tuple[list[Parameter], Callable[[], Tensor]]:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(10, 5, 2, generator=generator)
    weight = Parameter(wide[..., 0].contiguous() if contiguous else wide[..., 0])
    bias = Parameter(torch.randn(case.shape((10,)), generator=generator))
    given = torch.randn(5, generator=generator)

    def loss() -> Tensor:
        return (weight.mv(given) + bias.reshape(10)).pow(2).sum()

    return [weight, bias], loss


def _gently(optimizer: Any) -> Any:
    """The optimizer with a learning rate at which no step jumps over the valley."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] if isinstance(group["lr"], Tensor) else min(group["lr"], 1e-3)
    return optimizer


def _descends(optimizer: Any, loss: Callable[[], Tensor], schedulers: list[Any]) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        now = loss()
        now.backward()
        return now

    first = loss().item()
    for _ in range(8):
        now = optimizer.step(closure)
        for scheduler in schedulers:
            scheduler.step(now) if "Plateau" in type(scheduler).__name__ else scheduler.step()
    last, up = loss().item(), optimizer.param_groups[0]["maximize"]
    assert not last <= first if up else last < first  # upwards it may overflow


@check
def the_loss_of_a_linear_layer_goes_the_right_way(make: Make, case: Case) -> None:
    for contiguous in (True, False):
        params, loss = _linear(case, contiguous)
        _descends(_gently(make(params)), loss, [])


@check
def it_does_under_schedulers(make: Make, case: Case) -> None:
    for wanted in SCHEDULERS:
        params, loss = _linear(case, True)
        optimizer = _gently(make(params))
        _descends(optimizer, loss, [each(optimizer) for each in wanted])


@check
def it_does_with_two_groups_under_a_scheduler(make: Make, case: Case) -> None:
    (weight, bias), loss = _linear(case, True)
    optimizer = _gently(make([{"params": [weight]}, {"params": [bias], "lr": 5e-4}]))
    _descends(optimizer, loss, [StepLR(optimizer, step_size=5)])


def _rosenbrock(xy: Tensor) -> Tensor:
    x, y = xy.flatten()
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


@check
def sparse_gradients_descend_rosenbrock_as_dense_ones_do(make: Make, case: Case) -> None:
    """Only x or only y has a gradient, in two parts that add up."""
    param, twin = Parameter(torch.tensor([1.5, 1.5])), Parameter(torch.tensor([1.5, 1.5]))
    # Small enough for the valley's walls.
    optimizer, other = make([param], lr=1e-5), make([twin], lr=1e-5)
    first = _rosenbrock(param).item()
    for step in range(20):
        for some in (param, twin):
            some.grad = None
            _rosenbrock(some).backward()
            at = step % 2
            parts = torch.stack([some.grad[at] / 4, some.grad[at] - some.grad[at] / 4])
            sparse = torch.sparse_coo_tensor(torch.tensor([[at, at]]), parts, (2,))
            some.grad = sparse if some is param else sparse.to_dense()
        optimizer.step()
        other.step()
        assert torch.equal(param.detach(), twin.detach())
    last = _rosenbrock(param).item()
    assert not last <= first if optimizer.param_groups[0]["maximize"] else last < first


@check
def complex_parameters_step_as_pairs(make: Make, case: Case) -> None:
    (param,) = case.params(torch.complex64, shapes=[(4, 3)])
    pair = Parameter(torch.view_as_real(param.detach()).clone())
    optimizer, twin = make([param]), make([pair])
    for step in range(3):
        set_gradients([param], step)
        pair.grad = torch.view_as_real(param.grad).clone()
        optimizer.step()
        twin.step()
    assert identical(torch.view_as_real(param.detach()).clone(), pair.detach())


# -- what is no gradient, or none of the optimizer's business


@check
def a_step_without_gradients_changes_nothing(make: Make, case: Case) -> None:
    params = case.params()
    optimizer, before = make(params), values(params)
    optimizer.step()
    assert identical(params, before)
    assert not optimizer.state


@check
def zero_gradients_move_nothing(make: Make, case: Case) -> None:
    params = case.params()
    optimizer = make(params)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0
    before = values(params)
    for _ in range(2):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    # Hyperball renews the norm, in which it rounds.
    torch.testing.assert_close([p.detach() for p in params], before, rtol=1e-6, atol=0)


@check
def empty_parameters_are_taken(make: Make, case: Case) -> None:
    empty, full = Parameter(torch.empty(case.shape((0,)))), case.params()[0]
    optimizer = make([empty, full])
    train(optimizer, [empty, full], 2)
    assert full.isfinite().all()


@check
def a_group_whose_lr_is_0_rests(make: Make, case: Case) -> None:
    moved, resting = case.params(shapes=[(4, 3), (4, 3)])
    optimizer = make([{"params": [moved]}, {"params": [resting], "lr": 0.0}])
    before = values([moved, resting])
    after = train(optimizer, [moved, resting], 2)
    assert not torch.equal(after[0], before[0])
    torch.testing.assert_close(after[1], before[1], rtol=1e-6, atol=0)


# -- numbers


@check
def a_tensor_lr_is_its_float(make: Make, case: Case) -> None:
    runs = []
    for lr in (0.25, torch.tensor(0.25), torch.tensor([0.25])):
        params = case.params()
        runs.append(train(make(params, lr=lr), params, 3))
    for other in runs[1:]:
        torch.testing.assert_close(other, runs[0], rtol=1e-6, atol=1e-7)


@check
def the_default_dtype_does_not_matter(make: Make, case: Case) -> None:
    def run() -> tuple[list[Tensor], list[Any]]:
        params = case.params()
        optimizer = make(params)
        return train(optimizer, params, 2), [dict(optimizer.state.get(p, {})) for p in params]

    expected = run()
    torch.set_default_dtype(torch.float64)
    try:
        found = run()
    finally:
        torch.set_default_dtype(torch.float32)
    assert identical(found, expected)


@check
def dtypes_are_mixed_as_if_apart(make: Make, case: Case) -> None:
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    together = [case.params(dtype)[0] for dtype in dtypes]
    optimizer = make(together)
    train(optimizer, together, 2)
    assert all(param.isfinite().all() for param in together)
    assert [param.dtype for param in together] == list(dtypes)


# -- state


@check
def every_parameter_has_state(make: Make, case: Case) -> None:
    params = case.params()
    optimizer = make(params)
    train(optimizer, params, 1)
    if not optimizer.state_bytes():
        raise ValueError("no state: it takes 0 bytes")
    assert all(optimizer.state[param] for param in params)


def _through_a_file(tree: Any) -> Any:
    file = io.BytesIO()
    torch.save(tree, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@check
def a_resumed_run_is_the_same(make: Make, case: Case) -> None:
    for named, renamed in ((False, False), (True, True), (False, True), (True, False)):
        params, others = case.params(), case.params()

        def given(some: list[Parameter], names: bool) -> Any:
            return [(f"p{i}", p) for i, p in enumerate(some)] if names else some

        optimizer, other = make(given(params, named)), make(given(others, renamed))
        train(optimizer, params, 2)
        with torch.no_grad():
            for one, two in zip(others, params, strict=True):
                one.copy_(two)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert identical(other.state_dict()["state"], optimizer.state_dict()["state"])
        for some, who in ((params, optimizer), (others, other)):
            set_gradients(some, 2)
            who.step()
        if named == renamed:  # names key the noise
            assert identical(params, others)


@check
def it_saves_and_loads_with_weights_only(make: Make, case: Case) -> None:
    params = case.params()
    optimizer = make(params)
    train(optimizer, params, 2)
    saved = optimizer.state_dict()
    other = make(case.params())
    other.load_state_dict(_through_a_file(saved))
    assert identical(other.state_dict(), saved)


@check
def a_step_count_may_be_a_number(make: Make, case: Case) -> None:
    params = case.params()
    optimizer = make(params)
    train(optimizer, params, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        if "step" in state:
            state["step"] = state["step"].item()
    optimizer.load_state_dict(saved)
    train(optimizer, params, 1)
    assert all(state.get("step", 3) == 3 for state in optimizer.state.values())


@check
def a_state_dict_without_newer_options_loads(make: Make, case: Case) -> None:
    params = case.params()
    optimizer = make(params)
    train(optimizer, params, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        for name in ("maximize", "capturable", "nonfinite", "agree", "master", "state_device"):
            group.pop(name)
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    assert identical(optimizer.state_dict(), before)


@check
def deepcopy_copies_all_public_attributes(make: Make, case: Case) -> None:
    params = case.params()
    optimizer = make(params)
    train(optimizer, params, 1)

    def public(some: Any) -> set[str]:
        return {name for name in some.__dict__ if not name.startswith("_")}

    assert public(copy.deepcopy(optimizer)) == public(optimizer)


@check
def it_can_be_printed(make: Make, case: Case) -> None:
    assert "Parameter Group 0" in repr(make(case.params()))


# -- hooks


@check
def step_hooks_run_in_torch_s_order(make: Make, case: Case) -> None:
    params, seen = case.params(), []
    optimizer = make(params)

    def note(what: str) -> Callable[..., None]:
        return lambda opt, args, kwargs: seen.append(what)

    handles = [
        register_optimizer_step_pre_hook(note("all before")),
        register_optimizer_step_post_hook(note("all after")),
        optimizer.register_step_pre_hook(note("before")),
        optimizer.register_step_post_hook(note("after")),
    ]
    try:
        train(optimizer, params, 1)
    finally:
        for handle in handles:
            handle.remove()
    train(optimizer, params, 1)
    assert seen == ["all before", "before", "after", "all after"]


@check
def state_dict_hooks_run(make: Make, case: Case) -> None:
    params, seen = case.params(), []
    optimizer = make(params)
    train(optimizer, params, 1)
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append("saving"))
    optimizer.register_state_dict_post_hook(lambda opt, saved: {**saved, "extra": 1})
    saved = optimizer.state_dict()
    assert (seen, saved.pop("extra")) == (["saving"], 1)
    other = make(case.params())

    def replace(opt: Any, loaded: dict[str, Any]) -> dict[str, Any]:
        changed = copy.deepcopy(loaded)
        changed["param_groups"][0]["lr"] = 0.002
        return changed

    other.register_load_state_dict_pre_hook(replace)
    other.register_load_state_dict_post_hook(lambda opt: seen.append("loaded"))
    other.load_state_dict(saved)
    assert other.param_groups[0]["lr"] == 0.002
    assert saved["param_groups"][0]["lr"] != 0.002
    assert seen[-1] == "loaded"


@check
def a_closure_is_called_once_with_gradients(make: Make, case: Case) -> None:
    params, calls = case.params(), []
    optimizer = make(params)

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        set_gradients(params, len(calls))
        return 3.5

    assert optimizer.step(closure) == 3.5
    assert calls == [True]


@check
def a_scaled_step_is_the_step(make: Make, case: Case) -> None:
    params, twins = case.params(), case.params()
    optimizer, twin = make(params), make(twins)
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    scaler.scale(torch.zeros(()))
    for step in range(2):
        set_gradients(twins, step)
        set_gradients(params, step)
        for param in params:
            param.grad *= 128
        scaler.step(optimizer)
        scaler.update()
        twin.step()
    assert identical(params, twins)
