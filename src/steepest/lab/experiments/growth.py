"""Growth: state, peak memory and step time of optimizers against the size of the model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import steepest

from ..errors import LabError
from ..models.gpt2 import GPT2, SIZES, GPT2Config, empty_gpt2
from ..progress import Callback
from ..records import Cost, Experiment, Metric, OptimizerEntry, write_records
from ..training import machine
from ..training.optimizers import OptimizerLike, OptimizerSpec, resolve_optimizers
from ..training.peak_memory import temporary_bytes
from ..training.state_memory import state_bytes
from ..training.timing import interleave

DEFAULT_OPTIMIZERS = ("sgd", "sgd_sai", "adamw", "adam_mini", "lion", "signgsd", "muon")
ROUNDS = 5
MEMORY_FRACTION = 0.8
"""The part of the free memory that a measurement may take."""

# Names and settings are checked on it.
_TINY = GPT2Config("tiny", 16, 1, 2, vocabulary=16, context=8)
# What foreign optimizers hold at most, in copies of the parameters: two averages, and one more on the way.
_FOREIGN_COPIES = 3
_LR_FACTOR = 1e-3


def growth(
    optimizers: OptimizerLike | Iterable[OptimizerLike] = DEFAULT_OPTIMIZERS,
    sizes: Sequence[str] = tuple(SIZES),
    *,
    measured: Sequence[str] | None = None,
    rounds: int = ROUNDS,
    settings: Sequence[str] = (),
    device: str | torch.device = "cpu",
    out: str | Path = "runs/growth",
    callback: Callback | None = None,
) -> Experiment:
    """Measure what optimizers cost on GPT-2 of several sizes, and plan what does not fit the memory.

    All optimizers of a size step the same float32 weights and gradients in turns. A size is measured if it is
    among `measured` and all of them fit the free memory together; otherwise its bytes come from
    `steepest.plan` and there is no time.

    Args:
        optimizers: See `steepest.lab.training.optimizers.resolve_optimizers`.
        sizes: Names in `steepest.lab.models.gpt2.SIZES`.
        measured: Sizes that may be measured; by default all on an accelerator, and 125m on a CPU, where
            a step of Muon takes seconds.
        rounds: Timed rounds.
        settings: Hyper-parameters as `label.name=value`.
        device: Where to measure.
        out: The experiment's directory.
        callback: Receives messages.

    Returns:
        The experiment, whose `costs` are called `OPTIMIZER @ SIZE`. Optimizers that cannot be planned are
        in its `not_run` for the sizes that do not fit, also as `OPTIMIZER @ SIZE`.

    Raises:
        LabError: a bad request.
    """
    device = torch.device(device)
    if measured is None:
        measured = [*SIZES] if device.type != "cpu" else ["125m"]
    for size in (*sizes, *measured):
        if size not in SIZES:
            raise LabError(f"no size {size!r}: give {', '.join(SIZES)}")
    if not sizes or rounds < 1:
        raise LabError("give at least one size, and at least one round")
    callback = Callback() if callback is None else callback
    specs = resolve_optimizers(optimizers, empty_gpt2(_TINY, torch.device("cpu")), settings)
    costs: dict[str, Cost] = {}
    not_run: dict[str, str] = {}
    for size in sizes:
        with torch.device("meta"):
            model = GPT2(SIZES[size])
        planned = {spec.label: _planned(spec, model, SIZES[size].title, device) for spec in specs}
        needed = _needed_bytes(model, planned)
        fits = size in measured and needed < MEMORY_FRACTION * _free_bytes(device)
        callback.message(
            f"{SIZES[size].title}: {'measuring' if fits else 'planning'} {len(specs)} optimizers"
        )
        if fits:
            found: Mapping[str, Cost | None] = _measured(specs, SIZES[size], rounds, device, callback.message)
        else:
            found = planned
        for label, cost in found.items():
            if cost is not None:
                costs[f"{label} @ {size}"] = cost
            else:
                not_run[f"{label} @ {size}"] = "it was not measured, and only steepest's own can be planned"
    experiment = Experiment(
        name=Path(out).name,
        kind="growth",
        title="growth with the model's size",
        task="GPT-2",
        config={"sizes": [*sizes], "measured": [*measured], "rounds": rounds, "dtype": "float32"},
        metrics=[Metric(name="step", unit="ms")],
        steps=0,
        schedule="none",
        trials=0,
        search_seed=0,
        seeds=[],
        baseline=None,
        optimizers={
            spec.label: OptimizerEntry(entry=spec.entry, hyperparameters=dict(spec.hyperparameters), space={})
            for spec in specs
        },
        not_run=not_run,
        costs=costs,
        notes=[
            "Steps were timed in turns on the same weights and gradients; a planned peak is an upper bound.",
        ],
        command=machine.command(),
        revision=machine.revision(),
        machine=machine.describe(device),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    experiment.save(Path(out))
    write_records(Path(out), [])
    return experiment


def _planned(spec: OptimizerSpec, model: GPT2, title: str, device: torch.device) -> Cost | None:
    """Return the bytes that steepest plans for one of its own optimizers; None for others."""
    if spec.entry not in steepest.list_optimizers():
        return None
    settings: dict[str, Any] = dict(spec.settings)
    plan = steepest.plan(model, spec.entry, device=device, **settings)
    return Cost(
        optimizer=spec.label,
        model=title,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        state_bytes=plan.state_bytes,
        optimizer_ms=None,
        peak_bytes=plan.state_bytes + plan.temporary_bytes,
        planned=True,
    )


def _needed_bytes(model: GPT2, planned: Mapping[str, Cost | None]) -> int:
    """Return the bytes of weights, gradients, and what all optimizers hold together, at most."""
    weights = sum(parameter.nbytes for parameter in model.parameters())
    peaks = [_FOREIGN_COPIES * weights if cost is None else cost.peak_bytes or 0 for cost in planned.values()]
    return 2 * weights + sum(peaks)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _measured(
    specs: Sequence[OptimizerSpec],
    config: GPT2Config,
    rounds: int,
    device: torch.device,
    message: Callable[[str], None],
) -> dict[str, Cost]:
    model = empty_gpt2(config, device)
    built, peaks = {}, {}
    for spec in specs:
        optimizer = built[spec.label] = spec.build(model, {"lr": spec.default_lr * _LR_FACTOR})
        # The first step makes the state, compiles, and chooses ways of products.
        optimizer.step()
        peaks[spec.label] = temporary_bytes(optimizer.step, device)
    times = interleave(
        {label: optimizer.step for label, optimizer in built.items()}, device=device, rounds=rounds
    )
    costs = {}
    for label, optimizer in built.items():
        state = state_bytes(optimizer)
        costs[label] = Cost(
            optimizer=label,
            model=config.title,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            state_bytes=state,
            optimizer_ms=times[label].median_ms,
            optimizer_ms_quartiles=times[label].quartiles,
            peak_bytes=state + peaks[label],
        )
        message(f"  {label}: {state / 2**20:,.0f} MiB of state, {times[label].median_ms:,.0f} ms a step")
    return costs
