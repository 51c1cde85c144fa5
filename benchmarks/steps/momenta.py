"""Matrices on which polar factors are compared: random ones, and momenta of a small language model."""

from __future__ import annotations

import torch
from torch import Tensor

from steepest import AdamW, Muon
from steepest.lab.tasks.text import text_task
from steepest.lab.training.schedule import Schedule
from steepest.lab.training.seeding import infinite_batches, seeded

__all__ = ["momenta", "random_matrices"]

# No coefficient set has been chosen on this seed's matrices.
SEED = 17


def random_matrices(rows: int) -> dict[str, list[Tensor]]:
    """Return, by kind, a square matrix and one with three times as many columns, in float32."""
    shapes = ((rows, rows), (rows, 3 * rows))
    with seeded(SEED):
        return {
            "gaussian": [torch.randn(shape) for shape in shapes],
            "heavy-tailed": [
                torch.randn(shape) / torch.rand(shape).clamp_min(1e-4) ** 0.75 for shape in shapes
            ],
            "low rank + noise": [
                torch.randn(m, 8) @ torch.randn(8, n) / 3 + torch.randn(m, n) / 100 for m, n in shapes
            ],
        }


def momenta(width: int, steps: int) -> list[Tensor]:
    """Return what Muon orthogonalizes, u = g + β(m − g), while a GPT of two blocks learns the text task.

    They are those of all hidden matrices after a quarter, a half and all of the steps. AdamW trains the
    other parameters.
    """
    task = text_task(width=width, depth=2)
    with seeded(SEED):
        model = task.make(SEED)
        hidden = [p for name, p in model.named_parameters() if name.startswith("blocks") and p.ndim == 2]
        others = [p for p in model.parameters() if all(p is not each for each in hidden)]
        muon, adamw = Muon(hidden, lr=0.02), AdamW(others, lr=3e-3)
        schedulers = [Schedule().attach(each, steps) for each in (muon, adamw)]
        batches = infinite_batches(task, SEED)
        found: list[Tensor] = []
        for step in range(1, steps + 1):
            model.zero_grad()
            task.loss(model, next(batches)).backward()  # type: ignore[no-untyped-call]
            muon.step()
            adamw.step()
            for scheduler in schedulers:
                scheduler.step()
            if step in {steps // 4, steps // 2, steps}:
                found += [
                    _nesterov(p.grad, muon.state[p]["momentum_buffer"]) for p in hidden if p.grad is not None
                ]
    return found


def _nesterov(grad: Tensor, momentum: Tensor) -> Tensor:
    return torch.lerp(grad, momentum, 0.95)
