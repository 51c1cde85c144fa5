"""Eager passes: chunk by chunk, so that temporaries stay small and in the caches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from steepest.engine.layout import Extent, Row, pieces
from steepest.engine.multi_tensor import SMALL, run_together
from steepest.engine.update import NO_NOISE, Pass, PieceNoise, UpdateConfig, element_pass, store

__all__ = ["chunk_length", "run_eager"]

# What the temporaries of a chunk may take together. Chunks of several MiB are slower where malloc gives their
# memory back to the system and fetches it anew. An accelerator waits for the host where an operation is over
# before the next is launched, after some 5 µs: at 3 TB/s that is a million elements.
_BYTES_ON_CPU = 1 << 20
_BYTES_ELSEWHERE = 1 << 27

# Words that noise is mixed from, for each element, besides two numbers in the compute dtype; rounding draws
# its own while the result is held too.
_NOISE_BYTES = 12
_ROUNDING_BYTES = 12

# Besides what grows with the chunk.
_SPARE = 1 << 12

_GRAIN = 256


def chunk_length(config: UpdateConfig, dtypes: Sequence[torch.dtype], *, joined: bool = False) -> int:
    """How many elements a chunk of columns of these dtypes has, so that its temporaries stay within bounds.

    ``joined`` says that the chunk itself is a temporary: it is put together of several tensors.
    """
    room = _BYTES_ON_CPU if config.device.type == "cpu" else _BYTES_ELSEWHERE
    # What is cast is a temporary, and so is the parameter after weight decay, and a negated gradient.
    held = config.rule.temporaries + sum([dtype != config.compute for dtype in dtypes])
    held += config.maximize + config.decays * (3 if config.method == "cautious" else 1)
    held += 2 * config.noisy
    each = config.compute.itemsize * held + _NOISE_BYTES * config.noisy + _ROUNDING_BYTES * config.rounds
    if joined:
        each += sum([dtype.itemsize for dtype in dtypes])
    return max(1, (room - _SPARE) // each // _GRAIN) * _GRAIN


def run_eager(
    which: Pass, config: UpdateConfig, rows: Sequence[Row], numbers: Mapping[str, Any], finite: Tensor | None
) -> None:
    """Run a pass over rows, small ones of the same numbers and dtypes together.

    Args:
        which, config: see :func:`~steepest.engine.update.element_pass`.
        rows: each of one shape.
        numbers: those that all rows share.
        finite: where only the device knows whether the step is taken: 0-dim bool.
    """
    decays, noisy, kept = config.decays, config.noisy, 2 + len(config.element_state)
    batches: dict[Any, list[Row]] = {}
    for row in rows:
        # Rows with numbers that only a device knows run alone: tensors differ by identity.
        key = (tuple(row.scalars.items()), tuple([column.dtype for column in row.columns]))
        batches.setdefault(key, []).append(row)
    for (own, dtypes), alike in batches.items():
        step = element_pass(which, config, {**numbers, **dict(own)}, decays=decays, donate=finite is None)
        run = partial(_run_piece, step, finite, kept)
        small: list[Row] = []
        limit = 0
        for row in alike:
            numel = row.columns[0].numel()
            if numel <= SMALL and not noisy:
                if numel > 0:
                    small.append(row)
                continue
            limit = limit or chunk_length(config, dtypes)
            if numel <= limit and not noisy:
                run(row.columns, NO_NOISE)
                continue
            for piece, extent in pieces(row, limit, ordered=noisy):
                run(piece, PieceNoise(row.key, partial(_places, extent, piece[0])) if noisy else NO_NOISE)
        if len(small) == 1:
            # A tensor without dimensions would take the dtype of the numbers that it meets.
            run([column if column.dim() else column.view(1) for column in small[0].columns], NO_NOISE)
        elif small:
            written = [at for at in range(len(dtypes)) if at != 1 and (at > 0 or which != "before")]
            _run_small(small, chunk_length(config, dtypes, joined=True), run, written)


def _run_small(rows: list[Row], limit: int, run: Callable[..., None], written: list[int]) -> None:
    joinable = []
    for row in rows:
        columns = row.flat(ordered=False)
        if columns is None:
            run(row.columns, NO_NOISE)
        else:
            joinable.append(columns)
    run_together(joinable, limit, partial(run, noise=NO_NOISE), written)


def _run_piece(
    step: Callable[..., list[Tensor | None]],
    finite: Tensor | None,
    kept: int,
    columns: list[Tensor],
    noise: PieceNoise,
) -> None:
    # A function of its own: a loop's variables would hold one piece's results while the next is computed.
    for at, value in enumerate(step(columns, noise)):
        # What was donated and overwritten is in its place already. Buffers hold nothing to keep.
        if value is not None and value is not columns[at]:
            store(columns[at], value, finite if at < kept else None)


def _places(extent: Extent, column: Tensor) -> Tensor:
    return extent.places(column.shape, column.device)
