from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from steepest.lab import LabError, Task
from steepest.lab.records import Phase, Record
from steepest.lab.tasks.corpus import Corpus
from steepest.lab.tasks.digits import digits_task
from steepest.lab.tasks.text import text_task
from steepest.lab.training.optimizers import OptimizerSpec, resolve_optimizers
from steepest.lab.training.seeding import infinite_batches
from steepest.lab.training.trial import Trial, run_trial


def make_spec(task: Task[Tensor], entry: object = "adamw") -> OptimizerSpec:
    return resolve_optimizers([entry], task.make(0))[0]  # type: ignore[list-item]


def trial(
    task: Task[Tensor],
    entry: object = "adamw",
    *,
    lr: float = 1e-2,
    seed: int = 0,
    steps: int = 20,
    phase: Phase = "tuned",
) -> Record:
    spec = make_spec(task, entry)
    return run_trial(
        replace(task, evaluations=4), spec, Trial(spec.label, phase, seed, {"lr": lr}, steps), experiment="x"
    )


def losses(record: Record) -> list[float]:
    return [value for _, _, value in record.training_loss]


def metrics(record: Record) -> list[float]:
    return [e.metrics["squared error"] for e in record.validation]


def small_text() -> Task[tuple[Tensor, Tensor]]:
    text = bytes(range(256)) * 4
    return text_task(corpus=Corpus("", text, text, text, 1, 0), width=16, depth=1, heads=2, context=8)


@pytest.mark.parametrize("name", ["plane", "text", "digits", "convnet"])
def test_the_same_seed_repeats_bit_for_bit_and_another_does_not(name: str, plane: Task[Tensor]) -> None:
    task = {"plane": plane, "text": small_text(), "digits": digits_task(), "convnet": digits_task("convnet")}[
        name
    ]
    first, again, other = (trial(task, seed=seed) for seed in (5, 5, 6))  # type: ignore[arg-type]
    assert losses(first) == losses(again)
    assert [e.metrics for e in first.validation] == [e.metrics for e in again.validation]
    assert losses(first) != losses(other)


def test_the_callers_generator_has_no_effect_and_does_not_change(plane: Task[Tensor]) -> None:
    spec = make_spec(plane)
    trial = Trial(spec.label, "search", 0, {"lr": 1e-2}, 20)
    records = []
    for foreign_seed in (1, 2):
        torch.manual_seed(foreign_seed)
        before = torch.get_rng_state()
        records.append(run_trial(plane, spec, trial))
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

    records = [trial(recording_task(name), name, seed=3) for name in ("adamw", "signgsd", "lion")]
    for label in ("signgsd", "lion"):
        assert len(seen[label]) == len(seen["adamw"]) == 40 + 4
        for ours, theirs in zip(seen["adamw"], seen[label], strict=True):
            assert torch.equal(ours, theirs)
    assert len({losses(record)[0] for record in records}) == 1
    assert len({losses(record)[-1] for record in records}) == 3


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
    assert metrics(record)[-1] == pytest.approx(
        plane.evaluate(model, "validation")["squared error"], rel=1e-6
    )
    assert record.test == pytest.approx(plane.evaluate(model, "test"), rel=1e-6)


def test_the_record_describes_the_trial(plane: Task[Tensor]) -> None:
    record = trial(plane, "lion", steps=100)
    assert [e.step for e in record.validation] == [0, 6, 25, 56, 100]
    assert record.validated("squared error") == metrics(record)[-1]
    assert record.training_loss[-1][0] == record.steps == record.last_step == record.chosen_step == 100
    assert (record.experiment, record.task, record.optimizer) == ("x", "plane", "lion")
    assert record.searched == {"lr": 1e-2}
    assert record.parameters == 4 * 8 + 8 + 8 + 1
    assert record.state_bytes >= 4 * 49
    assert record.hyperparameters["betas"] == [0.9, 0.99]
    assert record.hyperparameters["lr"] == 1e-2
    times = [seconds for _, seconds, _ in record.training_loss]
    assert times == sorted(times)
    assert record.seconds >= record.validation[-1].seconds >= times[-1]


def test_a_point_of_the_curve_is_the_mean_since_the_previous_point(plane: Task[Tensor]) -> None:
    seen: list[float] = []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        value = plane.loss(model, batch)
        seen.append(value.item())
        return value

    record = trial(replace(plane, loss=loss), steps=100)
    assert [step for step, _, _ in record.training_loss] == [*range(2, 101, 2)]
    assert losses(record)[:2] == pytest.approx([sum(seen[:2]) / 2, sum(seen[2:4]) / 2])
    assert losses(record)[-1] == pytest.approx(sum(seen[-2:]) / 2)


def test_evaluation_does_not_affect_training(plane: Task[Tensor]) -> None:
    def noisy(model: nn.Module, split: str) -> dict[str, float]:
        assert not model.training
        assert not torch.is_grad_enabled()
        return {"squared error": torch.rand(()).item()}

    assert losses(trial(replace(plane, evaluate=noisy))) == losses(trial(plane))


def test_a_non_finite_loss_ends_the_trial(plane: Task[Tensor]) -> None:
    record = trial(plane, ("sgd", torch.optim.SGD), lr=1e6, steps=400)
    assert record.status == "diverged"
    assert math.isnan(record.validated("squared error"))
    assert record.test is None
    assert record.last_step < record.steps == 400


def test_a_non_finite_metric_ends_the_trial(plane: Task[Tensor]) -> None:
    values: Iterator[float] = iter([1.0, 1.0, math.inf])
    record = trial(replace(plane, evaluate=lambda model, split: {"squared error": next(values)}))
    assert (record.status, record.last_step) == ("diverged", 5)


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
    with pytest.raises(LabError, match=r"no batches for seed \d+: batches\(seed\) must .* new iterator"):
        trial(replace(plane, batches=lambda seed: once))


def test_no_data_is_an_error_and_not_an_infinite_loop(plane: Task[Tensor]) -> None:
    with pytest.raises(LabError, match="no batches"):
        trial(replace(plane, batches=lambda seed: []))


def test_a_users_factory_trains(plane: Task[Tensor]) -> None:
    record = trial(plane, ("mine", partial(torch.optim.SGD, momentum=0.9)), lr=0.01, steps=60)
    assert metrics(record)[-1] < metrics(record)[0] / 2


def test_the_weights_with_the_best_validation_metric_are_tested(plane: Task[Tensor]) -> None:
    seen: dict[str, list[Tensor]] = {"validation": [], "test": []}
    values = iter([9.0, 3.0, 1.0, 2.0, 4.0])

    def evaluate(model: nn.Module, split: str) -> dict[str, float]:
        seen[split].append(nn.utils.parameters_to_vector(model.parameters()).clone())
        return {"squared error": next(values) if split == "validation" else 0.5}

    record = trial(replace(plane, evaluate=evaluate, keep_best=True))
    assert record.chosen_step == record.validation[2].step == 5
    assert record.validated("squared error") == 1.0
    assert record.test == {"squared error": 0.5}
    assert torch.equal(seen["test"][0], seen["validation"][2])
    assert not torch.equal(seen["validation"][2], seen["validation"][4])


def test_a_search_trial_has_no_test_metrics(plane: Task[Tensor]) -> None:
    assert trial(plane, phase="search").test is None


def test_an_observer_adds_series(plane: Task[Tensor]) -> None:
    def observe(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, list[tuple[int, float]]]:
        found: dict[str, list[tuple[int, float]]] = {"lr": []}
        optimizer.register_step_pre_hook(
            lambda *_: found["lr"].append((len(found["lr"]) + 1, optimizer.param_groups[0]["lr"]))
        )
        return found

    spec = make_spec(plane)
    record = run_trial(plane, spec, Trial("adamw", "tuned", 1, {"lr": 0.5}, 20), observe=observe)
    assert [step for step, _ in record.series["lr"]] == list(range(1, 21))
    assert record.series["lr"][0][1] == 0.25
    assert max(lr for _, lr in record.series["lr"]) == 0.5


def test_an_optimizer_that_fails_on_diverged_weights_has_diverged(plane: Task[Tensor]) -> None:
    class Factorizing(torch.optim.SGD):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            weight = self.param_groups[0]["params"][0]
            torch.linalg.eigh(weight.grad.T @ weight.grad)
            super().step()

    record = trial(plane, ("factorizing", Factorizing), lr=1e30, steps=400)
    assert record.status == "diverged"
