"""A description of the machine, the code and the command, stored with every result."""

from __future__ import annotations

import functools
import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import steepest

from ..printable import without_password


def provenance(device: torch.device) -> dict[str, Any]:
    """Return the fields of an experiment that say when, where and from which code and command it came."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"command": command(), "revision": revision(), "machine": describe(device), "created": now}


def describe(device: torch.device) -> dict[str, str | int]:
    """Return CPU model, cores, threads, device and versions as plain JSON values."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "steepest": revision(),
    }


@functools.cache
def revision() -> str:
    """Return the git revision of a checkout of steepest, or its version."""
    root = Path(steepest.__file__).parents[2]
    if not (root / ".git").exists():
        # An installed package may lie within the user's own repository.
        return steepest.__version__
    git = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return steepest.__version__


def command() -> str:
    """Return the command line of this process, as it can be copied from where it ran."""
    program, here = Path(sys.argv[0]).absolute(), Path.cwd()
    script = program.relative_to(here) if program.is_relative_to(here) else program.name
    name = ["steepest"] if program.name in ("steepest", "__main__.py") else ["python", str(script)]
    return without_password(shlex.join([*name, *sys.argv[1:]]))


def _cpu_model() -> str:
    # On Linux platform.processor() is empty or names only the architecture.
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(found, "") or platform.processor() or platform.machine()
