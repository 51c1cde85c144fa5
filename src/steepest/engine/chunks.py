"""Run element passes eagerly, chunk by chunk, so that temporaries stay small and cached."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from steepest.engine.layout import Extent, Row, chunks_of
from steepest.engine.multi_tensor import SMALL, run_together
from steepest.engine.update import NO_NOISE, ChunkNoise, Pass, UpdateConfig, element_pass, store

__all__ = ["chunk_bytes", "chunk_length", "run_eager"]

# Bound on all temporaries of one chunk. Chunks of several MiB are slower where malloc returns their
# memory to the system and requests it again. An accelerator idles if an operation ends
# before the host launches the next one, some 5 µs later: at 3 TB/s that is a million elements.
_BYTES_ON_CPU = 1 << 20
_BYTES_ELSEWHERE = 1 << 27

# Integer temporaries of noise per element, besides two values in the compute dtype. Rounding draws its own
# noise while the result is still held.
_NOISE_BYTES = 12
_ROUNDING_BYTES = 12

# Key words, places and numbers of each element, where rows with noise run together.
_KEY_BYTES = 40

# Temporaries whose size does not depend on the chunk.
_SPARE = 1 << 12

_GRAIN = 256


def chunk_length(config: UpdateConfig, dtypes: Sequence[torch.dtype], *, joined: bool = False) -> int:
    """Return the number of elements per chunk that keeps temporaries within bounds.

    ``dtypes`` are those of the columns. With ``joined``, the chunk itself is a temporary too.
    """
    room = _BYTES_ON_CPU if config.device.type == "cpu" else _BYTES_ELSEWHERE
    return max(1, (room - _SPARE) // _bytes_each(config, dtypes, joined) // _GRAIN) * _GRAIN


def chunk_bytes(
    config: UpdateConfig, dtypes: Sequence[torch.dtype], numel: int, *, joined: bool = False
) -> int:
    """Return a bound on the temporaries of an eager pass over ``numel`` elements."""
    count = min(numel, chunk_length(config, dtypes, joined=joined))
    return _SPARE + count * _bytes_each(config, dtypes, joined) if numel else 0


def _bytes_each(config: UpdateConfig, dtypes: Sequence[torch.dtype], joined: bool) -> int:
    """Return the bytes of temporaries per element of a chunk."""
    # Casts, the decayed parameter and the negated gradient are temporaries too.
    held = config.rule.temporaries + sum([dtype != config.compute for dtype in dtypes])
    held += config.maximize + config.decays * (3 if config.method == "cautious" else 1)
    # Codes and corrections are read and written beside what the rule holds at the same time.
    held += 2 * config.noisy + len(config.storage.ranges) + (config.storage.correction is not None)
    each = config.compute.itemsize * held + _NOISE_BYTES * config.noisy + _ROUNDING_BYTES * config.rounds
    if joined:
        each += sum([dtype.itemsize for dtype in dtypes]) + _KEY_BYTES * config.noisy
        each += config.compute.itemsize * len(config.rule.spreads)
    return each


def run_eager(
    which: Pass, config: UpdateConfig, rows: Sequence[Row], numbers: Mapping[str, Any], finite: Tensor | None
) -> None:
    """Run a pass over rows; small rows with the same numbers and dtypes run together.

    Args:
        which, config: see :func:`~steepest.engine.update.element_pass`.
        rows: each of one shape.
        numbers: those that all rows share.
        finite: 0-dim bool if only the device knows whether the step is taken, else None.
    """
    decays, noisy, kept = config.decays, config.noisy, 2 + len(config.element_state)
    # What a graph captures may not copy from the host, as joined keys and numbers must.
    on_host = config.device.type == "cpu" and not config.counts_on_device
    joins = on_host or not noisy
    spreads = config.rule.spreads if on_host else frozenset()
    batches: dict[Any, list[Row]] = {}
    last: Mapping[str, Any] | None = None
    own: tuple[Any, ...] = ()
    for row in rows:
        # Most rows share one mapping.
        if row.scalars is not last:
            last, own = row.scalars, tuple(row.scalars.items())
        # Tensors compare by identity here, so rows with numbers on a device run alone.
        apart = bool(spreads) and row.columns[0].numel() <= SMALL
        known = tuple([each for each in own if each[0] not in spreads]) if apart else own
        key = (known, row.dtypes or tuple([column.dtype for column in row.columns]), apart)
        batches.setdefault(key, []).append(row)

    def runner(own: Mapping[str, Any]) -> Callable[..., None]:
        step = element_pass(which, config, {**numbers, **own}, decays=decays, donate=finite is None)
        return partial(_run_chunk, step, finite, kept)

    for (_, dtypes, apart), alike in batches.items():
        run = runner(alike[0].scalars)
        small: list[Row] = []
        limit = 0
        for row in alike:
            if apart and len(alike) > 1 and row.block is not None:
                run = runner(row.scalars)
            numel = row.columns[0].numel()
            if numel <= SMALL and joins and row.block is None:
                if numel > 0:
                    small.append(row)
                continue
            limit = limit or chunk_length(config, dtypes)
            if numel <= limit and not noisy:
                run(row.columns, NO_NOISE)
                continue
            for chunk, extent in chunks_of(row, limit, ordered=noisy):
                run(chunk, _noise_of(row, extent, chunk[0]) if noisy else NO_NOISE)
        if len(small) == 1 and not noisy:
            # A 0-dim tensor would be promoted to the dtype of 0-dim scalars.
            columns = small[0].columns
            run(columns if columns[0].dim() else [column.view(1) for column in columns], NO_NOISE)
        elif small:
            written = [at for at in range(len(dtypes)) if at != 1 and (at > 0 or which != "before")]
            join = partial(_joined_numbers, spreads, config.compute) if apart else None
            _run_small(small, chunk_length(config, dtypes, joined=True), runner, written, noisy, join)


def _run_small(
    rows: list[Row],
    limit: int,
    runner: Callable[[Mapping[str, Any]], Callable[..., None]],
    written: list[int],
    noisy: bool,
    join: Callable[[list[Row]], dict[str, Any]] | None,
) -> None:
    """Run small rows together; ``join`` joins their own numbers, None if all have the same."""
    shared = runner(rows[0].scalars)
    joinable, joined = [], []
    for row in rows:
        columns = row.flats or row.flat(ordered=noisy)
        if columns is None:
            run = shared if join is None else runner(row.scalars)
            for chunk, extent in chunks_of(row, SMALL, ordered=noisy):
                run(chunk, _noise_of(row, extent, chunk[0]) if noisy else NO_NOISE)
        else:
            joinable.append(columns)
            joined.append(row)

    def step(columns: list[Tensor], which: slice) -> None:
        several = joined[which]
        run = shared if join is None else runner(join(several))
        run(columns, _joined_noise(several) if noisy else NO_NOISE)

    run_together(joinable, limit, step, written)


def _joined_numbers(names: Iterable[str], dtype: torch.dtype, rows: list[Row]) -> dict[str, Any]:
    """Return the numbers of rows joined end to end, those with these names for each element."""
    lengths = torch.tensor([row.columns[0].numel() for row in rows], device="cpu")
    numbers = dict(rows[0].scalars)
    for name in names:
        own = [row.scalars[name] for row in rows]
        is_tensor = isinstance(own[0], Tensor)
        each = torch.stack(own).to(dtype) if is_tensor else torch.tensor(own, dtype=dtype, device="cpu")
        numbers[name] = each.repeat_interleave(lengths)
    return numbers


def _noise_of(row: Row, extent: Extent, column: Tensor) -> ChunkNoise:
    return ChunkNoise(row.key, partial(_places, extent, column))


def _joined_noise(rows: list[Row]) -> ChunkNoise:
    """Return the noise of rows joined end to end: each element has its row's key, and its place in there."""
    sizes = [row.columns[0].numel() for row in rows]
    lengths, total = torch.tensor(sizes, device="cpu"), sum(sizes)
    ends = list(accumulate(sizes))
    starts = [row.extent.start if row.extent else 0 for row in rows]
    shifts = [start - end + size for start, end, size in zip(starts, ends, sizes, strict=True)]
    keys = [row.key for row in rows if row.key is not None]
    words = [torch.tensor([key[at] for key in keys], device="cpu") for at in range(2)]
    first, second, shift = (
        each.repeat_interleave(lengths, output_size=total)
        for each in (*words, torch.tensor(shifts, device="cpu"))
    )
    return ChunkNoise((first, second), lambda: shift.add_(torch.arange(total, device="cpu")))


def _run_chunk(
    step: Callable[..., list[Tensor | None]],
    finite: Tensor | None,
    kept: int,
    columns: list[Tensor],
    noise: ChunkNoise,
) -> None:
    # A separate function, because loop variables would keep one chunk's results alive during the next.
    for at, value in enumerate(step(columns, noise)):
        # Donated columns are already updated in place. The mask does not apply to buffers.
        if value is not None and value is not columns[at]:
            store(columns[at], value, finite if at < kept else None)


def _places(extent: Extent, column: Tensor) -> Tensor:
    return extent.places(column.shape, column.device)
