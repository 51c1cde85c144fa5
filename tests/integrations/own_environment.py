"""Frameworks that pin other releases than the tests': `make stacks` makes an environment for each."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from .test_docs import FIRST, ON_DISK, blocks, sections
from .tiny import assert_same


def needs_own_environment(stack: str) -> pytest.MarkDecorator:
    """Skip a test in every environment but ``.venv-NAME``, where nothing that is missing skips it."""
    reason = "needs an environment of its own: make stacks"
    return pytest.mark.skipif(Path(sys.prefix).name != f".venv-{stack}", reason=reason)


def write_page(title: str, folder: Path) -> str:
    """Write the files of a section of docs/frameworks.md, and return its commands.

    The first line of a file is a comment with its name. The last block of commands runs; the first installs.
    """
    section = sections()[title]
    (folder / "tiny.py").write_text(FIRST + ON_DISK, encoding="utf-8")
    for block in (*blocks(section), *blocks(section, "yaml")):
        (folder / block.splitlines()[0].removeprefix("# ")).write_text(block, encoding="utf-8")
    return blocks(section, "sh")[-1]


def run_page(title: str, folder: Path, instead: Mapping[str, str] | None = None) -> None:
    """Write a section's files and run its commands until one fails, with other words in place of some."""
    commands = write_page(title, folder)
    for words, others in (instead or {}).items():
        commands = commands.replace(words, others)
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    subprocess.run(["bash", "-ec", commands], cwd=folder, env={**os.environ, "PATH": path}, check=True)


def assert_resumed(runs: Path) -> None:
    """Raise unless ``resumed`` went on from step 2 of ``whole`` and equals it, with the page's options."""
    from safetensors.torch import load_file

    whole, resumed = (runs / name / "checkpoint-4" for name in ("whole", "resumed"))
    assert not (runs / "resumed" / "checkpoint-2").exists()
    assert_same(load_file(resumed / "model.safetensors"), load_file(whole / "model.safetensors"))
    for name in ("scheduler.pt", "optimizer.pt"):
        assert_same(torch.load(resumed / name), torch.load(whole / name))
    groups = torch.load(whole / "optimizer.pt")["param_groups"]
    assert [(each["rule"], each["initial_lr"], each["weight_decay"]) for each in groups] == [
        ("muon", 1e-3, 0.1),
        ("adamw", 1e-3, 0.1),
        ("adamw", 1e-3, 0.0),
    ]
