"""Choose among ways to compute the same thing by timing them once, and remember the choice.

Which library, batching or blocking is fastest differs between processors by factors, and no rule of thumb
holds on all of them. Ways sum in different orders, so a choice changes the last bits of results: it is made
once, kept for the process, and kept in a file, so that a run that is resumed on the same machine repeats it.
"""

from __future__ import annotations

import functools
import json
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch

__all__ = ["AutotuneMode", "autotune", "autotune_file", "choose"]

AutotuneMode = Literal["measure", "cached", "off"]

Ways = Mapping[str, Callable[[], Any]]

# Seconds of timing for one question, besides the round that is running when they are over. Where the default
# alone takes half of it, nothing else is tried. Preparations of a first run are short beside a way that is
# timed only once, and the minimum leaves them out for others.
_BUDGET = 0.3
_ROUNDS = 6

# How much faster another way must be than the default; timings of equal ways differ by less.
_MARGIN = 1.03

_mode: AutotuneMode | None = None
_chosen: dict[Hashable, str] = {}
_answered = 0  # questions, by timing
_lock = threading.RLock()


def autotune(mode: AutotuneMode | None = None) -> AutotuneMode:
    """Return how the ways of matrix products are chosen, after setting it if a mode is passed.

    ``"measure"``, the default, times the ways at the first step of a shape: on memory of its own, in turns,
    for 0.3 seconds and the turn that is running then; not for matrices of fewer than some hundred rows, nor
    where the default takes longer than half of that. The choices are kept in :func:`autotune_file`.
    ``"cached"`` uses the choices of that file and measures nothing. ``"off"`` uses the defaults, which depend
    on dtypes, shapes and the processor's instructions only.

    All ways compute the same, but round differently. A choice therefore stays as it is for the process, and,
    through the file, for later ones. ``"measure"`` acts like ``"off"`` where choices must not differ: in a
    process group of more than one process, whose replicas would drift apart, and under
    ``torch.use_deterministic_algorithms(True)``. To use measured ways on many machines, give all of them the
    same file (``STEEPEST_CACHE_DIR``) and choose ``"cached"``.

    The setting applies to the whole process; ``STEEPEST_AUTOTUNE`` in the environment sets the first one. On
    CUDA, take a step before a graph is captured; nothing is measured during a capture.

    Raises:
        ValueError: an unknown mode.

    >>> import steepest
    >>> before = steepest.autotune()
    >>> steepest.autotune("off")
    'off'
    >>> steepest.autotune(before) == before
    True
    """
    global _mode
    if mode is None and _mode is None:
        mode = os.environ.get("STEEPEST_AUTOTUNE", "measure")  # type: ignore[assignment]
    if mode is not None:
        if mode not in get_args(AutotuneMode):
            known = ", ".join(map(repr, get_args(AutotuneMode)))
            raise ValueError(f"autotune (or STEEPEST_AUTOTUNE) must be one of {known}, got {mode!r}")
        _mode = mode
    assert _mode is not None
    return _mode


def autotune_file() -> Path:
    """Return the file of the choices, by machine: JSON, in ``STEEPEST_CACHE_DIR`` or the user's cache folder.

    It may be deleted, copied to equal machines, and edited. If it cannot be written, choices last as long as
    the process.
    """
    folder: str | Path | None = os.environ.get("STEEPEST_CACHE_DIR")
    if folder is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "steepest"
    return Path(folder) / "autotune.json"


def choose(
    question: tuple[Hashable, ...],
    device: torch.device,
    ways: Sequence[str],
    trials: Callable[[], Ways] | None,
) -> str:
    """Return the fastest way for a question; the first one where nothing is known or may be measured.

    Args:
        question: what is computed, with everything on which the time depends but machine and threads. The
            words that ``str`` makes of it are its name in the file.
        device: where.
        ways: their names, first that of the default. Others in the file are ignored.
        trials: makes the functions to time, which must leave no trace; called only if they are timed. None
            times nothing.
    """
    default = ways[0]
    mode = autotune()
    alone = not (torch.are_deterministic_algorithms_enabled() or _in_group())
    if mode == "off" or (mode == "measure" and not alone) or torch.compiler.is_compiling():
        return default
    key = (question, device, torch.get_num_threads())
    known = _chosen.get(key)
    if known is not None:
        return known
    with _lock:
        if key not in _chosen:
            words, machine = " ".join(map(str, question)), machine_words(device)
            made = _read(autotune_file()).get(machine, {}).get(words)
            if made not in ways:
                made = None
            if made is None and (trials is None or mode == "cached" or _capturing(device)):
                return default
            if made is None:
                assert trials is not None
                made = _fastest(trials(), device, default)
                _write(autotune_file(), machine, words, made)
            _chosen[key] = made
        return _chosen[key]


def _fastest(ways: Ways, device: torch.device, default: str) -> str:
    global _answered
    best = {default: _timed_alone(ways[default], device)}
    alive = list(ways) if best[default] <= _BUDGET / 2 else []
    start = time.perf_counter()
    for _ in range(_ROUNDS):
        # In turns, because a machine may be slower for a while.
        for way in alive:
            best[way] = min(best.get(way, math.inf), _timed_alone(ways[way], device))
        if time.perf_counter() - start > _BUDGET:
            break
        alive = [way for way in alive if best[way] < 1.5 * min(best.values())]
    _answered += 1
    winner = min(best, key=best.__getitem__)
    return default if best[default] <= _MARGIN * best[winner] else winner


def _timed_alone(run: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of a run that answers no other questions on the way."""
    before, seconds = _answered, _timed(run, device)
    return seconds if _answered == before else _timed(run, device)


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        event: Any = torch.cuda.Event
        first, last = event(enable_timing=True), event(enable_timing=True)
        with torch.cuda.device(device):
            first.record()
            run()
            last.record()
            last.synchronize()
        return float(first.elapsed_time(last)) / 1e3
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _in_group() -> bool:
    """Return whether other processes may compute the same."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@functools.lru_cache(maxsize=64)
def _machine(device: torch.device, threads: int) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    has = torch.cpu.get_capabilities()
    units = [name for name in ("amx_bf16", "avx512_bf16", "avx512_f", "avx2") if has.get(name)]
    name = has.get("cpu_name") or has.get("architecture") or "CPU"
    return f"{name} ({' '.join(units)}), {threads} threads, torch {torch.__version__}"


def machine_words(device: torch.device) -> str:
    """Return the name under which the file keeps a device's choices."""
    return _machine(device, torch.get_num_threads())


_Table = dict[str, dict[str, str]]


def _read(path: Path) -> _Table:
    """Return the file's choices; none where it is missing or no table of them."""
    try:
        table = json.loads(path.read_text())
        return {
            str(machine): {str(question): str(way) for question, way in each.items()}
            for machine, each in table.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(path: Path, machine: str, question: str, way: str) -> None:
    """Add a choice to the file, which another process may have changed meanwhile, or may be reading."""
    try:
        table = _read(path)
        table.setdefault(machine, {})[question] = way
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".json")
        with os.fdopen(handle, "w") as file:
            json.dump(table, file, indent=1, sort_keys=True)
        Path(temporary).replace(path)
    except OSError:
        pass  # a read-only home: the choice lasts as long as the process
