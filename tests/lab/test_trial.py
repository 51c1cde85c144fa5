from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from steepest.lab import LabError, Task
from steepest.lab.corpus import Corpus
from steepest.lab.models import GPTConfig
from steepest.lab.optimizer_spec import OptimizerSpec, resolve_optimizers
from steepest.lab.records import Record, TrialSpec
from steepest.lab.seeding import infinite_batches
from steepest.lab.tasks import digits_task, text_task
from steepest.lab.trial import run_trial

from .conftest import MACHINE


def make_spec(task: Task[Tensor], entry: object = "adamw") -> OptimizerSpec:
    return resolve_optimizers([entry], task.make(0))[0]  # type: ignore[list-item]


def trial(
    task: Task[Tensor], entry: object = "adamw", *, lr: float = 1e-2, seed: int = 0, steps: int = 20
) -> Record:
    spec = make_spec(task, entry)
    trial = TrialSpec("search", 0, spec.label, lr, seed)
    return run_trial(task, spec, trial, steps=steps, evaluations=4, machine=MACHINE)


def losses(record: Record) -> list[float]:
    return [value for _, _, value in record.curve]


def small_text() -> Task[tuple[Tensor, Tensor]]:
    text = bytes(range(256)) * 4
    return text_task(Corpus("", text, text, 1, 0), GPTConfig(width=16, depth=1, heads=2, context=8))


@pytest.mark.parametrize("name", ["plane", "text", "digits", "convnet"])
def test_the_same_seed_repeats_bit_for_bit_and_another_does_not(name: str, plane: Task[Tensor]) -> None:
    task = {"plane": plane, "text": small_text(), "digits": digits_task(), "convnet": digits_task("convnet")}[
        name
    ]
    first, again, other = (trial(task, seed=seed) for seed in (5, 5, 6))  # type: ignore[arg-type]
    assert losses(first) == losses(again)
    assert [value for *_, value in first.validation] == [value for *_, value in again.validation]
    assert losses(first) != losses(other)


def test_the_callers_generator_has_no_effect_and_does_not_change(plane: Task[Tensor]) -> None:
    spec = make_spec(plane)
    trial = TrialSpec("search", 0, spec.label, 1e-2, 0)
    records = []
    for foreign_seed in (1, 2):
        torch.manual_seed(foreign_seed)
        before = torch.get_rng_state()
        records.append(run_trial(plane, spec, trial, steps=20, evaluations=2, machine=MACHINE))
        assert torch.equal(before, torch.get_rng_state())
    assert losses(records[0]) == losses(records[1])


def test_all_optimizers_get_the_same_weights_data_and_dropout(plane: Task[Tensor]) -> None:
    seen: dict[str, list[Tensor]] = {}

    def recording_task(label: str) -> Task[Tensor]:
        seen[label] = []

        def loss(model: nn.Module, batch: Tensor) -> Tensor:
            seen[label] += [batch, model[1](torch.ones(8))]  # type: ignore[operator, index]
            if len(seen[label]) == 2:
                seen[label] += [parameter.detach().clone() for parameter in model.parameters()]
            return plane.loss(model, batch)

        return replace(plane, loss=loss)

    records = [trial(recording_task(name), name, seed=3) for name in ("adamw", "signgsd", "simba")]
    for label in ("signgsd", "simba"):
        assert len(seen[label]) == len(seen["adamw"]) == 40 + 4
        for ours, theirs in zip(seen["adamw"], seen[label], strict=True):
            assert torch.equal(ours, theirs)
    assert len({record.curve[0][2] for record in records}) == 1
    assert len({record.curve[-1][2] for record in records}) == 3


def test_the_curve_equals_that_of_a_handwritten_training_loop(plane: Task[Tensor]) -> None:
    linear = replace(plane, make=lambda seed: nn.Linear(4, 1))
    record = trial(linear, ("sgd", torch.optim.SGD), lr=0.1, steps=10)
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.1 + 0.45 * (1 + math.cos(math.pi * step / 9))
    )
    expected = []
    batches = [batch for seed in (0, 1_000_003, 2_000_006) for batch in plane.batches(seed)]
    for batch in batches[:10]:
        optimizer.zero_grad()
        loss = plane.loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
        expected.append(loss.item())
    assert losses(record) == pytest.approx(expected, rel=1e-6)
    assert record.metric == pytest.approx(plane.evaluate(model), rel=1e-6)


def test_the_record_describes_the_trial(plane: Task[Tensor]) -> None:
    record = trial(plane, "lion", steps=100)
    assert [step for step, _, _ in record.validation] == [0, 6, 25, 56, 100]
    assert record.metric == record.validation[-1][2]
    assert record.curve[-1][0] == record.steps == 100
    assert record.parameters == 4 * 8 + 8 + 8 + 1
    assert record.state_bytes_per_parameter == pytest.approx(record.state_bytes / 49)
    assert record.state_bytes >= 4 * 49
    assert record.hyper["betas"] == [0.9, 0.99]
    assert [seconds for _, seconds, _ in record.curve] == sorted(seconds for _, seconds, _ in record.curve)


def test_a_point_of_the_curve_is_the_mean_since_the_previous_point(plane: Task[Tensor]) -> None:
    seen: list[float] = []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        value = plane.loss(model, batch)
        seen.append(value.item())
        return value

    record = trial(replace(plane, loss=loss), steps=100)
    assert [step for step, _, _ in record.curve] == [*range(3, 100, 3), 100]
    assert losses(record)[:2] == pytest.approx([sum(seen[:3]) / 3, sum(seen[3:6]) / 3])
    assert losses(record)[-1] == pytest.approx(seen[-1])


def test_evaluation_does_not_affect_training(plane: Task[Tensor]) -> None:
    def noisy(model: nn.Module) -> float:
        assert not model.training
        assert not torch.is_grad_enabled()
        return torch.rand(()).item()

    assert losses(trial(replace(plane, evaluate=noisy))) == losses(trial(plane))


def test_a_non_finite_loss_ends_the_trial(plane: Task[Tensor]) -> None:
    record = trial(plane, ("sgd", torch.optim.SGD), lr=1e6, steps=400)
    assert record.status == "diverged"
    assert math.isnan(record.metric)
    assert record.steps < 400


def test_a_non_finite_metric_ends_the_trial(plane: Task[Tensor]) -> None:
    values: Iterator[float] = iter([1.0, 1.0, math.inf])
    record = trial(replace(plane, evaluate=lambda model: next(values)))
    assert (record.status, record.steps) == ("diverged", 5)


def test_every_epoch_has_a_new_order(plane: Task[Tensor]) -> None:
    batches = infinite_batches(plane, 0)
    first, second = ([next(batches) for _ in range(4)] for _ in range(2))
    assert sorted(torch.cat(first).tolist()) == sorted(torch.cat(second).tolist()) == list(range(64))
    assert torch.cat(first).tolist() != torch.cat(second).tolist()


def test_the_first_epoch_uses_the_trials_seed(plane: Task[Tensor]) -> None:
    for seed in (0, 5, 6):
        batches = infinite_batches(plane, seed)
        for expected in plane.batches(seed):
            assert torch.equal(next(batches), expected)


def test_an_iterator_returned_twice_is_an_error(plane: Task[Tensor]) -> None:
    once = iter([torch.arange(16)] * 5)
    with pytest.raises(LabError, match=r"batches\(seed\) returned an exhausted iterator; .* new iterator"):
        trial(replace(plane, batches=lambda seed: once))


def test_no_data_is_an_error_and_not_an_infinite_loop(plane: Task[Tensor]) -> None:
    with pytest.raises(LabError, match="no batches"):
        trial(replace(plane, batches=lambda seed: []))


def test_a_users_factory_trains(plane: Task[Tensor]) -> None:
    record = trial(plane, ("mine", partial(torch.optim.SGD, momentum=0.9)), lr=0.01, steps=60)
    assert record.metric < record.validation[0][2] / 2
