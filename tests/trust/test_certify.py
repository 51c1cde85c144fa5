"""certify: identical where it is, and where it is not, what differs first."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import steepest
from steepest.trust import Difference, certify_function
from steepest.trust.verdict import compare

from . import trainings
from .trainings import BROKEN, batch, linear, square


@pytest.mark.parametrize("via", ["torch.save", "dcp", "dcp_flat"])
@pytest.mark.parametrize("stop_after", [0, 3])
@pytest.mark.parametrize(
    ("model", "optimizer"),
    [
        (trainings.half, trainings.lion),
        (trainings.batch_norm, trainings.scheduled),
        (trainings.dropout, trainings.scheduled),
    ],
    ids=["bfloat16", "batch_norm", "dropout"],
)
def test_ours_resume_identically(model: Any, optimizer: Any, stop_after: int, via: str):
    certificate = steepest.certify(
        model, optimizer, batch, square, steps=6, stop_after=stop_after, via=via, process="same"
    )
    assert certificate.identical, str(certificate)
    assert (certificate.deterministic, certificate.first, certificate.causes) == (True, None, ())
    assert (certificate.steps, certificate.stop_after, certificate.via) == (6, stop_after, via)


def test_in_a_new_process_torchs_adamw_is_identical_too():
    """The batches of an iterator go with it."""
    batches = map(batch, range(1000))
    certificate = steepest.certify(trainings.half, trainings.torch_adamw, batches, square)
    assert certificate.identical, str(certificate)
    assert certificate.process == "new"
    # 4 parameters; step, exp_avg and exp_avg_sq of each; lr, two betas and the other options.
    assert certificate.compared >= 4 + 12 + 3
    assert str(certificate).startswith(
        "identical: 5 steps, save (torch.save), new process, load, 5 steps = 10"
    )


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_resume_is_caught_with_what_differs_first(how: str):
    model, optimizer, name, step, cause = BROKEN[how]
    certificate = steepest.certify(model, optimizer, batch, square)
    assert certificate.process == "same", "lambdas cannot be imported"
    assert not certificate.identical
    assert certificate.deterministic
    assert (certificate.first.name, certificate.first.step) == (name, step)
    assert [each.step for each in certificate.differences] == sorted(e.step for e in certificate.differences)
    assert any(cause in each for each in certificate.causes), certificate.causes
    assert f"from step {step} on" in str(certificate)
    assert f"\n  {certificate.first}" in str(certificate)


def test_the_amount_is_that_of_the_first_step_that_differs():
    """In closed form: one parameter, gradient 1, momentum of 0.9; without it the seventh step is shorter."""

    def model() -> torch.nn.Module:
        made = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
        torch.nn.init.ones_(made.weight)
        return made

    def optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
        return trainings.DropsState(model.parameters())

    one = torch.ones(1, 1, dtype=torch.float64)
    certificate = steepest.certify(model, optimizer, lambda i: one, lambda net, x: net(x).sum(), stop_after=1)
    differences = {each.name: each for each in certificate.differences}
    assert differences["state momentum of weight"].mismatch == "missing"
    assert differences["state momentum of weight"].step == 1
    moved = differences["parameter weight"]
    assert (moved.step, moved.differing, moved.elements) == (2, 1, 1)
    assert moved.largest == pytest.approx(0.01 * 0.9, rel=1e-6)  # the momentum is in float32


def test_a_cast_names_both_dtypes():
    model, optimizer, *_ = BROKEN["casts"]
    first = steepest.certify(model, optimizer, batch, square).first
    assert first.mismatch == "torch.bfloat16 instead of torch.float32"
    assert first.elements == 24
    assert 0 < first.differing <= 24
    assert 0 < first.largest < 1


@pytest.mark.parametrize("via", ["dcp", "dcp_flat"])
def test_before_the_first_step_torchs_adamw_counts_the_step_of_distributed_checkpoint(via: str):
    certificate = steepest.certify(
        linear, trainings.torch_adamw, batch, square, via=via, steps=2, stop_after=0, process="same"
    )
    assert certificate.first == Difference(1, "parameter 0.weight", None, *_numbers(certificate.first))
    steps = [each for each in certificate.differences if each.name == "state step of 0.weight"]
    assert steps[0].largest == 1.0
    assert "save after the first step" in certificate.causes[0]


def _numbers(difference: Difference) -> tuple[Any, ...]:
    return difference.largest, difference.differing, difference.elements


class Mixed(torch.nn.Module):
    """A layer after what it draws at random and does not save."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(6, 1)
        self.register_buffer("mix", torch.randn(6, 6), persistent=False)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.layer(batch @ self.mix)


def test_what_the_checkpoint_lacks_is_not_right_by_chance():
    """The process that resumes has another seed."""
    certificate = steepest.certify(Mixed, trainings.lion, batch, square, steps=2, process="same")
    assert (certificate.first.name, certificate.first.step) == ("buffer mix", 1)
    assert "persistent=False" in certificate.causes[0]


def test_a_training_that_no_seed_repeats_is_named_so():
    certificate = steepest.certify(linear, trainings.lion, batch, trainings.noisy_loss, process="same")
    assert not certificate.identical
    assert not certificate.deterministic
    assert certificate.first.step == 1
    assert str(certificate).startswith("NOT DETERMINISTIC")
    assert any("use_deterministic_algorithms" in each for each in certificate.causes)


def test_so_is_one_that_differs_only_after_the_checkpoint():
    calls: list[int] = []

    def sometimes(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return square(model, batch) * (len(calls) if len(calls) % 10 == 8 else 1)

    certificate = steepest.certify(linear, trainings.lion, batch, sometimes)
    assert (certificate.deterministic, certificate.identical) == (False, False)


def _own_save(path: Any, model: torch.nn.Module, made: Any) -> None:
    optimizer = made[0] if isinstance(made, tuple) else made
    torch.save([model.state_dict(), optimizer.state_dict()], path)


def _own_load(path: Any, model: torch.nn.Module, made: Any) -> None:
    optimizer = made[0] if isinstance(made, tuple) else made
    of_model, of_optimizer = torch.load(path, weights_only=True)
    model.load_state_dict(of_model)
    optimizer.load_state_dict(of_optimizer)


@pytest.mark.parametrize(
    ("model", "optimizer", "first", "cause"),
    [
        (linear, trainings.lion, None, None),
        (trainings.dropout, trainings.lion, "parameter 0.weight", "dropout"),
        (linear, trainings.scheduled, "last_epoch of the scheduler", "scheduler"),
    ],
    ids=["enough", "dropout", "scheduler"],
)
def test_ones_own_way_of_saving(model: Any, optimizer: Any, first: str | None, cause: str):
    """It saves neither the generators' states nor the scheduler."""
    certificate = steepest.certify(
        model, optimizer, batch, square, via=(_own_save, _own_load), steps=6, process="same"
    )
    assert certificate.via == "own functions"
    if first is None:
        assert certificate.identical, str(certificate)
        return
    assert first in [each.name for each in certificate.differences if each.step == certificate.first.step]
    assert any(cause in each for each in certificate.causes)


def test_the_generators_are_left_alone():
    torch.manual_seed(3)
    random.seed(3)
    before = torch.get_rng_state(), random.getstate()
    steepest.certify(trainings.dropout, trainings.lion, batch, square, steps=2, process="same")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "stop_after must be at least 0 and less than steps, got 0 of 0"),
        ({"steps": 4, "stop_after": 4}, "got 4 of 4"),
        ({"stop_after": -1}, "got -1 of 10"),
        ({"via": "pickle"}, "via must be one of torch.save, dcp, dcp_flat"),
        ({"batches": [1, 2]}, "2 batches are too few for 10 steps"),
        (
            {"loss": lambda model, batch: None, "process": "new"},
            "a new process cannot import these functions",
        ),
    ],
)
def test_requests_that_make_no_sense(options: dict[str, Any], words: str):
    given = {"batches": batch, "loss": square, **options}
    with pytest.raises(ValueError, match=words):
        steepest.certify(linear, trainings.lion, **given)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("trust.trainings", "name a function as package.module:function"),
        ("trust.trainings:nothing", "has no function 'nothing'"),
        ("trust.no_such_module:job", "cannot import 'trust.no_such_module'"),
        ("trust.trainings:not_a_job", "must return a tuple or a dict of make_model, make_optimizer, batches"),
    ],
)
def test_names_of_functions_that_are_none(name: str, words: str):
    with pytest.raises(ValueError, match=words):
        certify_function(name)


def test_values_are_compared_by_bits_and_described():
    nan, zero = torch.tensor([torch.nan, 1.0]), torch.tensor([0.0, 1.0])
    assert compare(1, "x", nan, nan.clone()).largest == 0
    assert compare(1, "x", nan, zero).largest == torch.inf
    assert compare(1, "x", torch.ones(2), torch.tensor([1.0, 1.5])) == Difference(1, "x", None, 0.5, 1, 2)
    assert compare(1, "x", -zero[:1], zero[:1]) == Difference(1, "x", None, 0.0, 1, 1)
    assert compare(1, "x", torch.ones(2), torch.ones(3)).mismatch == "shape (3,) instead of (2,)"
    pair = torch.ones(2, dtype=torch.complex64)
    assert compare(1, "x", pair, torch.ones(2)).mismatch == "torch.float32 instead of torch.complex64"
    assert compare(1, "x", pair, pair + 0.5j) == Difference(1, "x", None, 0.5, 2, 4)
    assert str(compare(1, "option lr of group 0", 0.1, 0.2)) == "option lr of group 0: 0.2 instead of 0.1"
