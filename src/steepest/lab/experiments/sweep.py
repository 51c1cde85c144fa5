"""Sweeps: search hyper-parameters for each optimizer, then train the best with seeds the search never saw."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...hyperparameters import is_finite
from ..errors import LabError
from ..files import parse_path
from ..progress import Callback
from ..records import Cost, Experiment, OptimizerEntry, Range, Record
from ..tasks.task import Task
from ..training import machine
from ..training.clock import device_of
from ..training.optimizers import OptimizerLike, OptimizerSpec, resolve_optimizers, trainable
from ..training.schedule import Schedule
from ..training.seeding import seeded
from ..training.timing import training_costs
from ..training.trial import Observe
from .run import Runner, find, grid, join, start_over
from .storage import Storage

SEARCH_SEED = 0
LR_SPAN = 100.0
"""The search covers the default lr divided and multiplied by this factor."""
WEIGHT_DECAY_RANGE = (1e-3, 1.0)

Values = tuple[float, float] | Sequence[float]
Space = Mapping[str, Values]
"""By hyper-parameter: a range (low, high) on a logarithmic axis, or a list of values, which makes a grid."""
SpaceOf = Callable[[OptimizerSpec], Space]

Budget = Callable[[Mapping[str, Cost]], tuple[int, Sequence[str], Mapping[str, str]]]
"""Receives the costs by label; returns the number of trials, the labels to run, and why the others do not."""


@dataclass(frozen=True)
class Result:
    """The files and records of an experiment."""

    directory: Path
    experiment: Experiment
    records: list[Record]


def sweep(
    task: Task[Any],
    optimizers: OptimizerLike | Iterable[OptimizerLike],
    space: Space | SpaceOf | None = None,
    *,
    trials: int = 10,
    seeds: int | Sequence[int] = 3,
    steps: int | None = None,
    out: str | Path,
    name: str | None = None,
    kind: str = "sweep",
    title: str | None = None,
    settings: Sequence[str] = (),
    schedule: Schedule | None = None,
    baseline: str | None = None,
    storage: str | None = None,
    fresh: bool = False,
    timing_seconds: float = 4.0,
    budget: Budget | None = None,
    notes: Sequence[str] = (),
    callback: Callback | None = None,
    observe: Observe | None = None,
) -> Result:
    """Search hyper-parameters for each optimizer, equally, and train the best with other seeds.

    Every finished trial is kept at once. The same call resumes an interrupted sweep, joins one that another
    process is working on, and adds optimizers or seeds to a finished one. `experiment.json` and
    `records.jsonl` suffice for that: a copy of the directory may leave the database out.

    Args:
        task: The training problem.
        optimizers: See `steepest.lab.training.optimizers.resolve_optimizers`.
        space: What is searched, for every optimizer alike or as a function of the optimizer. By default lr,
            within a factor of 100 of the optimizer's default, and weight_decay from 0.001 to 1 where the
            optimizer has it. With {} nothing is searched.
        trials: Trials of each optimizer's search. A space of lists is a grid, which sets the number itself.
        seeds: The number of final seeds (1, 2, …), or the seeds. The search uses seed 0.
        steps: Steps of every trial; by default the task's.
        out: The experiment's directory.
        name: Its name in the storage, by default the directory's.
        kind: What it is, for the report.
        title: The report's title.
        settings: Hyper-parameters as `label.name=value`.
        schedule: The learning-rate schedule; by default warm-up and cosine decay.
        baseline: The optimizer whose final metric is the target; by default `adamw` if it is there.
        storage: The database's URL; by default an SQLite file in `out`.
        fresh: Delete an earlier experiment of this name first, from the storage and with the files that it
            wrote. All others stay in `out`.
        timing_seconds: How long the optimizers' steps are timed in turns; 0 leaves out the timing.
        budget: Chooses, from the costs, how many trials and which optimizers a new experiment has.
        notes: Sentences for the report.
        callback: Receives progress events.
        observe: Adds measurements to the records of the final trials.

    Raises:
        LabError: a bad request, or `out` holds another experiment.

    Example:
        >>> import tempfile, torch
        >>> from steepest.lab import Metric, Task, sweep
        >>> x = torch.linspace(-1, 1, 32).unsqueeze(1)
        >>> def error(model, split):
        ...     return {"error": (model(x) - 3 * x).abs().mean().item()}
        >>> line = Task(
        ...     name="a line",
        ...     make=lambda seed: torch.nn.Linear(1, 1),
        ...     batches=lambda seed: [x],
        ...     loss=lambda model, x: (model(x) - 3 * x).square().mean(),
        ...     evaluate=error,
        ...     metrics=(Metric(name="error"),),
        ...     steps=30,
        ... )
        >>> with tempfile.TemporaryDirectory() as out:
        ...     result = sweep(line, "signgsd", {"lr": [0.01, 0.1]}, seeds=1, out=out, timing_seconds=0)
        >>> [(r.phase, r.searched.get("lr")) for r in result.records]
        [('search', 0.01), ('search', 0.1), ('tuned', 0.1), ('default', None)]
    """
    directory = parse_path(out)
    if storage is not None and not storage.strip():
        raise LabError("the storage's URL is blank: is a variable not set?")
    callback = Callback() if callback is None else callback
    schedule = Schedule() if schedule is None else schedule
    final_seeds = _final_seeds(seeds)
    steps = task.steps if steps is None else steps
    if steps < 1 or trials < 1:
        raise LabError(f"steps and trials must be at least 1, got {steps} and {trials}")
    with seeded(0):
        model = task.make(0)
    if not trainable(model):
        raise LabError(f"the model of task {task.name!r} has no trainable parameters")
    specs = resolve_optimizers(optimizers, model, settings)
    entries = {spec.label: _entry(spec, space) for spec in specs}
    cells = {len(grid(entry.space)) for entry in entries.values() if entry.space}
    if len(cells) > 1:
        raise LabError("give every optimizer the same number of trials: grids of the same size, or ranges")
    for spec in (each for each in specs if not each.changes_model):
        for key, axis in entries[spec.label].space.items():
            for value in axis if isinstance(axis, list) else (axis.low, axis.high):
                try:
                    spec.build(model, {key: value})
                except (TypeError, ValueError) as error:
                    raise LabError(f"{spec.label}: {error}") from error
    trials = (max(cells) or trials) if cells else 0
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LabError(f"cannot write to {directory}: {error.strerror or error}") from error
    store = Storage(directory, name or directory.name, storage)
    if fresh:
        start_over(directory, store)
    saved = find(directory, store)
    known = set() if saved is None else {*saved.optimizers, *saved.not_run}
    candidates = entries if saved is None else {**saved.optimizers, **entries}
    if baseline is not None and baseline not in candidates:
        raise LabError(f"the baseline {baseline!r} is not among the optimizers {', '.join(candidates)}")
    if budget is not None and not timing_seconds:
        raise LabError("a budget needs the steps' times: give timing_seconds, or trials instead of a budget")
    costs: Mapping[str, Cost] = {}
    if timing_seconds and not known >= entries.keys():
        callback.message(f"timing the steps of {len(specs)} optimizers")
        costs = training_costs(task, specs, timing_seconds)
    planned = budget(costs) if budget is not None and saved is None else None

    def request(saved: Experiment | None) -> Experiment:
        if budget is not None and saved is None and planned is None:
            raise LabError(f"{directory} was started over meanwhile: run the command again")
        number, run, not_run = planned or (trials, [*entries], {})
        if budget is not None and saved is not None:
            # A repeated request resumes the whole plan; one that names fewer optimizers means only those.
            whole = {*saved.optimizers, *saved.not_run} <= entries.keys()
            number, run, not_run = saved.trials, [*entries], saved.not_run if whole else {}
        chosen = {label: entries[label] for label in run if label not in not_run}
        if baseline is not None and baseline in not_run:
            raise LabError(f"the baseline {baseline!r} is not run: {not_run[baseline]}")
        apart = []
        if saved is not None and costs and (earlier := saved.costs.keys() - costs.keys()):
            apart = [
                f"The steps of {', '.join(costs)} were timed apart from those of "
                f"{', '.join(sorted(earlier))}: milliseconds and seconds compare only roughly between them. "
                "Naming all optimizers when one joins times them together."
            ]
        usual = saved.baseline if saved is not None else "adamw" if "adamw" in chosen else None
        return Experiment(
            name=store.name,
            kind=kind,
            title=title or f"{kind}: {task.name}",
            task=task.name,
            config=dict(task.config),
            metrics=list(task.metrics),
            steps=steps,
            schedule=str(schedule),
            trials=number,
            search_seed=SEARCH_SEED,
            seeds=final_seeds,
            baseline=usual if baseline is None else baseline,
            optimizers=chosen,
            not_run=dict(not_run),
            costs=dict(costs),
            notes=[*notes, *apart],
            **machine.provenance(device_of(model)),
        )

    experiment = join(directory, request, store)
    # Only the optimizers of this call can be built here; those added by others are theirs to run.
    own = {spec.label: spec for spec in specs if spec.label in experiment.optimizers}
    records = Runner(directory, experiment, task, own, store, schedule, callback, observe).run()
    return Result(directory, experiment, records)


def _final_seeds(seeds: int | Sequence[int]) -> list[int]:
    chosen = list(range(1, seeds + 1)) if isinstance(seeds, int) else sorted(set(seeds))
    if not chosen or chosen[0] <= SEARCH_SEED:
        raise LabError(f"seeds must be at least 1 because the search uses seed {SEARCH_SEED}, got {seeds}")
    return chosen


def default_space(spec: OptimizerSpec) -> Space:
    """Return the ranges that a race searches: lr, and weight decay where the optimizer has it.

    What the request has fixed is not searched.
    """
    lr = spec.default_lr
    ranges = {"lr": (lr / LR_SPAN, lr * LR_SPAN), "weight_decay": WEIGHT_DECAY_RANGE}
    held = {*spec.settings, *spec.fixed}
    return {n: r for n, r in ranges.items() if n in spec.hyperparameters and n not in held}


def _entry(spec: OptimizerSpec, space: Space | SpaceOf | None) -> OptimizerEntry:
    if not isinstance(space, Mapping):
        space = (space or default_space)(spec)
    chosen = {}
    for name, values in space.items():
        if name not in spec.hyperparameters:
            raise LabError(f"{spec.label} has no {name}: it has {', '.join(spec.hyperparameters)}")
        if name in spec.fixed:
            raise LabError(f"{spec.label} does not accept {name}, so it cannot be searched")
        chosen[name] = _values(name, values)
        if len({type(values) for values in chosen.values()}) > 1:
            raise LabError("give ranges for all searched hyper-parameters, or lists for all")
    return OptimizerEntry(entry=spec.entry, hyperparameters=dict(spec.hyperparameters), space=chosen)


def _values(name: str, values: Values) -> Range | list[float]:
    if not isinstance(values, tuple):
        if not values or not all(map(is_finite, values)):
            raise LabError(f"the grid of {name} needs finite values, got {[*values]}")
        return list(dict.fromkeys(float(value) for value in values))
    low, high = values
    if not (is_finite(low) and is_finite(high) and 0 < low < high):
        raise LabError(f"the range of {name} must satisfy 0 < low < high < ∞, got {low} to {high}")
    return Range(low=low, high=high)
