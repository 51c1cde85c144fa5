"""Eager passes: chunk by chunk, so that temporaries stay small and in the caches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from steepest.engine.layout import Extent, Row, pieces
from steepest.engine.multi_tensor import SMALL, run_together
from steepest.engine.update import Pass, PieceNoise, UpdateConfig, pass_over, store

__all__ = ["chunk_length", "run_eager"]

# What the temporaries of a chunk may take together. Chunks of several MiB are slower where malloc gives their
# memory back to the system and fetches it anew. An accelerator waits for the host where an operation is over
# before the next is launched, after some 5 µs: at 3 TB/s that is a million elements.
_BYTES_ON_CPU = 1 << 20
_BYTES_ELSEWHERE = 1 << 27

# Words that noise is mixed from, for each element.
_NOISE_BYTES = 32

# Besides what grows with the chunk.
_SPARE = 1 << 12

_GRAIN = 256


def chunk_length(config: UpdateConfig, columns: Sequence[Tensor], *, joined: bool = False) -> int:
    """How many elements a chunk of these columns has, so that its temporaries stay within bounds.

    ``joined`` says that the chunk itself is a temporary: it is put together of several tensors.
    """
    room = _BYTES_ON_CPU if config.device.type == "cpu" else _BYTES_ELSEWHERE
    # What is cast is a temporary, and so is the parameter after weight decay, and a negated gradient.
    held = config.rule.temporaries + sum([column.dtype != config.compute for column in columns])
    held += config.maximize + config.decays * (3 if config.method == "cautious" else 1)
    each = config.compute.itemsize * held + _NOISE_BYTES * config.noisy
    if joined:
        each += sum([column.element_size() for column in columns])
    return max(1, (room - _SPARE) // each // _GRAIN) * _GRAIN


def run_eager(
    which: Pass, config: UpdateConfig, rows: Sequence[Row], numbers: Mapping[str, Any], finite: Tensor | None
) -> None:
    """Run a pass over rows, small ones of the same numbers and dtypes together.

    Args:
        which, config: see :func:`~steepest.engine.update.pass_over`.
        rows: each of one shape.
        numbers: those that all rows share.
        finite: where only the device knows whether the step is taken: 0-dim bool.
    """
    decays = config.decays
    small: dict[Any, list[Row]] = {}
    for row in rows:
        columns = row.columns
        if 0 < columns[0].numel() <= SMALL and not config.noisy:
            # Rows with numbers that only a device knows run alone: tensors differ by identity.
            dtypes = tuple([column.dtype for column in columns])
            small.setdefault((tuple(row.scalars.items()), dtypes), []).append(row)
            continue
        scalars = {**numbers, **row.scalars}
        for piece, extent in pieces(row, chunk_length(config, columns), ordered=config.noisy):
            _run_piece(which, config, decays, finite, scalars, row.key, extent, piece)
    for (own, _), alike in small.items():
        run = partial(_run_piece, which, config, decays, finite, {**numbers, **dict(own)}, None, None)
        if len(alike) == 1:
            columns = alike[0].columns
            # A tensor without dimensions would take the dtype of the numbers that it meets.
            run(columns if columns[0].dim() else [column.view(1) for column in columns])
        else:
            _run_small(which, config, alike, run)


def _run_small(
    which: Pass, config: UpdateConfig, rows: list[Row], run: Callable[[list[Tensor]], None]
) -> None:
    """Run a pass over small rows of the same numbers, joined."""
    joinable = []
    for row in rows:
        columns = row.flat(ordered=False)
        if columns is None:
            run(row.columns)
        else:
            joinable.append(columns)
    if joinable:
        written = [at for at in range(len(joinable[0])) if at != 1 and (at > 0 or which != "before")]
        run_together(joinable, chunk_length(config, joinable[0], joined=True), run, written)


def _run_piece(
    which: Pass,
    config: UpdateConfig,
    decays: bool,
    finite: Tensor | None,
    scalars: Mapping[str, Any],
    key: Any,
    extent: Extent | None,
    columns: list[Tensor],
) -> None:
    # A function of its own: a loop's variables would hold one piece's results while the next is computed.
    noise = PieceNoise(key, None if extent is None else partial(_places, extent, columns[0]))
    new = pass_over(which, config, columns, scalars, noise, decays=decays, donate=finite is None)
    kept = 2 + len(config.element_state)
    for at, value in enumerate(new):
        # A donated entry that was overwritten is in its place already. Buffers hold nothing to keep.
        if value is not None and value is not columns[at]:
            store(columns[at], value, finite if at < kept else None)


def _places(extent: Extent, column: Tensor) -> Tensor:
    return extent.places(column.shape, column.device)
