"""Describe how processes hold parameters, and share the work on their matrices."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import Tensor

from steepest.distributed.local import is_dtensor
from steepest.engine.units import Sharding, Unit
from steepest.engine.workload import Workload, workload

__all__ = ["byte_words", "describe_sharding", "layout_words", "owner_ranks", "ranges"]


def layout_words(param: Tensor) -> str | None:
    """Return how a mesh's processes hold a parameter, as in ``"Replicate × Shard(0) of 2×4"``.

    It is ``"replicated"`` if each has all of it, and None for a plain tensor.
    """
    if not is_dtensor(param):
        return None
    if all(each.is_replicate() for each in param.placements):
        return "replicated"
    names = ["Replicate" if each.is_replicate() else _cut(each) for each in param.placements]
    return f"{' × '.join(names)} of {'×'.join(map(str, param.device_mesh.shape))}"


def _cut(placement: object) -> str:
    dim = getattr(placement, "dim", None)
    return type(placement).__name__ if dim is None else f"Shard({dim})"


def owner_ranks(units: Iterable[Unit]) -> tuple[int, ...]:
    """Return the ranks that compute a parameter's matrices; none if every replica's processes do."""
    return tuple(sorted({unit.team.ranks[unit.owner] for unit in units if unit.owner is not None}))


def ranges(numbers: Collection[int]) -> str:
    """Return numbers as text with runs abbreviated.

    >>> ranges({0, 1, 2, 3, 6, 8, 9})
    '0–3, 6, 8, 9'
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def describe_sharding(sharding: Sharding | None) -> list[str]:
    """Note for each team of processes what a step's matrices cost it."""
    if sharding is None:
        return []
    return [_sentence(workload(team, units)) for team, units in sharding.teams.items()]


def _sentence(work: Workload) -> str:
    waves = "1 wave" if work.waves == 1 else f"{work.waves} waves"
    mean, most = int(work.sent.double().mean()), int(work.sent.max())
    at_most = f" (at most {byte_words(most)})" if byte_words(most) != byte_words(mean) else ""
    return (
        f"{len(work.team)} processes share {work.units} matrices in {waves}: max/mean load "
        f"{work.balance:.2f}, and each sends {byte_words(mean)} a step{at_most}"
    )


def byte_words(count: int) -> str:
    """Return a number of bytes in the largest unit that it fills.

    >>> byte_words(640), byte_words(3 << 19)
    ('640 B', '1.5 MiB')
    """
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
