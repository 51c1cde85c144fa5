"""What fits into memory together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from .entry import Entry
from .material import blank
from .shapes import Tensor

# Besides their state: the copies that some make of all parameters in a step.
_ROOM_TO_STEP = 1.0


def planned_state_bytes(entry: Entry, tensors: Sequence[Tensor], dtype: torch.dtype) -> int | None:
    """Bytes of state that one of ours would keep for these tensors, counted on the meta device.

    None if the optimizer cannot be made there.

    Example:
        >>> from steepest.lab.bench.entry import ours
        >>> planned_state_bytes(ours("adamw", "eager"), [Tensor("a", (10, 10))], torch.float32)
        804
    """
    try:
        made = entry.make(blank(tensors, dtype))
    except (RuntimeError, NotImplementedError, ValueError):
        return None
    explain = getattr(made, "explain", None)
    return None if explain is None else sum(total.state_bytes for total in explain().totals)


def need(entry: Entry, tensors: Sequence[Tensor], dtype: torch.dtype) -> int:
    """Bytes that a contestant takes besides parameters and gradients, about."""
    copy = sum(tensor.numel for tensor in tensors) * dtype.itemsize
    planned = planned_state_bytes(entry, tensors, dtype) if entry.ours else None
    # Ours step in bounded memory, and so do they take little besides their state.
    return int(copy * (entry.copies + _ROOM_TO_STEP)) if planned is None else planned


def packed(
    entries: Sequence[Entry], needs: Mapping[str, int], room: int
) -> tuple[list[list[Entry]], list[Entry]]:
    """(packs that fit into `room` one after the other, entries that fit into none).

    The first that fits is in every pack, so that all are compared with it in the same rounds.

    Example:
        >>> from steepest.lab.bench.entry import ours
        >>> a, b, c = (ours("lion", "eager", label) for label in "abc")
        >>> packs, left = packed([a, b, c], {a.key: 2, b.key: 3, c.key: 9}, 6)
        >>> [[e.label for e in pack] for pack in packs], [e.label for e in left]
        ([['a', 'b']], ['c'])
    """
    fitting = [entry for entry in entries if needs[entry.key] <= room]
    left = [entry for entry in entries if needs[entry.key] > room]
    if not fitting:
        return [], left
    lead, rest = fitting[0], fitting[1:]
    free = room - needs[lead.key]
    packs: list[list[Entry]] = [[lead]]
    taken = 0
    for entry in rest:
        if needs[entry.key] > free:
            left.append(entry)
            continue
        if taken + needs[entry.key] > free:
            packs.append([lead])
            taken = 0
        packs[-1].append(entry)
        taken += needs[entry.key]
    return packs, left
