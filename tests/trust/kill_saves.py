"""Kill processes that save checkpoints, at random moments or at every call, and load what they have left.

``python -m trust.kill_saves FOLDER KILLS [SEED]`` prints as JSON how many were killed, during what, and
faults. It must be a process of its own: it forks, which one whose threads hold locks must not.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import random
import signal
import struct
import sys
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import steepest

ELEMENTS = 20_000


def _save(path: Path, step: int) -> None:
    """A checkpoint in which every number is the step's."""
    full = torch.full((ELEMENTS,), float(step))
    steepest.save_checkpoint(path, extra={"step": step, "first": full, "last": full.clone()})


def _loaded_step(path: Path) -> int:
    """The step of the checkpoint that loads, all of which must be that step's.

    Without a model and an optimizer: with those, torch would import its compiler, and forks take longer.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the file before it was loaded
        found = steepest.load_checkpoint(path)
    for name in ("first", "last"):
        assert torch.equal(found[name], torch.full((ELEMENTS,), float(found["step"]))), (
            f"torn: {found['step']}"
        )
    return found["step"]


def _fork(work: Callable[[], None]) -> int:
    """Run it in a child, which ends without any clean-up of this process's."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def at_random(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill a loop of saves after 1 to 15 ms, again and again."""
    chance, path = random.Random(seed), folder / "run.pt"
    shared = mmap.mmap(-1, 8)  # the last step whose save has returned
    faults: list[str] = []
    moments: Counter[str] = Counter()
    _save(path, 0)
    for kill in range(kills):
        committed = struct.unpack("q", shared[:])[0]

        def loop(first: int = committed + 1) -> None:
            for step in range(first, sys.maxsize):
                _save(path, step)
                shared[:] = struct.pack("q", step)

        child = _fork(loop)
        time.sleep(chance.uniform(0.001, 0.015))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            faults.append(f"kill {kill}: the child ended by itself")
        if not path.exists():
            moments["between the renames"] += 1
        elif temporary := [each for each in folder.iterdir() if each.suffix == ".tmp"]:
            whole = zipfile.is_zipfile(temporary[0])
            moments["after writing" if whole else "while writing"] += 1
        else:
            moments["elsewhere"] += 1
        try:
            step, before = _loaded_step(path), struct.unpack("q", shared[:])[0]
            # The file may be one step ahead: the child was killed before it could say so.
            if step not in (before, before + 1):
                faults.append(f"kill {kill}: loaded step {step} after {before} was saved")
            shared[:] = struct.pack("q", step)
        except Exception as error:
            faults.append(f"kill {kill}: {type(error).__name__}: {error}")
    _save(path, 1)
    left = sorted(each.name for each in folder.iterdir())
    if left != ["run.pt", "run.pt.previous"]:
        faults.append(f"the next save leaves {left}")
    return {"killed": kills, "moments": moments, "faults": faults}


_CALLS = [(os, "fsync"), (os, "open"), (os, "close"), (os, "replace"), (os, "unlink"), (torch, "save")]
_PATHS = ["replace", "unlink", "open", "iterdir"]


def _die_at(boundary: int) -> None:
    """Let this process be killed at one of the moments before, within and after its calls, by number."""
    passed = 0

    def pass_one() -> None:
        nonlocal passed
        if passed == boundary:
            os.kill(os.getpid(), signal.SIGKILL)
        passed += 1

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            pass_one()
            result = function(*args, **kwargs)
            pass_one()
            return result

        return call

    real_save = torch.save

    def save_in_halves(content: Any, file: Any) -> None:
        real_save(content, file)
        if hasattr(file, "fileno") and not hasattr(file, "getvalue"):
            file.flush()
            whole = file.tell()
            for part in (whole // 2, whole):  # a file that ends early, then all of it
                held = Path(file.name).read_bytes()
                os.truncate(file.name, part)
                pass_one()
                file.seek(0)
                file.write(held)
                file.flush()

    torch.save = save_in_halves  # type: ignore[assignment]
    for owner, name in _CALLS:
        setattr(owner, name, watched(getattr(owner, name)))
    for name in _PATHS:
        setattr(Path, name, watched(getattr(Path, name)))


def at_every_call(folder: Path) -> dict[str, Any]:
    """Kill a save before and after each of its calls, with zero, one and two checkpoints there before it."""
    faults: list[str] = []
    killed = 0
    for saved in range(3):
        for boundary in range(1000):
            within = folder / f"{saved}-{boundary}"
            within.mkdir()
            path = within / "run.pt"
            for step in range(saved):
                _save(path, step)

            def work(path: Path = path, step: int = saved, boundary: int = boundary) -> None:
                _die_at(boundary)
                _save(path, step)

            _, status = os.waitpid(_fork(work), 0)
            if not os.WIFSIGNALED(status):
                if status != 0 or _loaded_step(path) != saved:
                    faults.append(f"{saved} before, boundary {boundary}: status {status} without a kill")
                break
            killed += 1
            try:
                if _loaded_step(path) not in (saved - 1, saved):
                    faults.append(f"{saved} before, boundary {boundary}: loaded step {_loaded_step(path)}")
            except FileNotFoundError:
                if saved > 0:  # the first save may leave nothing
                    faults.append(f"{saved} before, boundary {boundary}: nothing is left")
            except Exception as error:
                faults.append(f"{saved} before, boundary {boundary}: {type(error).__name__}: {error}")
    return {"killed": killed, "faults": faults}


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.disable()  # in a child, it would copy every page that it looks at
    where, count = Path(sys.argv[1]), int(sys.argv[2])
    for name in ("random", "calls"):
        (where / name).mkdir(parents=True)
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    results = {"random": at_random(where / "random", count, seed), "calls": at_every_call(where / "calls")}
    print(json.dumps(results, indent=1))
    sys.exit(any(each["faults"] for each in results.values()))
