"""Run the bench: resolve the optimizers, measure their steps, and leave an experiment on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from steepest.model_shapes import MODELS, model_shapes

from ..defaults import BENCH_BASELINE, BENCH_OPTIMIZERS, LEAST_ROUNDS
from ..errors import LabError
from ..records import EXPERIMENT_FILE, Experiment, Metric, OptimizerEntry
from ..training import machine
from ..training.optimizers import OptimizerSpec, resolve_optimizers, trainable
from .costs import StepCosts, measure_costs
from .models import meta_model


def bench(
    model: str = "gpt2-124m",
    optimizers: Sequence[str] = BENCH_OPTIMIZERS,
    *,
    baseline: str = BENCH_BASELINE,
    settings: Sequence[str] = (),
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    rounds: int = LEAST_ROUNDS,
    compiled: bool | None = None,
    out: Path | None = None,
    **options: Any,
) -> tuple[Experiment, StepCosts]:
    """Measure the optimizers' steps on a model.

    Args:
        model, dtype: A name of `MODELS`, a file of shapes, or `package.module:factory`; see `meta_model`.
        optimizers, settings: See `resolve_optimizers`.
        baseline: What the user has now, as an entry of `optimizers`.
        out: Where `experiment.json` goes, if anywhere.
        device, rounds, compiled, options: See `measure_costs`.

    Raises:
        LabError: the request is invalid, the baseline cannot step, or `out` holds another experiment.
    """
    device = torch.device(device)
    if out is not None and (out / EXPERIMENT_FILE).exists() and Experiment.load(out).kind != "bench":
        raise LabError(f"{out} holds another experiment: choose another directory")
    entries = [baseline, *(entry for entry in optimizers if entry != baseline)]
    # The user's model may be too large to be built, so the names are checked on another.
    specs = resolve_optimizers(entries, nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), settings)
    made = meta_model(model, dtype)
    found = measure_costs(
        made,
        specs,
        baseline=specs[0].label,
        name=model,
        device=device,
        rounds=rounds,
        compiled=compiled,
        **options,
    )
    params = trainable(made)
    numel = sum(p.numel() for p in params)
    dtypes = ", ".join(dict.fromkeys(str(p.dtype).removeprefix("torch.") for p in params))
    title = model_shapes(model).title if model in MODELS else model
    notes = ["Peak: what a step holds beside parameters and gradients, state included."]
    if found.axpy_bytes_per_second is not None:
        notes = [
            f"Medians of {rounds} rounds in which all optimizers take turns, on random gradients.",
            *notes,
            "Bandwidth: the bytes that a step must move over its time, as a share of the "
            f"{found.axpy_bytes_per_second / 1e9:.1f} GB/s of p + a·g over the same tensors.",
        ]
    experiment = costs_experiment(
        specs,
        device,
        name=out.name if out else "bench",
        kind="bench",
        title=f"A step on {title}: {numel:,} parameters in {len(params)} tensors, {dtypes}",
        task=model,
        config={"rounds": rounds, "dtype": dtypes, "compile": compiled},
        baseline=specs[0].label,
        not_run=found.failed,
        costs=found.costs,
        notes=notes,
    )
    if out is not None:
        experiment.save(out)
    return experiment, found


def costs_experiment(specs: Sequence[OptimizerSpec], device: torch.device, **fields: Any) -> Experiment:
    """Return an experiment that measured steps and trained nothing; `fields` are its other fields."""
    return Experiment(
        metrics=[Metric(name="step", unit="ms")],
        steps=0,
        schedule="",
        trials=0,
        search_seed=0,
        seeds=[],
        optimizers={
            spec.label: OptimizerEntry(entry=spec.entry, hyperparameters=dict(spec.hyperparameters), space={})
            for spec in specs
        },
        **machine.provenance(device),
        **fields,
    )
