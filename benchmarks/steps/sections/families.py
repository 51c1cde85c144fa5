"""Muon beside torch.optim.Muon on families of shapes, from steps that are all products to almost none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

import steepest
from steepest.lab.training.clock import now
from steepest.lab.training.seeding import seeded
from steepest.model_shapes import Shape, gpt2_blocks

from ..config import BenchConfig, log
from ..results import Column, Result, Row, timed

_COLUMNS = (
    Column("family", "matrices"),
    Column("parameters", "parameters", "count"),
    Column("ms", "step, ms", "ms"),
    Column("torch_ms", "torch.optim.Muon, ms", "ms"),
    Column("times_faster", "speedup", "ratio"),
    Column("first_s", "first step, s", "ratio"),
)
_NOTE = (
    "Medians of {rounds} interleaved rounds with torch's coefficients and number of iterations; both compute "
    "in bfloat16 where that is fast, ours in float32 elsewhere. The speedup is torch's time over ours. First "
    "step: with no choices on file, so it times the ways of products (steepest.autotune). With 16 rows the "
    "products take almost no time, as they do everywhere where a machine multiplies fast: what is left are "
    "the passes over memory and the host."
)


@dataclass(frozen=True)
class Family:
    """Matrices that are stepped together."""

    name: str
    shapes: tuple[Shape, ...]

    def params(self, device: torch.device, dtype: torch.dtype) -> list[nn.Parameter]:
        """Make parameters with gradients, the same in every call."""
        with seeded(0):
            made = [
                nn.Parameter(0.02 * torch.randn(shape, device=device, dtype=dtype)) for shape in self.shapes
            ]
            for param in made:
                param.grad = 1e-3 * torch.randn_like(param)
        return made


def families(toy: bool, full: bool) -> tuple[Family, ...]:
    """Return small families if ``toy``; with ``full``, a block of a Llama of 1.1B parameters too."""
    if toy:
        return (Family("2 × 8 × 8", ((8, 8),) * 2), Family("16 × 4", ((16, 4),)))
    of_llama = ((2048, 2048), (512, 2048), (512, 2048), (2048, 2048), *[(5632, 2048)] * 2, (2048, 5632))
    return (
        Family("GPT-2 124M, 1 block", _block(768)),
        Family("GPT-2 124M, 2 blocks", _block(768) * 2),
        Family("ViT-S, 4 blocks", _block(384) * 4),
        *((Family("Llama 1.1B, 1 block", of_llama),) if full else ()),
        Family("512 × 512", ((512, 512),)),
        Family("16 of 256 × 256", ((256, 256),) * 16),
        Family("40 of 64 × 64", ((64, 64),) * 40),
        Family("24 of 128 × 512", ((128, 512),) * 24),
        Family("16 of 2048 × 64", ((2048, 64),) * 16),
        Family("12 of odd sizes", ((100, 257), (333, 129), (517, 1033), (31, 999)) * 3),
        Family("8 of 16 × 16384", ((16, 16384),) * 8),
        Family("8 of 16384 × 16", ((16384, 16),) * 8),
    )


def _block(width: int) -> tuple[Shape, ...]:
    return tuple(tensor.shape for tensor in gpt2_blocks(width, 1))


def run(config: BenchConfig) -> Iterator[Result]:
    """Yield a table with the speedup of Muon's step over torch's, by family; none if Muon is not selected."""
    if not any(case.ours and case.rule == "muon" for group in config.groups for case in group.cases):
        return
    rows: list[Row] = []
    for family in families(config.toy, config.full):
        log(f"Muon: {family.name}")
        rows.append(_row(family, config))
    title = "Families of shapes: Muon and torch.optim.Muon"
    yield Result("families", title, _COLUMNS, rows, [_NOTE.format(rounds=config.rounds)])


def _row(family: Family, config: BenchConfig) -> Row:
    ours = steepest.Muon(family.params(config.device, config.dtype), coefficients="jordan")
    theirs = torch.optim.Muon(family.params(config.device, config.dtype), adjust_lr_fn="match_rms_adamw")
    start = now(config.device)
    ours.step()
    first = now(config.device) - start
    times = config.time({"ours": ours.step, "torch": theirs.step})
    return {
        "family": family.name,
        "parameters": sum(param.numel() for param in ours.param_groups[0]["params"]),
        **timed(times["ours"]),
        "torch_ms": times["torch"].median_ms,
        "torch_quartiles_ms": times["torch"].quartiles,
        "times_faster": times["torch"].ratio(times["ours"]),
        "first_s": first,
    }
