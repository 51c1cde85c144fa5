"""Steps with low-bit state: one-byte averages and split master weights beside float32 and bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import steepest

from ...clock import now
from ...seeding import seeded
from ..callbacks import Callback
from ..interleaved import Timer, time_interleaved
from ..results import Column, Result, Row
from ..section import BenchConfig

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
    Column("reason", ""),
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


class Formats:
    """A table of the times of Lion and AdamW, or of the named ones of them, by format."""

    name = "formats"

    def work_units(self, config: BenchConfig) -> int:
        """Return the number of optimizers and modes."""
        return len(_selected(config)) * len(_modes(config))

    def run(self, config: BenchConfig, callback: Callback) -> Iterator[Result]:
        """Yield one table."""
        rows: list[Row] = []
        try:
            for rule in _selected(config):
                for how in _modes(config):
                    callback.on_unit_start(f"formats: {rule}, {how}")
                    rows += _measured(rule, how, config)
                    callback.on_unit_end()
        except KeyboardInterrupt:
            yield _result(rows, config)
            raise
        if rows:
            yield _result(rows, config)


def _selected(config: BenchConfig) -> list[str]:
    named = {case.rule for group in config.groups for case in group.cases if case.ours}
    return [rule for rule in ("lion", "adamw") if rule in named]


def _modes(config: BenchConfig) -> list[str]:
    found = {case.how for group in config.groups for case in group.cases if case.ours}
    return [how for how in ("compiled", "eager") if how in found]


def _side(config: BenchConfig) -> int:
    return 64 if config.toy else 4096


def _result(rows: list[Row], config: BenchConfig) -> Result:
    note = _NOTE.format(rounds=config.rounds, elements=_side(config) ** 2)
    return Result("formats", "Low-bit state and split master weights", _COLUMNS, rows, [note])


def _measured(rule: str, how: str, config: BenchConfig) -> list[Row]:
    """Return a row per format, all timed together."""
    side = _side(config)
    rows: list[Row] = []
    timers = []
    for number, each in enumerate(FORMATS):
        with seeded(0):
            param = nn.Parameter(0.02 * torch.randn(side, side, device=config.device).to(each.dtype))
            param.grad = 1e-3 * torch.randn_like(param)
        optimizer = steepest.create(rule, [param], compile=how == "compiled", **each.options)
        start = now(config.device)
        optimizer.step()
        row = {"optimizer": rule, **each.words(), "how": how, "first_s": now(config.device) - start}
        rows.append(row | {"bytes": optimizer.state_bytes() / param.numel(), "reason": ""})
        timers.append(Timer(str(number), optimizer.step, queued=config.device.type != "cpu"))
    times = time_interleaved(timers, config.rounds, lambda: now(config.device))
    for row, timer in zip(rows, timers, strict=True):
        if timer.label in times.failed:
            row |= {"status": "failed", "reason": times.failed[timer.label]}
            continue
        row |= {
            "status": "ok",
            "rounds": config.rounds,
            "ns": 1e6 * times.median_ms(timer.label) / side**2,
            "times_float": times.ratio(timer.label, timers[0].label),
        }
    return rows
