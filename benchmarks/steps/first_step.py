"""Time the first step in a new process, with a private compiler cache that is empty or warm.

Run as a module, this file is that process: it prints its times as one line of JSON.
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

from steepest.lab.training.clock import now
from steepest.model_shapes import model_shapes

from .case import Case, failing_if_eager
from .groups import select_groups
from .params import SharedParams
from .results import error_line

_TIMEOUT = 900
"""Seconds after which the process is killed."""


def first_step_seconds(case: Case, model: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Time the first step with an empty cache, then with the cache that this left, and the second step.

    Raises:
        RuntimeError: the process failed or did not compile the step; the message is its last line of output.
    """
    with tempfile.TemporaryDirectory(prefix="steepest-bench-") as directory:
        cold = _run_process(case, model, device, dtype, Path(directory))
        warm = _run_process(case, model, device, dtype, Path(directory))
    return {
        "cold_seconds": cold["first"],
        "warm_seconds": warm["first"],
        "second_ms": 1e3 * warm["second"],
    }


def _run_process(
    case: Case, model: str, device: torch.device, dtype: torch.dtype, cache: Path
) -> dict[str, float]:
    request = {
        "key": case.key,
        "model": model,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", __name__, json.dumps(request)],
        env={
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": str(cache),
            "TRITON_CACHE_DIR": str(cache / "triton"),
        },
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT,
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        errors = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"the first step's process failed: {errors[-1]}")
    times: dict[str, float] = json.loads(lines[-1])
    return times


def main(request: dict[str, Any]) -> dict[str, float]:
    """Time two steps.

    Raises:
        RuntimeWarning: the steps were not compiled, see :func:`failing_if_eager`.
    """
    torch.set_num_threads(request["threads"])
    device = torch.device(request["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    case = next(case for group in select_groups() for case in group.cases if case.key == request["key"])
    tensors = model_shapes(request["model"]).tensors
    shared = SharedParams.create(tensors, device, getattr(torch, request["dtype"]))
    optimizer = case.make(shared.params)
    seconds = []
    with failing_if_eager():
        for _ in range(2):
            shared.set_grads()
            start = now(device)
            optimizer.step()
            seconds.append(now(device) - start)
    return {"first": seconds[0], "second": seconds[1]}


if __name__ == "__main__":
    try:
        print(json.dumps(main(json.loads(sys.argv[1]))))
    except Exception as error:
        sys.exit(error_line(error))
