"""Growth: state, peak memory and step time of optimizers against the size of the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

from ..bench.costs import measure_costs
from ..errors import LabError
from ..models.gpt2 import GPT2, SIZES, GPT2Config
from ..progress import Callback
from ..records import Cost, Experiment, Metric, OptimizerEntry, write_records
from ..training import machine
from ..training.optimizers import OptimizerLike, resolve_optimizers

DEFAULT_OPTIMIZERS = ("sgd", "sgd_sai", "adamw", "adam_mini", "lion", "signgsd", "muon")
ROUNDS = 5

# Names and settings are checked on it.
_TINY = GPT2Config("tiny", 16, 1, 2, vocabulary=16, context=8)


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

    All optimizers of a size step the same float32 weights and gradients in turns. What does not fit the free
    memory, or is not among `measured`, has its bytes from `steepest.plan` and no time: see
    `steepest.lab.bench.costs.measure_costs`.

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
    specs = resolve_optimizers(optimizers, GPT2(_TINY), settings)
    costs: dict[str, Cost] = {}
    not_run: dict[str, str] = {}
    for size in sizes:
        title = SIZES[size].title
        callback.message(
            f"{title}: {'measuring' if size in measured else 'planning'} {len(specs)} optimizers"
        )
        with torch.device("meta"):
            model = GPT2(SIZES[size])
        found = measure_costs(
            model,
            specs,
            baseline=specs[0].label,
            name=title,
            device=device,
            rounds=rounds,
            memory=None if size in measured else 0,
        )
        costs |= {f"{label} @ {size}": cost for label, cost in found.costs.items()}
        not_run |= {f"{label} @ {size}": reason for label, reason in found.failed.items()}
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
