"""Released gradients: clipping, gradients that are not finite, and what is refused."""

from __future__ import annotations

import copy
import math
import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import steepest
from loops import for_each

from .cases import RULES, Case
from .released import are_freed, backward, holder
from .training import identical, make_params, snapshot, values

CLIP = 0.75


def test_clip_value_is_torch_s():
    params, twins = make_params(), make_params()
    optimizer, twin = Case("adamw").make(params), Case("adamw").make(twins)
    with steepest.release_gradients(holder(params), optimizer, clip_value=CLIP):
        for step in range(4):
            backward(params, step)
            optimizer.step()
            backward(twins, step)
            torch.nn.utils.clip_grad_value_(twins, CLIP)
            twin.step()
            twin.zero_grad()
    assert identical(params, twins)


def test_gradients_in_one_memory_are_clipped_each_for_itself():
    """Of a sum of two views autograd makes one gradient, in one memory, for both of them."""
    pull = torch.tensor([3.0, 0.0, 4.0, 0.0])
    first, second = (nn.Parameter(torch.zeros(2, 2)) for _ in range(2))

    def pulled() -> None:
        ((first.view(-1) + second.view(-1)) * pull).sum().backward()

    pulled()
    assert first.grad.data_ptr() == second.grad.data_ptr()
    first.grad = second.grad = None
    optimizer = steepest.SGD([first, second], lr=1.0)
    moved = torch.zeros(2, 2)
    with steepest.release_gradients(holder([first, second]), optimizer, clip_norm=CLIP) as released:
        for norm in (5.0, 5.0 * math.sqrt(2), 5.0 * math.sqrt(2)):
            pulled()
            optimizer.step()
            moved -= pull.view(2, 2) * CLIP / (norm + 1e-6)
            assert released.grad_norm == pytest.approx(5.0 * math.sqrt(2))
            torch.testing.assert_close([first.data, second.data], [moved, moved])


@pytest.mark.parametrize("clip", ["clip_value", "clip_norm"])
def test_a_gradient_that_is_not_the_optimizer_s_is_not_clipped(clip: str):
    pull = torch.tensor([3.0, 0.0, 4.0, 0.0])
    model = nn.ParameterList(nn.Parameter(torch.zeros(2, 2)) for _ in range(2))
    for index in range(2):
        optimizer = steepest.SGD([model[index]], lr=1.0)
        with steepest.release_gradients(model, optimizer, **{clip: 0.5}):
            ((model[0].view(-1) + model[1].view(-1)) * pull).sum().backward()
            optimizer.step()
        assert identical(model[1 - index].grad, pull.view(2, 2))
        model[1 - index].grad = None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip", ["clip_value", "clip_norm"])
def test_a_clipped_scalar_keeps_its_dtype(clip: str, dtype: torch.dtype):
    """A product of two tensors without dimensions has the wider dtype of the two."""
    model = holder([nn.Parameter(torch.zeros((), dtype=dtype))])
    optimizer = steepest.SGD(model.parameters(), lr=1.0, momentum=0.5)
    with steepest.release_gradients(model, optimizer, **{clip: 0.5}):
        (model[0] * 8).backward()
        optimizer.step()
    assert model[0].item() == pytest.approx(-0.5, abs=1e-6)
    assert optimizer.state[model[0]]["momentum_buffer"].dtype == dtype


def test_complex_gradients_are_clamped_part_by_part():
    params = make_params(torch.complex64, shapes=[(3,)])
    optimizer = steepest.SGD(params, lr=1.0)
    before = values(params)[0]
    with steepest.release_gradients(holder(params), optimizer, clip_value=1.0):
        (params[0] * torch.tensor([3 - 4j, 0.5 + 2j, -5j]).conj()).real.sum().backward()
    assert identical(params[0], before - torch.tensor([1 - 1j, 0.5 + 1j, -1j]))


def clipped_by_hand(twins: list[Any], last: float | None) -> float:
    """Scale the gradients as documented; their whole norm before it."""
    squares = [float(t.grad.double().square().sum()) for t in twins if t.grad is not None]
    for twin in twins:
        if twin.grad is not None:
            norm = math.sqrt(float(twin.grad.double().square().sum())) if last is None else last
            twin.grad.mul_(min(1.0, CLIP / (norm + 1e-6)))
    return math.sqrt(sum(squares))


def test_clip_norm_scales_by_the_last_step_s_norm_and_survives_a_checkpoint():
    params, twins = make_params(), make_params()
    make = Case("sgd", {"momentum": 0.9}).make
    optimizer, twin = make(params), make(twins)
    released = steepest.release_gradients(holder(params), optimizer, clip_norm=CLIP)
    assert released.grad_norm is None
    last = None
    for step in range(6):
        if step == 3:
            saved = copy.deepcopy(optimizer.state_dict())
            released.remove()
            params = [nn.Parameter(value) for value in values(params)]
            optimizer = make(params)
            optimizer.load_state_dict(saved)
            released = steepest.release_gradients(holder(params), optimizer, clip_norm=CLIP)
        backward(params, step, {1} if step == 2 else ())
        optimizer.step()
        backward(twins, step, {1} if step == 2 else ())
        last = clipped_by_hand(twins, last)
        assert released.grad_norm == pytest.approx(last, rel=1e-6)
        twin.step()
        twin.zero_grad()
    torch.testing.assert_close(params, twins, rtol=1e-6, atol=1e-7)


def test_a_norm_that_is_not_finite_is_not_kept():
    params = make_params()
    optimizer = steepest.SGD(params, lr=0.1, nonfinite="skip")
    with steepest.release_gradients(holder(params), optimizer, clip_norm=CLIP) as released:
        (params[0] * math.inf).sum().backward()
        optimizer.step()
        assert released.grad_norm is None
        backward(params, 0)
        optimizer.step()
        known = released.grad_norm
        assert known > 0
        (params[0] * math.nan).sum().backward()
        optimizer.step()
        assert released.grad_norm == known
    assert optimizer.skipped_steps == 2


@for_each("rule", RULES)
def test_skip_passes_over_the_parameters_with_a_bad_gradient_alone(rule: Case):
    params, twins = rule.params(), rule.params()
    optimizer = rule.make(params, nonfinite="skip")
    twin = rule.make(twins)
    with steepest.release_gradients(holder(params), optimizer):
        for step in range(3):
            bad = {0, 1} if step == 1 else ()
            for some in (params, twins):
                backward(some, step, bad)
            if bad:
                sum((params[i] * math.nan).sum() for i in bad).backward()
            assert are_freed(params)
            optimizer.step()
            twin.step()
            twin.zero_grad()
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if rule.rule.scope == "matrix" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(values(params), values(twins), **tolerance)
    assert optimizer.skipped_steps == 1
    steps = [float(optimizer.state[param].get("step", 0)) for param in params]
    assert steps in ([0.0, 0.0, 0.0], [2.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "lion", "nonfinite": "raise"}, "group 1: nonfinite='raise'"),
        ({"rule": "sgd_sai", "normalize": "max"}, "group 1: with normalize='max' a step of 'sgd_sai'"),
        ({"rule": "quad", "literal": True}, "group 1: with literal=True a step of 'quad'"),
    ],
)
def test_groups_whose_promise_cannot_be_held_are_refused(options: dict[str, Any], message: str):
    params = make_params(shapes=[(4, 3), (4, 3)])
    groups = [{"params": params[:1]}, {"params": params[1:], **options}]
    optimizer = steepest.Optimizer(groups, rule="lion")
    with pytest.raises(ValueError, match=message):
        steepest.release_gradients(holder(params), optimizer)
    allowed = {**options, "nonfinite": "skip", "normalize": "none", "literal": False}
    later = steepest.Optimizer([groups[0], {**groups[1], **allowed}], rule="lion")
    with steepest.release_gradients(holder(params), later):
        later.param_groups[1].update(options)
        before = snapshot(later, params)
        with pytest.raises(RuntimeError, match=message):
            backward(params, 0, {0})
        params[1].grad = None
        assert identical(snapshot(later, params), before)


@pytest.mark.parametrize("accumulated", [False, True], ids=["in backward", "in step"])
@pytest.mark.parametrize(
    "changed",
    [{"betas": (1.5, 0.9)}, {"weight_decay_method": "typo"}, {"rule": "adamw"}, {"rule": "none"}],
    ids=str,
)
def test_options_that_became_wrong_are_refused_before_anything_moves(
    changed: dict[str, Any], accumulated: bool
):
    """Also when the first gradients are another group's: the ordinary step looks at all groups too."""
    params, twins = make_params(), make_params()

    def make(some: list[Any]) -> steepest.Optimizer:
        return steepest.Lion([{"params": some[:1]}, {"params": some[1:]}], lr=0.1)

    optimizer, twin = make(params), make(twins)
    with steepest.release_gradients(holder(params), optimizer) as released:
        for some, each in ((params, optimizer), (twins, twin)):
            backward(some, 0)
            each.step()
            each.zero_grad()
            each.param_groups[0].update(changed)
        before = snapshot(optimizer, params)
        backward(twins, 1)
        with pytest.raises(ValueError, match=r"group 0|none") as ordinary:
            twin.step()
        if accumulated:
            with released.accumulate():
                backward(params, 1)
        with pytest.raises(ValueError, match=re.escape(str(ordinary.value))):
            optimizer.step() if accumulated else backward(params, 1)
        optimizer.zero_grad()
        assert identical(snapshot(optimizer, params), before)


def test_what_is_no_model_no_optimizer_and_no_clip():
    model = nn.Linear(2, 2)
    optimizer = steepest.Lion(model.named_parameters())
    with pytest.raises(TypeError, match="the model first, got a Lion"):
        steepest.release_gradients(optimizer, model)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got torch\.optim\.sgd\.SGD"):
        steepest.release_gradients(model, torch.optim.SGD(model.parameters()))  # type: ignore[arg-type]
    for bad in (0, -1.0, math.nan, math.inf, "1", True):
        for name in ("clip_value", "clip_norm"):
            with pytest.raises(ValueError, match=f"{name} must be None or a finite number > 0, got"):
                steepest.release_gradients(model, optimizer, **{name: bad})
    with pytest.raises(ValueError, match="choose one"):
        steepest.release_gradients(model, optimizer, clip_value=1.0, clip_norm=1.0)
    head = nn.Linear(2, 2)
    both = steepest.Lion([*model.named_parameters("model"), *head.named_parameters("head")])
    with pytest.raises(ValueError, match=r"parameter 'head\.weight' is the optimizer's but not the model's"):
        steepest.release_gradients(model, both)
    assert not optimizer._optimizer_step_pre_hooks
    model(torch.ones(2)).sum().backward()
    assert model.weight.grad is not None, "a refusal leaves no hook behind"


def test_twice_is_refused_by_name_also_for_another_optimizer():
    model = nn.Linear(2, 2)
    optimizer = steepest.Lion(model.named_parameters())
    other = steepest.Lion(model.named_parameters())
    released = steepest.release_gradients(model, optimizer)
    for one in (optimizer, other):
        with pytest.raises(ValueError, match="parameter 'weight' is released already"):
            steepest.release_gradients(model, one)
    released.remove()
    steepest.release_gradients(model, other).remove()


def test_replicas_are_refused(tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    model = nn.Linear(2, 2)
    optimizer = steepest.Lion(model.parameters())
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        for wrapped in (ddp := nn.parallel.DistributedDataParallel(model), nn.ModuleList([ddp])):
            with pytest.raises(ValueError, match="is a DistributedDataParallel"):
                steepest.release_gradients(wrapped, optimizer)
        del ddp, wrapped
        # The module inside it cannot be told from any other; that there are other processes can.
        alone = nn.Linear(2, 2)
        steepest.release_gradients(alone, steepest.Lion(alone.parameters()))
        alone(torch.ones(2)).sum().backward()
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        twin = nn.Linear(2, 2)
        kept = steepest.Lion(twin.parameters())  # the garbage collector may end a release without it
        steepest.release_gradients(twin, kept)
        before = values(twin.parameters())
        with pytest.raises(RuntimeError, match="one of 2 processes"):
            twin(torch.ones(2)).sum().backward()
        assert identical(values(twin.parameters()), before)
    finally:
        torch.distributed.destroy_process_group()


def test_grad_scaler_is_refused_in_words():
    model = nn.Linear(2, 2)
    optimizer = steepest.Lion(model.parameters())
    scaler = torch.amp.GradScaler("cpu")
    with steepest.release_gradients(model, optimizer):
        scaler.scale(model(torch.ones(2)).sum()).backward()
        with pytest.raises(RuntimeError, match="GradScaler cannot be used with released gradients"):
            scaler.step(optimizer)


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_step_is_skipped_once_whichever_gradient_is_not_finite(bad: int):
    params = make_params(shapes=[(3,)] * 3)
    optimizer = Case("sgd").make(params, nonfinite="skip")
    with steepest.release_gradients(holder(params), optimizer):
        sum(
            param.sum() * (math.nan if index == bad else 1.0) for index, param in enumerate(params)
        ).backward()
        optimizer.step()
    assert optimizer.skipped_steps == 1


def test_an_optimizer_of_frozen_parameters_is_not_released_twice():
    """Or the parameters would be stepped twice once they are unfrozen."""
    params = make_params()
    for param in params:
        param.requires_grad_(False)
    optimizer = Case("adamw").make(params)
    with (
        steepest.release_gradients(holder(params), optimizer),
        pytest.raises(ValueError, match="released already"),
    ):
        steepest.release_gradients(holder(params), optimizer)


def test_a_parameter_that_is_added_between_backward_and_step_is_clipped_too():
    params, late = make_params(), nn.Parameter(torch.zeros(3))
    optimizer = steepest.SGD(params, lr=1.0)
    with steepest.release_gradients(holder([*params, late]), optimizer, clip_value=0.1):
        backward(params, 0)
        optimizer.add_param_group({"params": [late]})
        late.grad = torch.full((3,), 98.0)
        optimizer.step()
    torch.testing.assert_close(late.detach(), torch.full((3,), -0.1))


def test_groups_that_are_reordered_during_backward_step_each_parameter_once():
    first, second = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = steepest.SGD([{"params": [first]}, {"params": [second]}], lr=1.0)
    with steepest.release_gradients(holder([first, second]), optimizer):
        (2 * first).sum().backward()
        optimizer.param_groups.reverse()
        (3 * second).sum().backward()
        optimizer.step()
    assert first.tolist() == [-1, -1]
    assert second.tolist() == [-2, -2]


def test_no_norm_is_kept_where_none_was_finite():
    params = make_params()
    optimizer = Case("sgd").make(params, nonfinite="skip")
    with steepest.release_gradients(holder(params), optimizer, clip_norm=1.0) as released:
        for param in params:
            param.grad = torch.full_like(param, math.nan)
        optimizer.step()
        assert released.grad_norm is None
    assert "last_grad_norm" not in optimizer.param_groups[0]


# -- clipping that comes too late


def clip_by_norm(params: Any) -> Any:
    return torch.nn.utils.clip_grad_norm_(params, CLIP)


def clip_by_value(params: Any) -> Any:
    return torch.nn.utils.clip_grad_value_(params, CLIP)


def clip_adaptively(params: Any) -> Any:
    """By hand, as in loops that have a formula of their own."""
    for param in params:
        if param.grad is not None and param.grad.norm() > 0.01 * param.detach().norm():
            param.grad.mul_(0.01 * param.detach().norm() / param.grad.norm())


READERS = {
    "norm": clip_by_norm,
    "norm, foreach": lambda params: torch.nn.utils.clip_grad_norm_(params, CLIP, foreach=True),
    "norm, generator": lambda params: clip_by_norm(param for param in params),
    "value": clip_by_value,
    "value, foreach": lambda params: torch.nn.utils.clip_grad_value_(params, CLIP, foreach=True),
    "logged": lambda params: torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None]),
    "by hand": clip_adaptively,
}


@pytest.mark.parametrize("reader", READERS)
def test_whatever_clips_after_backward_is_warned_of_once_and_changes_nothing(reader: str):
    params, twins = make_params(), make_params()
    optimizer, twin = Case("lion").make(params), Case("lion").make(twins)
    released = steepest.release_gradients(holder(params), optimizer)
    steepest.release_gradients(holder(twins), twin)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            for some in (params, twins):
                backward(some, step)
            if step == 0 or "value" not in reader:  # torch's clip_grad_value_ fails without any gradient
                READERS[reader](params)
            for each in (optimizer, twin):
                each.step()
            assert all(param.grad is None for param in params)
    (warning,) = [each for each in caught if "gradient" in str(each.message)]
    assert re.search(r"gradient of parameter \d of group 0 .* was read after backward", str(warning.message))
    assert "pass clip_norm=" in str(warning.message)
    assert "max_grad_norm=0" in str(warning.message)
    assert identical(params, twins)
    released.remove()


@pytest.mark.parametrize("clip", [{"clip_norm": 1.0}, {"clip_value": 1.0}], ids=str)
def test_a_release_that_clips_says_nothing(clip: dict[str, float]):
    params = make_params()
    optimizer = Case("lion").make(params)
    with warnings.catch_warnings(), steepest.release_gradients(holder(params), optimizer, **clip):
        warnings.simplefilter("error")
        for step in range(2):
            backward(params, step)
            assert all(param.grad is None for param in params)
            clip_by_norm(params)
            optimizer.step()


def test_placeholders_disturb_nothing_else():
    """Other parameters' gradients in the same list, copies, zero_grad, a second pass, and removal."""
    params, (other,) = make_params(), make_params(shapes=[(3, 2)])
    optimizer = Case("lion").make(params)
    model = holder([*params, other])
    released = steepest.release_gradients(model, optimizer)
    backward(params, 0)
    assert "FreedGradient" in repr(params[0].grad)
    assert all(param.grad is None for param in [*copy.deepcopy(model).parameters()][: len(params)])
    other.grad = torch.full_like(other, 3.0)
    with pytest.warns(UserWarning, match="was read after backward"):
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert float(norm) == pytest.approx(3 * math.sqrt(6))
    assert torch.allclose(other.grad, torch.full_like(other, 1 / math.sqrt(6)))
    torch._foreach_mul_([params[0].grad, other.grad], [7.0, 2.0])
    assert torch.allclose(other.grad, torch.full_like(other, 2 / math.sqrt(6)))
    with pytest.raises(RuntimeError, match="was stepped already and got another gradient"):
        backward(params, 1)
    optimizer.zero_grad()
    optimizer.step()
    released.remove()
    released = steepest.release_gradients(model, optimizer)
    backward(params, 2)
    released.remove()
    assert all(param.grad is None for param in params)
