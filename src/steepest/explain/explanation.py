"""Explain an optimizer's param groups: rows, totals, notes and warnings in one object."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steepest.explain.rows import Reasons, Row, Total, make_rows, make_totals
from steepest.explain.table import as_text
from steepest.explain.warnings import find_notes, find_warnings
from steepest.rule import Targets

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True)
class Explanation:
    """What each tensor gets, as plain data; ``str()`` makes a table that fits the terminal.

    In the table, tensors whose names differ only in numbers share one line, with ``*`` for the number:
    that is a pattern as ``steepest.build(..., overrides=..., views=...)`` take them.

    Attributes:
        rows: every tensor, in the order of the param groups.
        totals: per rule.
        notes: facts that are as they should be: tied, frozen and left-out tensors.
        warnings: likely mistakes.
    """

    rows: tuple[Row, ...]
    totals: tuple[Total, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        return self.table(shutil.get_terminal_size((110, 24)).columns)

    def table(self, width: int = 110) -> str:
        """Format the table with lines of at most ``width`` characters, but never fewer than 80."""
        return as_text(self.rows, self.totals, self.notes, self.warnings, max(width, 80))


def explain(
    groups: Sequence[Mapping[str, Any]],
    main: str,
    reasons: Reasons | None = None,
    targets: Targets | None = None,
) -> Explanation:
    """Explain an optimizer's param groups.

    Args:
        groups: the param groups, with the rule's options filled in.
        main: the name of the rule of the groups that name none.
        reasons: those of :func:`steepest.build`; None if the groups were made by hand.
        targets: what parameters stand for whose rule moves that.
    """
    reasons = reasons or Reasons()
    rows = make_rows(groups, reasons, targets)
    return Explanation(
        tuple(rows),
        make_totals(rows),
        tuple(find_notes(rows, main, reasons)),
        tuple(find_warnings(groups, rows, main, reasons)),
    )
