"""Format plans as plain text."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from steepest.explain import byte_words, starred

if TYPE_CHECKING:
    from steepest.planning.memory import Plan, PlanRow
    from steepest.planning.sharded import PlannedUnit, ShardedPlan

__all__ = ["aligned", "comparison_table", "meshes_table", "owners_table", "plan_table"]


def plan_table(plan: Plan, width: int) -> str:
    """Format the rows of a plan, those that differ only in numbers together, and its sums."""
    together: dict[tuple[object, ...], list[PlanRow]] = {}
    for row in plan.rows:
        key = (starred(row.name), row.shape, row.rule, row.state, row.master, row.frozen, row.moved)
        together.setdefault(key, []).append(row)
    lines = [("tensor", "shape", "rule", "stored as", "state", "bytes/param", "AdamW")]
    notes: dict[str, list[str]] = {}
    larger = []
    for alike in together.values():
        row = alike[0]
        name = row.name if len(alike) == 1 else f"{starred(row.name)} ({len(alike)})"
        stored = " + ".join(filter(None, (row.state, row.master))) + ("frozen" if row.frozen else "")
        state, adamw = (sum(getattr(each, f"{of}_bytes") for each in alike) for of in ("state", "adamw"))
        numel = max(1, sum(each.numel for each in alike))
        shape = "×".join(map(str, row.shape)) or "scalar"
        cells = (byte_words(state), f"{state / numel:.4g} B", byte_words(adamw))
        lines.append((name, shape, row.rule, stored, *cells))
        if row.moved:
            notes.setdefault(row.moved, []).append(name)
        if state > 1.01 * adamw:  # counts of a few bytes do not matter
            larger.append(name)
    made = aligned(lines, left=4)
    made += ["", *_sums(plan)]
    texts = [f"{', '.join(names)}: {moved}" for moved, names in notes.items()]
    if larger:
        texts.append(f"more state than AdamW's: {', '.join(larger)}")
    for text in texts:
        made += textwrap.wrap(text, width, subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(line.rstrip() for line in made)


def _sums(plan: Plan) -> list[str]:
    share = f" ({plan.state_bytes / plan.adamw_bytes:.0%} of AdamW's)" if plan.adamw_bytes else ""
    each = plan.state_bytes / max(1, plan.parameters)
    lines = [
        ("parameters", byte_words(plan.parameter_bytes), f"{plan.parameters:,}"),
        ("gradients", byte_words(plan.gradient_bytes), ""),
        ("state", byte_words(plan.state_bytes), f"{each:.4g} B per parameter{share}"),
        ("temporaries", byte_words(plan.temporary_bytes), "at most, during a step"),
    ]
    host = plan.host_bytes + plan.host_temporary_bytes
    if host:
        lines.append(("in host memory", byte_words(host), "state, and the temporaries of its step"))
    budget = "" if plan.budget is None else f"of {byte_words(plan.budget)}"
    lines.append(("total", byte_words(plan.total_bytes), budget or "without activations"))
    sizes = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [f"{what:{sizes[0]}}  {size:>{sizes[1]}}  {note}" for what, size, note in lines]


def comparison_table(plans: Mapping[str, Plan]) -> str:
    """Format a line for each plan, below one for ``torch.optim.AdamW``."""
    first = next(iter(plans.values()))
    adamw, numel = first.adamw_bytes, max(1, first.parameters)
    lines: list[tuple[str, ...]] = [
        ("optimizer", "state", "bytes/param", "of AdamW's", "temporaries", "total")
    ]
    lines.append(("torch.optim.AdamW", byte_words(adamw), f"{adamw / numel:.4g} B", "100%", "", ""))
    for label, plan in plans.items():
        share = f"{plan.state_bytes / adamw:.0%}" if adamw else ""
        sizes = map(byte_words, (plan.temporary_bytes, plan.total_bytes))
        each = f"{plan.state_bytes / numel:.4g} B"
        lines.append((label, byte_words(plan.state_bytes), each, share, *sizes))
    return "\n".join(line.rstrip() for line in aligned(lines, left=1))


def owners_table(plan: ShardedPlan, width: int = 110) -> str:
    """Format a line for each matrix, those whose names differ only in numbers together, and their owners."""
    together: dict[tuple[str, tuple[int, ...]], list[PlannedUnit]] = {}
    for unit in plan.units:
        together.setdefault((starred(unit.name), unit.shape), []).append(unit)
    lines: list[tuple[str, ...]] = [("matrix", "shape", "Gflop each")]
    owners = ["owners"]
    for (name, shape), units in together.items():
        label = units[0].name if len(units) == 1 else f"{name} ({len(units)})"
        lines.append((label, "×".join(map(str, shape)), _digits(units[0].cost / 1e9)))
        owners.append(" ".join(str(unit.owner) for unit in units if unit.owner is not None) or "all")
    head, rule, *rows = aligned(lines, left=2)
    made = [f"{head}  {owners[0]}", rule + "-" * (2 + len(owners[0]))]
    for row, ranks in zip(rows, owners[1:], strict=True):
        made += textwrap.wrap(f"{row}  {ranks}", width, subsequent_indent="    ")
    return "\n".join(made)


def meshes_table(plans: Mapping[str, ShardedPlan], flops: float, near: float, far: float) -> str:
    """Format a line for each mesh; devices compute ``flops`` and send ``near`` and ``far`` bytes a second."""
    times = ("compute, ms", "exchange, ms", "everywhere, ms")
    lines: list[tuple[str, ...]] = [
        ("mesh", "replicas", "waves", "max/mean load", "sent", "most in a wave", *times)
    ]
    for mesh, plan in plans.items():
        work = plan.work
        seconds = (
            plan.compute_seconds(flops),
            plan.exchange_seconds(near, far),
            plan.everywhere_seconds(flops),
        )
        sizes = (byte_words(round(plan.sent)), byte_words(work.working_bytes))
        counts = (str(plan.replicas), str(work.waves), f"{work.balance:.2f}")
        lines.append((mesh, *counts, *sizes, *(_digits(1e3 * each) for each in seconds)))
    return "\n".join(aligned(lines, left=1))


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def aligned(lines: Sequence[tuple[str, ...]], left: int) -> list[str]:
    """Align columns, the first ``left`` of them to the left, with a rule below the first line."""
    sizes = [max(map(len, column)) for column in zip(*lines, strict=True)]
    made = [
        "  ".join(
            cell.ljust(size) if at < left else cell.rjust(size)
            for at, (cell, size) in enumerate(zip(line, sizes, strict=True))
        )
        for line in lines
    ]
    made.insert(1, "-" * (sum(sizes) + 2 * (len(sizes) - 1)))
    return made
