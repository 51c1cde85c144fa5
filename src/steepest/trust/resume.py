"""The half of a certified run that loads and goes on, in a new process or in this one."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steepest.trust.training import Run, Training, digest, seed_generators
from steepest.trust.ways import Way, load

__all__ = ["MISSING", "Resume", "in_new_process", "kept"]

MISSING = "<missing>"
"""The value of something that the run that never stopped has, or the resumed one, and the other has not."""

_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from steepest.trust.resume import main; main(sys.argv[2])"
)


@dataclass(frozen=True)
class Resume:
    """What the second half needs: the training, the checkpoint, and digests of the run that never stopped.

    The training's batches are made with the same seed as there, the model with another.
    """

    source: Callable[[], Training]
    checkpoint: Path
    way: Way
    seed: int
    stop_after: int
    expected: Sequence[dict[str, str]]
    """The digests of each step, from the one before the first on."""

    def __call__(self) -> dict[str, tuple[int, Any]]:
        """Load and go on; return the step at which each differing value first differs, and the value then."""
        seed_generators(self.seed)
        run = Run(self.source(), self.seed + 1)
        load(self.way, self.checkpoint, run)
        run.taken = self.stop_after
        found: dict[str, tuple[int, Any]] = {}
        last = len(self.expected) - 1
        for step in range(self.stop_after, last + 1):
            if step > self.stop_after:
                run.step()
            values, expected = run.values(), self.expected[step]
            for name in [name for name in {**values, **expected} if name not in found]:
                if name not in values:
                    found[name] = step, MISSING
                elif name not in expected:
                    # The other run may make it later.
                    if step == last:
                        found[name] = step, kept(values[name])
                elif digest(values[name]) != expected[name]:
                    found[name] = step, kept(values[name])
        return found


def kept(value: Any) -> Any:
    """Return a copy that no later step changes, on the CPU."""
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def in_new_process(resume: Resume, folder: Path) -> dict[str, tuple[int, Any]]:
    """Call it in a new process, with this one's settings of torch that could change a bit.

    Raises:
        RuntimeError: the new process failed; the message has what it wrote.
    """
    settings = {
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    with (folder / "resume.pickle").open("wb") as file:
        pickle.dump(settings, file)
        pickle.dump(resume, file)
    command = [sys.executable, "-c", _START, json.dumps([str(each) for each in sys.path]), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the new process failed:\n{done.stderr.strip()}")
    found: dict[str, tuple[int, Any]] = torch.load(folder / "found.pt", weights_only=True)
    return found


def main(folder: str) -> None:
    """Run the new process."""
    with (Path(folder) / "resume.pickle").open("rb") as file:
        settings = pickle.load(file)
        torch.set_num_threads(settings["threads"])
        torch.set_default_dtype(settings["dtype"])
        torch.set_float32_matmul_precision(settings["matmul"])
        torch.use_deterministic_algorithms(settings["deterministic"])
        resume = pickle.load(file)
    torch.save(resume(), Path(folder) / "found.pt")
