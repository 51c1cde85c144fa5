"""Growth: state, peak memory and step time of optimizers against the size of the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

from ..bench.costs import measure_costs
from ..bench.models import meta_model
from ..bench.run import costs_experiment
from ..defaults import GROWTH_ROUNDS, GROWTH_SIZES
from ..errors import LabError
from ..files import parse_path
from ..progress import Callback
from ..records import Cost, Experiment, write_records
from ..training.optimizers import OptimizerLike, resolve_optimizers

DEFAULT_OPTIMIZERS = ("sgd", "sgd_sai", "adamw", "adam_mini", "lion", "signgsd", "muon")


def growth(
    optimizers: OptimizerLike | Iterable[OptimizerLike] = DEFAULT_OPTIMIZERS,
    sizes: Sequence[str] = tuple(GROWTH_SIZES),
    *,
    measured: Sequence[str] | None = None,
    rounds: int = GROWTH_ROUNDS,
    settings: Sequence[str] = (),
    device: str | torch.device = "cpu",
    out: str | Path = "runs/growth",
    callback: Callback | None = None,
) -> Experiment:
    """Measure what optimizers cost on GPT-2 of several sizes, and plan what does not fit the memory.

    All optimizers of a size step the same float32 weights and gradients in turns. What does not fit the free
    memory, or is not among `measured`, has its bytes from `steepest.plan` and no time: see
    `steepest.lab.bench.costs.measure_costs`. `sizes` and `measured` are names in `GROWTH_SIZES`; by default
    all are measured on an accelerator, and 125m on a CPU, where a step of Muon takes seconds.

    Returns:
        The experiment, whose `costs` are called `OPTIMIZER @ SIZE`. Optimizers that cannot be planned are
        in its `not_run` for the sizes that do not fit, also as `OPTIMIZER @ SIZE`.

    Raises:
        LabError: a bad request.
    """
    device = torch.device(device)
    if measured is None:
        measured = [*GROWTH_SIZES] if device.type != "cpu" else ["125m"]
    for size in (*sizes, *measured):
        if size not in GROWTH_SIZES:
            raise LabError(f"unknown size {size!r}: choose {', '.join(GROWTH_SIZES)}")
    if not sizes or rounds < 1:
        raise LabError("give at least one size, and at least one round")
    callback = Callback() if callback is None else callback
    specs = resolve_optimizers(optimizers, meta_model("tiny").to_empty(device="cpu"), settings)
    costs: dict[str, Cost] = {}
    not_run: dict[str, str] = {}
    for size in sizes:
        title = f"GPT-2 {size.upper()}"
        callback.message(
            f"{title}: {'measuring' if size in measured else 'planning'} {len(specs)} optimizers"
        )
        found = measure_costs(
            _model(size),
            specs,
            baseline=specs[0].label,
            name=title,
            device=device,
            rounds=rounds,
            memory=None if size in measured else 0,
        )
        costs |= {f"{label} @ {size}": cost for label, cost in found.costs.items()}
        not_run |= {f"{label} @ {size}": reason for label, reason in found.failed.items()}
    directory = parse_path(out)
    experiment = costs_experiment(
        specs,
        device,
        name=directory.name,
        kind="growth",
        title="growth with the model's size",
        task="GPT-2",
        config={"sizes": [*sizes], "measured": [*measured], "rounds": rounds, "dtype": "float32"},
        baseline=None,
        not_run=not_run,
        costs=costs,
        notes=[
            "Steps were timed in turns on the same weights and gradients; a planned peak is an upper bound."
        ],
    )
    experiment.save(directory)
    write_records(directory, [])
    return experiment


def _model(size: str) -> nn.Module:
    model = meta_model(GROWTH_SIZES[size])
    for block in model.h:  # type: ignore[union-attr]
        # Adam-mini asks for the heads, which in GPT-2 have 64 rows.
        block.attn.n_head = max(1, block.attn.c_proj.weight.shape[0] // 64)
    return model
