"""Telemetry's numbers, by hand in float64; when it is off nothing of it is there."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import steepest
from contract.cases import Case
from contract.training import set_gradients
from steepest import DictCallback, Measurements, TensorBoardCallback, telemetry

from .training import backward, make_model, train


def by_hand(before: torch.Tensor, after: torch.Tensor, gradient: torch.Tensor) -> Measurements:
    """The measurements of real tensors, from their definitions."""
    p, q, g = ([float(x) for x in each.detach().double().flatten()] for each in (before, after, gradient))
    change = [b - a for a, b in zip(p, q, strict=True)]
    length = [math.sqrt(sum(x * x for x in each)) for each in (change, p, g)]
    dot = -sum(d * x for d, x in zip(change, g, strict=True))
    flipped = sum(a * b < 0 for a, b in zip(p, q, strict=True))
    return Measurements(
        length[0] / math.sqrt(len(p)), length[0] / length[1], dot / (length[0] * length[2]), flipped / len(p)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["sgd", "adamw", "lion", "muon"])
def test_numbers_are_those_of_float64(name: str, dtype: torch.dtype):
    case = Case(name)
    params = case.params(dtype)
    optimizer = case.make([(f"p{index}", param) for index, param in enumerate(params)], lr=0.7)
    found: list[tuple[int, dict[str, Measurements]]] = []
    with telemetry(optimizer, lambda *args: found.append(args)):
        for step in range(3):
            before = [param.detach().clone() for param in params]
            set_gradients(params, step)
            optimizer.step()
            for index, (old, param) in enumerate(zip(before, params, strict=True)):
                assert found[-1][0] == step + 1
                assert found[-1][1][f"p{index}"] == pytest.approx(by_hand(old, param, param.grad), rel=1e-12)
    assert any(0 < numbers.flipped < 1 for _, measured in found for numbers in measured.values())


def test_the_cosine_is_one_for_gradient_descent_and_that_of_the_sign_for_lion():
    weight = nn.Parameter(torch.zeros(2))
    for cls, expected in ((steepest.SGD, 1.0), (steepest.Lion, 7 / (5 * math.sqrt(2)))):
        optimizer = cls([weight], lr=0.1)
        weight.grad = torch.tensor([3.0, -4.0])
        with telemetry(optimizer, history := DictCallback()):
            optimizer.step()
        (numbers,) = history.values()
        assert numbers["cosine"] == pytest.approx([expected])
    optimizer = steepest.SGD([weight], lr=0.1, maximize=True)
    with telemetry(optimizer, history := DictCallback()):
        optimizer.step()
    assert history["parameter 0 of group 0 (shape (2,))"]["cosine"] == pytest.approx([-1.0])


def test_gradients_of_any_size_and_tensors_that_do_not_move():
    weight = nn.Parameter(torch.tensor([1.0, -1.0]))
    still, zero = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2))
    unused = nn.Parameter(torch.ones(2))
    named = {"weight": weight, "still": still, "zero": zero, "unused": unused}
    optimizer = steepest.Lion(named.items(), lr=2.0)
    weight.grad, still.grad, zero.grad = torch.tensor([1e-30, 1e-30]), torch.zeros(2), torch.ones(2)
    with telemetry(optimizer, history := DictCallback()):
        optimizer.step()
    first = {name: {key: value for key, (value,) in numbers.items()} for name, numbers in history.items()}
    assert first == {
        "weight": pytest.approx(
            {"update_rms": 2.0, "relative_change": 2.0, "cosine": 1.0, "flipped": 0.5}, rel=1e-6
        ),
        "still": {"update_rms": 0.0, "relative_change": 0.0, "cosine": 0.0, "flipped": 0.0},
        "zero": {
            "update_rms": 2.0,
            "relative_change": math.inf,
            "cosine": pytest.approx(1.0),
            "flipped": 0.0,
        },
    }


def test_every_so_many_steps_until_removed_and_closures():
    model = make_model()
    optimizer = steepest.AdamW(model.named_parameters())
    handle = telemetry(optimizer, history := DictCallback(), every=3)
    train(model, optimizer, 4)

    def closure():
        backward(model, 9)
        return 0.0

    for _ in range(2):
        optimizer.zero_grad()
        optimizer.step(closure)
    assert history.steps == [3, 6]
    assert set(history) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert all(len(values) == 2 for numbers in history.values() for values in numbers.values())
    handle.remove()
    handle.remove()
    train(model, optimizer, 3)
    assert history.steps == [3, 6]


def test_off_means_not_there():
    optimizer = steepest.Lion(make_model().parameters())
    handle = telemetry(optimizer, DictCallback())
    assert len(optimizer._optimizer_step_pre_hooks) == len(optimizer._optimizer_step_post_hooks) == 1
    handle.remove()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_one_transfer_for_all_tensors(monkeypatch: pytest.MonkeyPatch):
    model = make_model()
    optimizer = steepest.Lion(model.named_parameters())
    reads = []
    for name in ("tolist", "item", "__float__", "__bool__", "__int__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda self, name=name, original=original: (reads.append(name), original(self))[1],
        )
    backward(model, 0)
    with telemetry(optimizer, lambda step, measured: reads.append(len(measured))):
        optimizer.step()
    assert reads == ["tolist", 4]


def test_it_measures_masters_complex_numbers_and_views_of_ternary_layers_not_at_all():
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = steepest.Lion({"w": weight}.items(), lr=2.0**-14, master="split16")
    weight.grad = torch.ones_like(weight)
    with telemetry(optimizer, history := DictCallback()):
        optimizer.step()
    assert torch.equal(weight, torch.ones_like(weight))
    assert history["w"]["update_rms"] == pytest.approx([2.0**-14], rel=1e-3)
    weight = nn.Parameter(torch.tensor([1 + 1j]))
    optimizer = steepest.SGD({"w": weight}.items(), lr=1.0)
    weight.grad = torch.tensor([2 + 0j])
    with telemetry(optimizer, history := DictCallback()):
        optimizer.step()
    assert {key: value for key, (value,) in history["w"].items()} == pytest.approx(
        {"update_rms": math.sqrt(2), "relative_change": math.sqrt(2), "cosine": 1.0, "flipped": 0.5}
    )
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    steepest.ternary.ternarize(model)
    optimizer = steepest.build(model, "lion", ternary={"threshold": 24})
    model(torch.randn(4, 16)).sum().backward()
    with telemetry(optimizer, history := DictCallback()):
        optimizer.step()
    assert history
    assert not any(name.endswith("votes") for name in history)


def test_dict_callback_keeps_lists_of_equal_length():
    history, some = DictCallback(), Measurements(0.5, 0.25, 1.0, 0.0)
    history(1, {"a": some})
    history(4, {"a": some, "b": some})
    history(5, {"b": some})
    assert history.steps == [1, 4, 5]
    assert history["a"]["update_rms"] == pytest.approx([0.5, 0.5, math.nan], nan_ok=True)
    assert history["b"]["cosine"] == pytest.approx([math.nan, 1.0, 1.0], nan_ok=True)


def test_tensorboard_callback_writes_scalars():
    written = []

    class Writer:
        def add_scalar(self, tag: str, value: float, step: int) -> None:
            written.append((tag, value, step))

    model = make_model()
    optimizer = steepest.SGD(model.named_parameters(), lr=0.1)
    with telemetry(optimizer, TensorBoardCallback(Writer(), ["cosine"])):
        train(model, optimizer, 2)
    assert [(tag, step) for tag, _, step in written] == [
        (f"cosine/{name}", step) for step in (1, 2) for name in ("0.weight", "0.bias", "2.weight", "2.bias")
    ]
    assert [value for _, value, _ in written] == pytest.approx([1.0] * 8, rel=1e-5)
    written.clear()
    TensorBoardCallback(Writer())(7, {"a": Measurements(1.0, 2.0, 0.5, 0.25)})
    assert written == [
        ("update_rms/a", 1.0, 7),
        ("relative_change/a", 2.0, 7),
        ("cosine/a", 0.5, 7),
        ("flipped/a", 0.25, 7),
    ]


def test_bad_arguments():
    model = make_model()
    optimizer = steepest.Lion(model.parameters())
    with pytest.raises(ValueError, match="every must be an integer ≥ 1, got 0"):
        telemetry(optimizer, DictCallback(), every=0)
    with pytest.raises(TypeError, match="takes an optimizer of steepest, got SGD"):
        telemetry(torch.optim.SGD(model.parameters()), DictCallback())
    with pytest.raises(ValueError, match="measures update_rms, relative_change, cosine, flipped, not 'norm'"):
        TensorBoardCallback(None, ["norm"])
    with (
        steepest.release_gradients(model, optimizer),
        pytest.raises(ValueError, match="gradients are released"),
    ):
        telemetry(optimizer, DictCallback())


def test_a_step_within_a_step_is_counted_once():
    class Own(steepest.Lion):
        def step(self, closure=None):
            return super().step(closure)

    model = make_model()
    steepest.Lion(model.parameters())  # so that torch's hooks surround the step of the base class, too
    optimizer = Own(model.named_parameters(), nonfinite="raise")
    with telemetry(optimizer, history := DictCallback()):
        train(model, optimizer, 2)
        model[0].weight.grad[0, 0] = torch.nan
        with pytest.raises(FloatingPointError):
            optimizer.step()
        train(model, optimizer, 1)
    assert history.steps == [1, 2, 3]


def test_tensors_of_one_name_in_several_groups_are_told_apart():
    one, two, three = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = steepest.SGD(
        [{"params": [("w", one)]}, {"params": [("v", three)]}, {"params": [("w", two)]}], lr=1.0
    )
    one.grad, two.grad, three.grad = torch.ones(2), torch.full((2,), 3.0), torch.ones(2)
    with telemetry(optimizer, history := DictCallback()):
        optimizer.step()
    rms = {name: values["update_rms"][0] for name, values in history.items()}
    assert rms == pytest.approx({"w of group 0": 1.0, "v": 1.0, "w of group 2": 3.0})
