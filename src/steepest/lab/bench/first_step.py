"""How long the first step of a new process takes, with a compiler's cache of its own, empty or full.

Run as a module it is that process: it prints its times as one line of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..clock import now
from .entry import Entry
from .families import families
from .graphs import really_compiled
from .material import Material
from .shapes import shape_list
from .turns import reason

_PATIENCE = 900
"""Seconds after which a process is given up."""


def first_step_seconds(entry: Entry, model: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Seconds of the first step with an empty cache and with the one that it left; ms of the second.

    Raises:
        RuntimeError: the process failed, or did not compile what is to be compiled; with the last that it
            wrote.
    """
    with tempfile.TemporaryDirectory(prefix="steepest-bench-") as folder:
        cold = _in_a_process(entry, model, device, dtype, Path(folder))
        warm = _in_a_process(entry, model, device, dtype, Path(folder))
    return {
        "cold_seconds": cold["first"],
        "warm_seconds": warm["first"],
        "second_ms": 1e3 * warm["second"],
    }


def _in_a_process(
    entry: Entry, model: str, device: torch.device, dtype: torch.dtype, cache: Path
) -> dict[str, float]:
    asked = {
        "key": entry.key,
        "model": model,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", __name__, json.dumps(asked)],
        env={
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": str(cache),
            "TRITON_CACHE_DIR": str(cache / "triton"),
        },
        capture_output=True,
        text=True,
        timeout=_PATIENCE,
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"the first step's process failed: {said[-1]}")
    times: dict[str, float] = json.loads(lines[-1])
    return times


def main(asked: dict[str, Any]) -> dict[str, float]:
    """Take two steps and time them.

    Raises:
        RuntimeError, RuntimeWarning: the steps were not compiled, see :func:`really_compiled`.
    """
    torch.set_num_threads(asked["threads"])
    device = torch.device(asked["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    (entry,) = [e for family in families() for e in family.entries if e.key == asked["key"]][:1]
    tensors = shape_list(asked["model"]).tensors
    material = Material.of(tensors, device, getattr(torch, asked["dtype"]))
    optimizer = entry.make(material.params)
    spent = []
    with really_compiled(entry):
        for _ in range(2):
            material.lend_gradients()
            start = now(device)
            optimizer.step()
            spent.append(now(device) - start)
    return {"first": spent[0], "second": spent[1]}


if __name__ == "__main__":
    try:
        print(json.dumps(main(json.loads(sys.argv[1]))))
    except Exception as error:
        sys.exit(reason(error))
