"""Compare the plans of several optimizers for one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from steepest.planning.memory import Plan, make_plan, prepare
from steepest.planning.shapes import Shapes, listed
from steepest.planning.table import comparison_table
from steepest.registry import optimizer_class
from steepest.routing.options import as_options

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement

__all__ = ["Comparison", "compare_plans"]


@dataclass(frozen=True)
class Comparison:
    """The plans of several optimizers for one model, by their labels; ``str()`` makes a table."""

    plans: Mapping[str, Plan]

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """Format a line for each optimizer, and one for ``torch.optim.AdamW``'s state as the yardstick."""
        return comparison_table(self.plans)


def compare_plans(
    model: nn.Module | Shapes,
    optimizers: Sequence[str] | Mapping[str, str | Mapping[str, Any]],
    *,
    param_dtype: torch.dtype | None = None,
    mesh: Sequence[int] | None = None,
    placements: Sequence[Placement] | None = None,
    rank: int = 0,
    device: torch.device | str | None = None,
    **options: Any,
) -> Comparison:
    """Plan a model's memory under several optimizers; nothing is allocated.

    Args:
        model: a module or names and shapes, as in :func:`steepest.plan`.
        optimizers: rules' names; or labels with a rule's name or its options including ``"rule"``.
        param_dtype, mesh, placements, rank, device: as in :func:`steepest.plan`.
        **options: arguments of :func:`steepest.build` for all of them.

    Raises:
        TypeError: an option that a rule does not know; a string in place of a list of optimizers.
        ValueError: no optimizers, or one listed twice; see also :func:`steepest.plan`.

    >>> shapes = {"embed.weight": (100, 64), "layers.0.fc.weight": (256, 64), "norm.weight": (64,)}
    >>> print(compare_plans(shapes, ["adamw", "lion", "signgsd"]))
    optimizer              state  bytes/param  of AdamW's  temporaries      total
    -----------------------------------------------------------------------------
    torch.optim.AdamW  178.5 KiB     8.001 B        100%
    adamw              178.5 KiB     8.001 B        100%  ...
    lion                89.2 KiB         4 B         50%  ...
    signgsd                  0 B         0 B          0%  ...
    """
    if isinstance(optimizers, str):
        raise TypeError(f"optimizers must be a list, such as ['muon', 'lion'], or a dict, got {optimizers!r}")
    named = dict(optimizers) if isinstance(optimizers, Mapping) else {name: name for name in optimizers}
    if not named or len(named) != len(optimizers):
        raise ValueError(f"optimizers must name at least one, and none twice, got {optimizers!r}")
    model = listed(model)
    plans = {}
    for label, value in named.items():
        chosen = as_options(f"optimizers[{label!r}]", value)
        if "rule" not in chosen:
            raise ValueError(f"optimizers[{label!r}] names no rule: {chosen!r}")
        chosen["rule"] = optimizer_class(chosen["rule"]).rule.name
        meta, where = prepare(model, param_dtype, mesh, placements, rank, device)
        plans[label] = make_plan(meta, where, {**options, **chosen})
    return Comparison(plans)
