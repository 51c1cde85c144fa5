"""Muon beside torch.optim.Muon on families of shapes, from steps that are all products to almost none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

import steepest

from ...clock import now
from ...seeding import seeded
from ..callbacks import Callback
from ..interleaved import Timer, time_interleaved
from ..results import Column, Result, Row
from ..section import BenchConfig
from ..shapes import Shape, gpt2_blocks

_COLUMNS = (
    Column("family", "matrices"),
    Column("parameters", "parameters", "count"),
    Column("ms", "step, ms", "ms"),
    Column("torch_ms", "torch.optim.Muon, ms", "ms"),
    Column("times_faster", "speedup", "ratio"),
    Column("first_s", "first step, s", "ratio"),
    Column("reason", ""),
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


class Families:
    """A table with the speedup of Muon's step over torch's, by family."""

    name = "families"

    def work_units(self, config: BenchConfig) -> int:
        """Return the number of families, or 0 if Muon is not selected."""
        return len(families(config.toy, config.full)) if _selected(config) else 0

    def run(self, config: BenchConfig, callback: Callback) -> Iterator[Result]:
        """Yield one table."""
        if not _selected(config):
            return
        rows: list[Row] = []
        try:
            for family in families(config.toy, config.full):
                callback.on_unit_start(f"Muon: {family.name}")
                rows.append(_row(family, config))
                callback.on_unit_end()
        except KeyboardInterrupt:
            yield _result(rows, config)
            raise
        yield _result(rows, config)


def _selected(config: BenchConfig) -> bool:
    return any(case.ours and case.rule == "muon" for group in config.groups for case in group.cases)


def _result(rows: Sequence[Row], config: BenchConfig) -> Result:
    title = "Families of shapes: Muon and torch.optim.Muon"
    return Result("families", title, _COLUMNS, list(rows), [_NOTE.format(rounds=config.rounds)])


def _row(family: Family, config: BenchConfig) -> Row:
    row: Row = {
        "family": family.name,
        "parameters": sum(param.numel() for param in family.params(torch.device("meta"), config.dtype)),
        "reason": "",
    }
    ours = steepest.Muon(family.params(config.device, config.dtype), coefficients="jordan")
    theirs = torch.optim.Muon(family.params(config.device, config.dtype), adjust_lr_fn="match_rms_adamw")
    start = now(config.device)
    ours.step()
    first = now(config.device) - start
    queued = config.device.type != "cpu"
    timers = [Timer("ours", ours.step, queued=queued), Timer("torch", theirs.step, queued=queued)]
    times = time_interleaved(timers, config.rounds, lambda: now(config.device))
    if times.failed:
        return row | {"status": "failed", "reason": next(iter(times.failed.values()))}
    return row | {
        "status": "ok",
        "rounds": config.rounds,
        "ms": times.median_ms("ours"),
        "quartiles_ms": times.quartiles_ms("ours"),
        "torch_ms": times.median_ms("torch"),
        "torch_quartiles_ms": times.quartiles_ms("torch"),
        "times_faster": times.ratio("torch", "ours"),
        "first_s": first,
    }
