"""Choose among ways to compute the same thing by timing them once, and remember the choice.

Which library, batching or blocking is fastest differs between processors by factors, and no rule of thumb
holds on all of them. Ways sum in different orders, so a choice changes the last bits of results: it is made
once, kept for the process, and kept in a file, so that a run that is resumed on the same machine repeats it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["AutotuneMode", "autotune", "autotune_file", "choose"]

AutotuneMode = Literal["measure", "cached", "off"]

Ways = Mapping[str, Callable[[], Any]]

# Seconds of timing for one question, besides the round that is running when they are over. Where the default
# alone takes half of it, nothing else is tried. Preparations of a first run are short beside a way that is
# timed only once, and the minimum leaves them out for others.
_BUDGET = 0.3
_ROUNDS = 6
_LONG = 2.0

# How much faster another way must be than the default; timings of equal ways differ by less.
_MARGIN = 1.03

_mode: AutotuneMode | None = None
_chosen: dict[Hashable, str] = {}
_answered = 0  # questions, by timing
_lock = threading.RLock()


def autotune(mode: AutotuneMode | None = None) -> AutotuneMode:
    """Return how the ways of matrix products are chosen, after setting it if a mode is passed.

    ``"measure"``, the default, times the ways at the first step of a shape: on memory of its own, in turns,
    each question for 0.3 seconds and the turn that is running then; not for matrices of fewer than some
    hundred rows, nor where the default takes longer than half of that. The choices are kept in
    :func:`autotune_file`. ``"cached"`` uses the choices of that file and measures nothing. ``"off"`` uses the
    defaults, which depend on dtypes, shapes and the processor's instructions only.

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
        mode = os.environ.get("STEEPEST_AUTOTUNE") or "measure"  # type: ignore[assignment]
    if mode is not None:
        if mode not in get_args(AutotuneMode):
            known = ", ".join(map(repr, get_args(AutotuneMode)))
            raise ValueError(f"autotune (or STEEPEST_AUTOTUNE) must be one of {known}, got {mode!r}")
        _mode = mode
    assert _mode is not None
    return _mode


def autotune_file() -> Path | None:
    """Return the file of the choices, by machine: JSON, in ``STEEPEST_CACHE_DIR`` or the user's cache folder.

    It may be deleted, copied to equal machines, and edited. None where there is no home folder; then, and if
    it cannot be written, choices last as long as the process.
    """
    folder = os.environ.get("STEEPEST_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME")
    try:
        place = Path(folder) if folder else Path.home() / ".cache"
    except RuntimeError:
        return None
    return (place if os.environ.get("STEEPEST_CACHE_DIR") else place / "steepest") / "autotune.json"


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
    if device.type == "meta":  # nothing is computed there
        return default
    key = (mode, question, device, torch.get_num_threads())
    known = _chosen.get(key)
    if known is not None and known in ways:
        return known
    with _lock:
        words, machine = " ".join(map(str, question)), machine_words(device)
        if mode == "cached":
            # Read once, so that what other processes add meanwhile changes nothing.
            made = _file_of_this_process().get(machine, {}).get(words, default)
            made = made if made in ways else default
        else:
            made = _read(autotune_file()).get(machine, {}).get(words, "")
            if made not in ways:
                if trials is None or _capturing(device):
                    return default
                made = _written(machine, words, _fastest(trials, device, default), ways)
        _chosen[key] = made
        return made


def _fastest(trials: Callable[[], Ways], device: torch.device, default: str) -> str:
    """Return the fastest way; a way that fails, for lack of memory, say, is none."""
    global _answered
    try:
        ways = dict(trials())
        best = {default: _timed_alone(ways[default], device)}
    except RuntimeError:
        return default
    alive = list(ways) if best[default] <= _BUDGET / 2 else []
    start = time.perf_counter()
    for _ in range(_ROUNDS):
        # In turns, because a machine may be slower for a while.
        for way in list(alive):
            try:
                best[way] = min(best.get(way, math.inf), _timed_alone(ways[way], device))
            except RuntimeError:
                alive.remove(way)
                best.pop(way, None)
        if time.perf_counter() - start > _BUDGET:
            break
        alive = [way for way in alive if best[way] < 1.5 * min(best.values())]
    _answered += 1
    winner = min(best, key=best.__getitem__, default=default)
    return default if best.get(default, math.inf) <= _MARGIN * best.get(winner, math.inf) else winner


def _timed_alone(run: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of a run that answers no other questions on the way, unless they are many anyway."""
    before, seconds = _answered, _timed(run, device)
    return seconds if _answered == before or seconds > _LONG else _timed(run, device)


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
    # Virtual machines often hide the processor's name, but not its caches.
    caches = [has[name] >> 10 for name in ("l1d_cache_size", "l2_cache_size") if has.get(name)]
    name = has.get("cpu_name") or has.get("architecture") or "CPU"
    own = " ".join([*units, *map("{}K".format, caches)])
    return f"{name} ({own}), {threads} threads, torch {torch.__version__}"


def machine_words(device: torch.device) -> str:
    """Return the name under which the file keeps a device's choices."""
    return _machine(device, torch.get_num_threads())


_Table = dict[str, dict[str, str]]


@functools.cache
def _file_of_this_process() -> _Table:
    return _read(autotune_file())


def _read(path: Path | None) -> _Table:
    """Return the file's choices; none where it is missing or no table of them."""
    try:
        table = json.loads("{}" if path is None else path.read_text())
        return {
            str(machine): {str(question): str(way) for question, way in each.items()}
            for machine, each in table.items()
        }
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _written(machine: str, question: str, way: str, ways: Sequence[str]) -> str:
    """Add a choice to the file and return it, or the one that another process has added meanwhile."""
    path = autotune_file()
    if path is None:
        return way
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            table = _read(path)
            choices = table.setdefault(machine, {})
            if choices.get(question) in ways:
                return choices[question]
            choices[question] = way
            handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
            with os.fdopen(handle, "w") as file:
                json.dump(table, file, indent=1, sort_keys=True)
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
    except OSError:
        # A read-only home, say: the choice lasts as long as the process.
        if temporary:
            Path(temporary).unlink(missing_ok=True)
    return way


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes from writing the file meanwhile, on systems that have file locks."""
    if fcntl is None:
        yield
        return
    with path.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
