"""The race: plan it, run the missing trials, and write the report."""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from . import budget as budgets
from . import machine, schedule, timing, trial_scheduler
from .clock import device_of
from .errors import LabError
from .optimizer_spec import OptimizerLike, OptimizerSpec, resolve_optimizers, trainable
from .plan import Plan, Request, StepTimes, require_json
from .progress import Callback
from .ranking import Row, rank
from .records import Record
from .run_dir import RunDir
from .seeding import seeded
from .task import Task
from .trial import run_trial

DEFAULT_OPTIMIZERS = (
    "adamw",
    "lion",
    "signum",
    "signgsd",
    "simba",
    "sgd_sai",
    "muon",
    "procrustes",
    "quad",
)
DEFAULT_BUDGET = 300.0
EVALUATIONS = 8

_MEASUREMENTS = 3
_TIMING_FRACTION = 0.02
_MAX_TIMING_SECONDS = 5.0


@dataclass(frozen=True)
class RaceResult:
    """The result of a race."""

    rows: list[Row]
    """A row per optimizer, best first."""
    plan: Plan
    records: list[Record]
    directory: Path
    report: Path | None
    """The HTML page; None if no report was requested."""


def race(
    task: Task[Any],
    optimizers: OptimizerLike | Iterable[OptimizerLike] = DEFAULT_OPTIMIZERS,
    *,
    trials: int = 5,
    seeds: int = 3,
    steps: int | None = None,
    budget: str | float | None = None,
    out: str | Path = "runs/race",
    fresh: bool = False,
    evaluations: int = EVALUATIONS,
    report: bool = True,
    callback: Callback | None = None,
) -> RaceResult:
    """Race optimizers on a task: the same learning-rate search for each, then more seeds at its best lr.

    Every finished trial is saved at once. Call `race` again with the same arguments to resume an
    interrupted race; its results are the same as without the interruption.

    Args:
        task: The training problem.
        optimizers: Names of steepest's optimizers, optimizer classes, or (label, factory) pairs; a
            single name or class is a race of one. `race` calls a factory (or class) with the
            parameters, and with `lr=` for each trial. Without `lr=`, the optimizer's `defaults["lr"]`
            is the start of the search.
        trials: Number of learning rates per optimizer, including its default.
        seeds: Number of seeds at each optimizer's best learning rate, including the search's.
        steps: Steps of every trial.
        budget: Time for the whole race, instead of `steps`: "5m", "90s", "1h" or seconds. A measurement
            at the start converts it into steps. Without `steps` or `budget`, five minutes.
        out: The directory for plan, records and report.
        fresh: Start over and delete the files of an earlier race in the directory.
        evaluations: Number of evaluations per trial besides the one at its start; they are denser
            early on, where the curve is steep.
        report: Whether to write plots and the HTML page (needs the `lab` extra).
        callback: Receives progress events; see `steepest.lab.progress`. By default nothing is shown.

    Returns:
        The ranking and the paths of the files.

    Raises:
        LabError: the request is invalid, or the directory holds a race with another plan.

    Example:
        >>> import tempfile, torch
        >>> from steepest.lab import Task, race
        >>> x = torch.linspace(-1, 1, 32).unsqueeze(1)
        >>> line = Task(
        ...     name="a line",
        ...     make=lambda seed: torch.nn.Linear(1, 1),
        ...     batches=lambda seed: [x],
        ...     loss=lambda model, x: (model(x) - 3 * x).square().mean(),
        ...     evaluate=lambda model: (model(x) - 3 * x).square().mean().item(),
        ... )
        >>> with tempfile.TemporaryDirectory() as out:
        ...     result = race(line, torch.optim.SGD, trials=4, seeds=2, steps=30, out=out, report=False)
        >>> [(row.optimizer, row.trials, row.seeds) for row in result.rows]
        [('SGD', 4, 2)]
    """
    start = time.perf_counter()
    callback = Callback() if callback is None else callback
    if not isinstance(task, Task):
        raise LabError(f"the task must be a steepest.lab.Task, got a {type(task).__name__}")
    if steps is not None and budget is not None:
        raise LabError("give steps or a budget, not both")
    trials, seeds = _count("trials", trials), _count("seeds", seeds)
    evaluations = _count("evaluations", evaluations)
    steps = None if steps is None else _count("steps", steps)
    require_json("config", task.config)
    budget = DEFAULT_BUDGET if budget is None else budget
    budget_seconds = None if steps is not None else budgets.parse_seconds(budget)

    with seeded(0):
        model = task.make(0)
    if not trainable(model):
        raise LabError(f"the model of task {task.name!r} has no trainable parameters")
    specs = resolve_optimizers(optimizers, model)
    request = Request(
        task=task.name,
        metric=task.metric,
        unit=task.unit,
        lower_is_better=task.lower_is_better,
        config=dict(task.config),
        parameters=sum(parameter.numel() for parameter in trainable(model)),
        device=device_of(model).type,
        threads=torch.get_num_threads() if device_of(model).type == "cpu" else None,
        optimizers={spec.label: {"lr": spec.default_lr, **spec.hyper} for spec in specs},
        trials=trials,
        seeds=seeds,
        evaluations=evaluations,
        steps=steps,
        budget=budget_seconds,
    )
    this_machine = machine.describe(device_of(model))
    del model

    run_dir = RunDir(Path(out))
    run_dir.open(fresh=fresh)
    plan = Plan.load(run_dir.plan)
    if plan is None:
        callback.message(f"timing the steps of {len(specs)} optimizers to plan the race")
        plan = make_plan(task, specs, request, this_machine, start)
        plan.save(run_dir.plan)
    else:
        plan.require_same_request(request, run_dir.path)
    records = run_dir.records.read()
    if run(task, specs, plan, records, run_dir, this_machine, callback):
        callback.message("timing the steps again")
        again = timing.measure(task, specs, _timing_seconds(request))
        plan = replace(plan, times=plan.times.less_noisy(again))
        plan.save(run_dir.plan)

    page = None
    if report:
        from .report import write

        page = write(run_dir, plan, records)
    return RaceResult(rank(plan, records), plan, records, run_dir.path, page)


def _count(name: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise LabError(f"{name} must be a whole number, got {value!r}") from None
    if number < 1:
        raise LabError(f"{name} must be at least 1, got {number}")
    return number


def make_plan(
    task: Task[Any],
    specs: Sequence[OptimizerSpec],
    request: Request,
    this_machine: dict[str, Any],
    start: float,
) -> Plan:
    """Measure step times and decide how many steps each trial takes.

    Args:
        task: The training problem.
        specs: The optimizers.
        request: The user's request.
        this_machine: The description of the machine.
        start: The time at which the race started, read from `time.perf_counter`.

    Raises:
        LabError: the budget is too small.
    """
    for attempt in range(_MEASUREMENTS):
        times = timing.measure(task, specs, _timing_seconds(request))
        try:
            steps = _steps_per_trial(request, times, time.perf_counter() - start)
            break
        except LabError:
            # The machine may have been busy: measure again before refusing the budget.
            if attempt == _MEASUREMENTS - 1:
                raise
    return Plan(
        request=request,
        steps=steps,
        schedule=schedule.describe(steps),
        limit=None if request.budget is None else budgets.OVERRUN * request.budget,
        setup_seconds=time.perf_counter() - start,
        times=times,
        machine=this_machine,
    )


def _timing_seconds(request: Request) -> float:
    affordable = math.inf if request.budget is None else _TIMING_FRACTION * request.budget
    return min(_MAX_TIMING_SECONDS, affordable)


def _steps_per_trial(request: Request, times: StepTimes, spent: float) -> int:
    if request.steps is not None:
        return request.steps
    assert request.budget is not None
    return budgets.steps_per_trial(
        request.budget,
        trials=len(request.optimizers) * (request.trials + request.seeds - 1),
        step_seconds=times.step_seconds,
        evaluation_seconds=(1 + request.evaluations) * times.evaluation_seconds,
        spent=spent,
    )


def run(
    task: Task[Any],
    specs: Sequence[OptimizerSpec],
    plan: Plan,
    records: list[Record],
    run_dir: RunDir,
    this_machine: dict[str, Any],
    callback: Callback,
) -> bool:
    """Run all trials that are not in `records` yet; append each record to the list and to the run directory.

    Returns:
        Whether any trial was run.
    """
    known = len(records)
    by_label = {spec.label: spec for spec in specs}
    callback.on_start(plan, records)
    try:
        while True:
            progress = trial_scheduler.progress(plan, records)
            if progress.next is None:
                break
            callback.on_trial_start(progress.next, progress)
            record = run_trial(
                task,
                by_label[progress.next.optimizer],
                progress.next,
                steps=plan.steps,
                evaluations=plan.request.evaluations,
                machine=this_machine,
                on_step=callback.on_step,
            )
            run_dir.records.append(record)
            records.append(record)
            callback.on_trial_end(record)
    finally:
        callback.on_end()
    return len(records) > known
