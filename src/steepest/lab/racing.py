"""The race: plan it, run the trials that are not on record yet, report."""

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
from . import course, machine, schedule, timing
from .clock import device_of
from .contestant import Contestant, Entry, enlist, trainable
from .errors import LabError
from .folder import Folder
from .plan import Plan, Request, StepTimes, require_plain
from .progress import Silent, Watcher
from .records import Record
from .seeding import seeded
from .standings import Row, standings
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
_TIMING_SHARE = 0.02
_MOST_TIMING_SECONDS = 5.0


@dataclass(frozen=True)
class RaceResult:
    """What a race leaves behind."""

    rows: list[Row]
    """A row per optimizer, best first."""
    plan: Plan
    records: list[Record]
    folder: Path
    report: Path | None
    """The HTML page; None if no report was asked for."""


def race(
    task: Task[Any],
    optimizers: Entry | Iterable[Entry] = DEFAULT_OPTIMIZERS,
    *,
    trials: int = 5,
    seeds: int = 3,
    steps: int | None = None,
    budget: str | float | None = None,
    out: str | Path = "runs/race",
    fresh: bool = False,
    evaluations: int = EVALUATIONS,
    report: bool = True,
    watcher: Watcher | None = None,
) -> RaceResult:
    """Race optimizers on a task: an equal learning-rate search for each, then more seeds for its best.

    Every finished trial is on the disk at once. Called again with the same arguments, an interrupted
    race goes on where it stopped and ends as if it had never been interrupted.

    Args:
        task: What to train; see `Task`.
        optimizers: Names of steepest's optimizers, optimizer classes, or (label, factory) pairs; a
            single name or class is a race of one. A factory (a class is one) is called with the
            parameters, and with `lr=` for each trial; called without, its optimizer's
            `defaults["lr"]` is where the search starts.
        trials: Learning rates each optimizer tries, its default among them.
        seeds: Seeds each optimizer's best learning rate is trained with, the search's among them.
        steps: Steps of every trial.
        budget: Time for the whole race instead: "5m", "90s", "1h" or seconds. It is divided into
            steps by a measurement at the start. Without `steps` or `budget`, five minutes.
        out: The folder for plan, records and report.
        fresh: Begin anew, deleting what an earlier race left in the folder.
        evaluations: How often a trial takes the metric, besides at its start: more densely the
            earlier, as the curve is steeper there.
        report: Whether to write pictures and the HTML page (needs the `lab` extra).
        watcher: Told of everything as it happens; see `steepest.lab.progress`. By default silent.

    Returns:
        The standings, and where everything lies.

    Raises:
        LabError: the request cannot be served, or the folder holds a race of another plan.

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
    began = time.perf_counter()
    watcher = Silent() if watcher is None else watcher
    if not isinstance(task, Task):
        raise LabError(f"the task must be a steepest.lab.Task, got a {type(task).__name__}")
    if steps is not None and budget is not None:
        raise LabError("give steps or a budget, not both")
    trials, seeds = _count("trials", trials), _count("seeds", seeds)
    evaluations = _count("evaluations", evaluations)
    steps = None if steps is None else _count("steps", steps)
    require_plain("config", task.config)
    wanted = None if steps is not None else budgets.seconds(DEFAULT_BUDGET if budget is None else budget)

    with seeded(0):
        model = task.make(0)
    if not trainable(model):
        raise LabError(f"the model of task {task.name!r} has no trainable parameters")
    contestants = enlist(optimizers, model)
    request = Request(
        task=task.name,
        metric=task.metric,
        unit=task.unit,
        lower_is_better=task.lower_is_better,
        config=dict(task.config),
        parameters=sum(parameter.numel() for parameter in trainable(model)),
        device=device_of(model).type,
        threads=torch.get_num_threads() if device_of(model).type == "cpu" else None,
        optimizers={c.label: {"lr": c.default_lr, **c.hyper} for c in contestants},
        trials=trials,
        seeds=seeds,
        evaluations=evaluations,
        steps=steps,
        budget=wanted,
    )
    here = machine.describe(device_of(model))
    del model

    folder = Folder(Path(out))
    folder.open(fresh=fresh)
    plan = Plan.load(folder.plan)
    if plan is None:
        watcher.note(f"measuring {len(contestants)} optimizers' steps to plan the race")
        plan = make_plan(task, contestants, request, here, began)
        plan.save(folder.plan)
    else:
        plan.check_same(request, folder.path)
    records = folder.records.read()
    if run(task, contestants, plan, records, folder, here, watcher):
        watcher.note("measuring the steps once more")
        again = timing.measure(task, contestants, _timing_seconds(request))
        plan = replace(plan, times=plan.times.calmer(again))
        plan.save(folder.plan)

    page = None
    if report:
        from .report import write

        page = write(folder, plan, records)
    return RaceResult(standings(plan, records), plan, records, folder.path, page)


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
    contestants: Sequence[Contestant],
    request: Request,
    here: dict[str, Any],
    began: float,
) -> Plan:
    """Measure step times, and settle how many steps each trial takes.

    Args:
        task: What will be trained.
        contestants: Who will race.
        request: What was asked for.
        here: The machine.
        began: When the race began, on `time.perf_counter`'s clock.

    Raises:
        LabError: the budget is too small.
    """
    for attempt in range(_MEASUREMENTS):
        times = timing.measure(task, contestants, _timing_seconds(request))
        try:
            steps = _settle_steps(request, times, time.perf_counter() - began)
            break
        except LabError:
            # Perhaps the machine was busy with something else: a budget is not refused on one look.
            if attempt == _MEASUREMENTS - 1:
                raise
    return Plan(
        request=request,
        steps=steps,
        schedule=schedule.describe(steps),
        limit=None if request.budget is None else budgets.OVERRUN * request.budget,
        setup_seconds=time.perf_counter() - began,
        times=times,
        machine=here,
    )


def _timing_seconds(request: Request) -> float:
    share = math.inf if request.budget is None else _TIMING_SHARE * request.budget
    return min(_MOST_TIMING_SECONDS, share)


def _settle_steps(request: Request, times: StepTimes, spent: float) -> int:
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
    contestants: Sequence[Contestant],
    plan: Plan,
    records: list[Record],
    folder: Folder,
    here: dict[str, Any],
    watcher: Watcher,
) -> bool:
    """Run all trials that are not in `records` yet, appending each to it and to the folder.

    Returns:
        Whether there were any.
    """
    known = len(records)
    by_label = {contestant.label: contestant for contestant in contestants}
    watcher.planned(plan, records)
    try:
        while True:
            progress = course.survey(plan, records)
            if progress.next is None:
                break
            watcher.begun(progress.next, progress)
            record = run_trial(
                task,
                by_label[progress.next.optimizer],
                progress.next,
                steps=plan.steps,
                evaluations=plan.request.evaluations,
                machine=here,
                tick=watcher.ticked,
            )
            folder.records.append(record)
            records.append(record)
            watcher.finished(record)
    finally:
        watcher.closed()
    return len(records) > known
