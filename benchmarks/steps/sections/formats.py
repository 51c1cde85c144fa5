"""Steps with low-bit state: one-byte averages and split master weights beside float32 and bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import steepest
from steepest.lab.training.clock import now
from steepest.lab.training.seeding import seeded

from ..config import BenchConfig, log
from ..results import Column, Result, Row, timed

_COLUMNS = (
    Column("optimizer", "optimizer"),
    Column("parameters", "parameters"),
    Column("state", "averages"),
    Column("master", "master"),
    Column("how", "how"),
    Column("ns", "ns / element", "ratio"),
    Column("times_float", "× float32", "ratio"),
    Column("bytes", "state B/param", "ratio"),
    Column("first_s", "first step, s", "ratio"),
)
_NOTE = (
    "Medians of {rounds} interleaved rounds over one matrix of {elements:,} elements. × float32: beside the "
    "same optimizer in the same mode with float32 parameters and averages. First step: with a compilation, "
    "or torch's cache of it. Stochastic: rounding='stochastic'."
)
_BFLOAT16 = torch.bfloat16


@dataclass(frozen=True)
class Format:
    """Dtype of the parameters, and the options that say how state and masters are stored."""

    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)

    def words(self) -> Row:
        """Return the row's cells that describe it."""
        state = self.options.get("state_dtype") or self.dtype
        kept = state if isinstance(state, str) else str(state)[6:]
        master = [self.options.get("master", ""), self.options.get("rounding", "")]
        return {"parameters": str(self.dtype)[6:], "state": kept, "master": " ".join(filter(None, master))}


FLOAT = Format()
FORMATS = (
    FLOAT,
    Format(options={"state_dtype": _BFLOAT16}),
    Format(options={"state_dtype": "int8"}),
    Format(_BFLOAT16, {"state_dtype": torch.float32, "rounding": "stochastic"}),
    Format(_BFLOAT16, {"state_dtype": "int8", "master": "split8", "rounding": "stochastic"}),
    Format(_BFLOAT16, {"state_dtype": "int8", "master": "split16"}),
)


def run(config: BenchConfig) -> Iterator[Result]:
    """Yield a table of the times of Lion and AdamW, or of the named ones of them, by format."""
    cases = [case for group in config.groups for case in group.cases if case.ours]
    side = 64 if config.toy else 4096
    rows: list[Row] = []
    for rule in ("lion", "adamw"):
        for how in ("compiled", "eager"):
            if any((case.rule, case.how) == (rule, how) for case in cases):
                log(f"formats: {rule}, {how}")
                rows += _measured(rule, how, side, config)
    note = _NOTE.format(rounds=config.rounds, elements=side**2)
    yield Result("formats", "Low-bit state and split master weights", _COLUMNS, rows, [note])


def _measured(rule: str, how: str, side: int, config: BenchConfig) -> list[Row]:
    """Return a row per format, all timed together."""
    rows: list[Row] = []
    calls: dict[str, Callable[[], object]] = {}
    for number, each in enumerate(FORMATS):
        with seeded(0):
            param = nn.Parameter(0.02 * torch.randn(side, side, device=config.device).to(each.dtype))
            param.grad = 1e-3 * torch.randn_like(param)
        optimizer = steepest.create(rule, [param], compile=how == "compiled", **each.options)
        start = now(config.device)
        optimizer.step()
        row = {"optimizer": rule, **each.words(), "how": how, "first_s": now(config.device) - start}
        rows.append(row | {"bytes": optimizer.state_bytes() / param.numel()})
        calls[str(number)] = optimizer.step
    times = list(config.time(calls).values())
    for row, timing in zip(rows, times, strict=True):
        row |= {
            **timed(timing),
            "ns": 1e6 * timing.median_ms / side**2,
            "times_float": timing.ratio(times[0]),
        }
    return rows
