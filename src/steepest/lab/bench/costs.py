"""Measure the optimizers' steps on a model: time, peak memory and state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from textwrap import shorten
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import steepest

from ..defaults import LEAST_ROUNDS
from ..errors import LabError
from ..records import Cost
from ..training.optimizers import OptimizerSpec, trainable
from ..training.peak_memory import available_bytes, temporary_bytes
from ..training.seeding import seeded
from ..training.state_memory import state_bytes
from ..training.timing import LR_FACTOR, interleave

AXPY = "axpy"

_MEMORY_FRACTION = 0.7
# What an optimizer may need that no plan knows, in copies of the parameters: two of state, one in its step.
_UNKNOWN_COPIES = 3


@dataclass
class StepCosts:
    """The costs of the optimizers' steps, by label."""

    costs: dict[str, Cost] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    """The reason, for optimizers without costs."""
    axpy_bytes_per_second: float | None = None


def measure_costs(
    model: nn.Module,
    specs: Sequence[OptimizerSpec],
    *,
    baseline: str,
    name: str,
    device: torch.device,
    rounds: int = LEAST_ROUNDS,
    compiled: bool | None = None,
    memory: int | None = None,
    on_progress: Callable[[str, float], None] = lambda text, fraction: None,
) -> StepCosts:
    """Measure a step of each optimizer on a model's parameters, with random gradients, in turns.

    Optimizers that do not fit into memory together are measured in batches, each with the baseline. Those
    that do not fit beside the baseline are planned, if they are ours or the baseline is torch's AdamW.

    Args:
        model: The model, called `name` and on any device; it stays as it is.
        specs, baseline: The optimizers, and the label of the one with which the others are compared.
        device, rounds: Where to step, and how often.
        compiled: Whether our optimizers compile their steps; None leaves it to them.
        memory: Bytes that may be used. Default: 0.7 of what is free.
        on_progress: Receives what is being done, and the fraction of it that is done.

    Raises:
        LabError: the baseline cannot step.
    """
    found = StepCosts()
    memory = int(_MEMORY_FRACTION * available_bytes(device)) if memory is None else memory
    needs = {}
    for spec in specs:
        on_progress(f"planning {spec.label}", 0.0)
        needs[spec.label], planned = _plan(model, spec, name, device)
        if planned is not None:
            found.costs[spec.label] = planned
    weights = sum(2 * p.nbytes for p in trainable(model))
    batches = _batches(specs, needs, baseline, memory - weights)
    measured = {spec.label for batch in batches for spec in batch}
    if batches:
        params = _Params(model, device)
        for batch in batches:
            _measure(found, batch, params, baseline, name, rounds, compiled, on_progress)
    for label in [label for label in needs if label not in measured | found.costs.keys()]:
        need = (weights + needs[label]) / 2**30
        found.failed[label] = f"needs about {need:.1f} GiB, of which {memory / 2**30:.1f} may be used"
    if baseline in found.failed and baseline in measured:
        raise LabError(f"the baseline cannot step: {found.failed[baseline]}")
    found.costs = {spec.label: found.costs[spec.label] for spec in specs if spec.label in found.costs}
    return found


def _plan(model: nn.Module, spec: OptimizerSpec, name: str, device: torch.device) -> tuple[int, Cost | None]:
    """Return the bytes that an optimizer needs beside parameters and gradients, and its planned cost."""
    params = trainable(model)
    torchs = spec.entry == "torch.optim:AdamW"
    try:
        if ":" in spec.entry and not torchs:
            raise ValueError("not ours")
        plan = steepest.plan(model, "adamw" if torchs else spec.entry, device=device, **dict(spec.settings))
    except (TypeError, ValueError, RuntimeError, NotImplementedError):
        return _UNKNOWN_COPIES * sum(p.nbytes for p in params), None
    state = plan.adamw_bytes if torchs else plan.state_bytes
    need = state + (sum(p.nbytes for p in model.parameters()) if torchs else plan.temporary_bytes)
    return need, Cost(
        optimizer=spec.label,
        model=name,
        parameters=sum(p.numel() for p in params),
        state_bytes=state,
        optimizer_ms=None,
        peak_bytes=None if torchs else need,
        planned=True,
    )


def _batches(
    specs: Sequence[OptimizerSpec], needs: dict[str, int], baseline: str, limit: int
) -> list[list[OptimizerSpec]]:
    """Return optimizers that fit into memory together; the baseline, if it fits, is in every batch."""
    base = [spec for spec in specs if spec.label == baseline and needs[baseline] <= limit]
    left = limit - sum(needs[spec.label] for spec in base)
    batches: list[list[OptimizerSpec]] = []
    room = 0
    for spec in specs:
        if spec.label == baseline or needs[spec.label] > left:
            continue
        if not batches or needs[spec.label] > room:
            batches.append([*base])
            room = left
        batches[-1].append(spec)
        room -= needs[spec.label]
    return batches or [base] * bool(base)


class _Params:
    """A copy of a model with random parameters and gradients, which all optimizers share."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.device = device
        with seeded(0):
            # In a deep copy, what the memo has replaces the original wherever it occurs: ties stay.
            self.model = copy.deepcopy(model, {id(p): _random(p, device) for p in model.parameters()})
            self.params = trainable(self.model)
            self.grads = [torch.empty_like(p, requires_grad=False).normal_(0, 0.1) for p in self.params]

    def set_grads(self) -> None:
        """Set the gradients, which some optimizers remove."""
        for param, grad in zip(self.params, self.grads, strict=True):
            param.grad = grad

    def axpy(self) -> None:
        """Compute p ← p + a·g, the memory traffic of sign descent with the least arithmetic."""
        torch._foreach_add_([p.detach() for p in self.params], self.grads, alpha=1e-9)


def _random(param: nn.Parameter, device: torch.device) -> nn.Parameter:
    data = torch.zeros_like(param, device=device, requires_grad=False)
    if data.is_floating_point():
        data.normal_(0, 0.02)
    return nn.Parameter(data, requires_grad=param.requires_grad)


def _measure(
    found: StepCosts,
    batch: Sequence[OptimizerSpec],
    params: _Params,
    baseline: str,
    name: str,
    rounds: int,
    compiled: bool | None,
    on_progress: Callable[[str, float], None],
) -> None:
    device = params.device
    optimizers: dict[str, Optimizer] = {}
    temporaries: dict[str, int] = {}
    calls: dict[str, Callable[[], object]] = {AXPY: params.axpy}
    setup: dict[str, Callable[[], object]] = {}
    for number, spec in enumerate(batch):
        on_progress(f"first steps of {spec.label}", number / len(batch))
        found.costs.pop(spec.label, None)
        values: dict[str, Any] = {"lr": spec.default_lr * LR_FACTOR}
        if compiled is not None and ":" not in spec.entry:
            values["compile"] = compiled
        try:
            optimizer = spec.build(params.model, values)
            for _ in range(2):
                params.set_grads()
                optimizer.step()
            params.set_grads()
            temporaries[spec.label] = temporary_bytes(optimizer.step, device)
        except Exception as error:  # anybody's optimizer may raise anything
            found.failed[spec.label] = shorten(f"{type(error).__name__}: {error}", 160, placeholder="...")
            continue
        optimizers[spec.label] = optimizer
        calls[spec.label] = optimizer.step
        if any(p.grad is not g for p, g in zip(params.params, params.grads, strict=True)):
            setup[spec.label] = params.set_grads
    params.set_grads()
    times = interleave(
        calls,
        device=device,
        rounds=rounds,
        setup=setup,
        on_round=lambda done: on_progress("timing in turns", done),
    )
    nbytes = sum(grad.nbytes for grad in params.grads)
    found.axpy_bytes_per_second = 3 * nbytes / times[AXPY].median_ms * 1e3
    for label, optimizer in optimizers.items():
        state = state_bytes(optimizer)
        found.costs[label] = Cost(
            optimizer=label,
            model=name,
            parameters=sum(p.numel() for p in params.params),
            state_bytes=state,
            optimizer_ms=times[label].median_ms,
            optimizer_ms_quartiles=times[label].quartiles,
            peak_bytes=state + temporaries[label],
            ratio=times[label].ratio(times[baseline]) if baseline in optimizers else None,
            bandwidth=(3 * nbytes + 2 * state) / (3 * nbytes) * times[AXPY].ratio(times[label]),
        )
