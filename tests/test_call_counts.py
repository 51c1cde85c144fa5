"""A step's overhead is counted in Python calls, which do not depend on the machine's speed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import steepest

ROOT = str(Path(steepest.__file__).parent)


def calls_of_a_step(name: str) -> list[str]:
    """The file of each function of the library that a warm step of one 64×64 parameter calls."""
    param = Parameter(torch.ones(64, 64))
    optimizer = steepest.create(name, [param])
    for _ in range(3):
        param.grad = torch.ones(64, 64)
        optimizer.step()
    files: list[str] = []

    def profile(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(ROOT):
            files.append(frame.f_code.co_filename)

    sys.setprofile(profile)
    try:
        optimizer.step()
    finally:
        sys.setprofile(None)
    return files


@pytest.mark.parametrize(
    ("name", "calls", "files"), [("lion", 43, 10), ("adamw", 50, 11), ("muon", 144, 24), ("quad", 294, 24)]
)
def test_a_warm_step_goes_through_few_calls_and_files(name: str, calls: int, files: int):
    seen = calls_of_a_step(name)
    assert 10 < len(seen) <= calls
    assert len(set(seen)) <= files
