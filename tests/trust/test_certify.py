"""certify: identical where it is, and where it is not, what differs first."""

from __future__ import annotations

import random
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch

import steepest
from steepest.trust import CertifyRequestError, Difference, certify_function
from steepest.trust.training import Run, Training
from steepest.trust.verdict import compare

from . import trainings
from .trainings import BROKEN, batch, linear, square

module = import_module("steepest.trust.certify")  # its package has the function under this name


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
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 4, "stop_after": 4}, "got 4 of 4"),
        ({"stop_after": -1}, "got -1 of 10"),
        ({"via": "pickle"}, "via must be one of torch.save, dcp, dcp_flat"),
        ({"via": (1,)}, r"via must be one of .*, or a pair of functions, got \(1,\)"),
        ({"via": ["torch.save"]}, r"via must be one of .*, or a pair of functions, got \['torch.save'\]"),
        ({"process": "newer"}, "process must be 'new' or 'same', got 'newer'"),
        (
            {"make_optimizer": lambda model: (trainings.lion(model), None, None)},
            "make_optimizer must return an optimizer, or a tuple of it and a scheduler, not a tuple of 3",
        ),
        ({"batches": [1, 2]}, "2 batches are too few for 10 steps"),
        (
            {"loss": lambda model, batch: None, "process": "new"},
            "a new process cannot import these functions",
        ),
    ],
)
def test_requests_that_make_no_sense(options: dict[str, Any], words: str):
    given = {"make_optimizer": trainings.lion, "batches": batch, "loss": square, **options}
    with pytest.raises(CertifyRequestError, match=words):
        steepest.certify(linear, **given)


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
    with pytest.raises(CertifyRequestError, match=words):
        certify_function(name)


def test_a_named_function_may_return_an_iterator_of_batches(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "in_new_process", lambda resume, folder: resume())
    certificate = certify_function("trust.trainings:iterator_of_batches", steps=4)
    assert certificate.identical, str(certificate)
    with pytest.raises(CertifyRequestError, match="1000 batches are too few for 1001 steps"):
        certify_function("trust.trainings:iterator_of_batches", steps=1001)


class _Stream(torch.utils.data.IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        return map(batch, range(6))


class _StreamOfSix(_Stream):
    def __len__(self) -> int:
        return 6


@pytest.mark.parametrize("stream", [_Stream, _StreamOfSix])
def test_batches_of_an_iterable_dataset(stream: type[_Stream]):
    certificate = steepest.certify(linear, trainings.lion, stream(), square, steps=6, process="same")
    assert certificate.identical, str(certificate)


def _lbfgs(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)


def _plateau(model: torch.nn.Module) -> Any:
    optimizer = trainings.lion(model)
    return optimizer, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, threshold=10.0)


@pytest.mark.parametrize("optimizer", [_lbfgs, _plateau])
def test_a_step_that_needs_a_closure_and_a_schedule_that_needs_the_loss(optimizer: Any):
    certificate = steepest.certify(linear, optimizer, batch, square, process="same")
    assert certificate.identical, str(certificate)


def test_the_schedule_gets_the_loss_and_the_closure_is_that_of_the_loss():
    """Against the loop that a user would write."""
    for make in (_lbfgs, _plateau):
        run = Run(Training(linear, make, batch, square), seed=0)
        torch.manual_seed(0)
        model = linear()
        made = make(model)
        optimizer, schedule = made if isinstance(made, tuple) else (made, None)
        for i in range(5):
            run.step()

            def closure(i: int = i, model: Any = model, optimizer: Any = optimizer) -> torch.Tensor:
                optimizer.zero_grad()
                loss = square(model, batch(i))
                loss.backward()
                return loss

            loss = optimizer.step(closure)
            if schedule is not None:
                schedule.step(loss.item())
        for ours, theirs in zip(run.model.parameters(), model.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        assert run.optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
        assert (schedule is None) or optimizer.param_groups[0]["lr"] < 0.01, "the plateau was seen"


def test_a_model_that_is_made_once_is_named():
    shared = linear()
    certificate = steepest.certify(lambda: shared, trainings.lion, batch, square)
    assert (certificate.deterministic, certificate.first.step) == (False, 0)
    assert "make_model" in certificate.causes[0]


class _Counts(torch.nn.Module):
    """A model that multiplies by a number that its state dict lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = torch.nn.Linear(6, 1), 0

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.layer(batch) * self.calls


def test_a_counter_on_the_model_has_the_model_among_the_causes():
    certificate = steepest.certify(_Counts, trainings.torch_adamw, batch, square, process="same")
    assert (certificate.deterministic, certificate.first.step) == (True, 6)
    assert "the optimizer, or the model, keeps something on itself" in certificate.causes[0]


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
