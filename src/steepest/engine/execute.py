"""How a pass runs: compiled where that was wished and can be, eagerly elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from steepest.engine.chunks import run_eager
from steepest.engine.compiled import launches, run_compiled
from steepest.engine.layout import Row
from steepest.engine.update import Pass, UpdateConfig

__all__ = ["execute"]


def execute(
    which: Pass,
    config: UpdateConfig,
    rows: Sequence[Row],
    numbers: Mapping[str, Any],
    finite: Tensor | None,
    compiled: bool,
) -> None:
    """Run a pass over rows, see :func:`~steepest.engine.update.pass_over`.

    Args:
        which, config: what to run.
        rows: each of one shape.
        numbers: those that all rows share.
        finite: 0-dim bool where only the device knows whether the step is taken.
        compiled: whether to run compiled code.
    """
    left: Sequence[Row] = rows
    if compiled:
        made, left = launches(which, config, rows, numbers, finite is not None)
        run_compiled(made, finite)
    if left:
        run_eager(which, config, left, numbers, finite)
