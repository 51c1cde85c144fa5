"""The command line answers at once: help, versions and completion load neither torch nor Optuna."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import typer

import steepest
from steepest.lab.cli.app import app
from steepest.lab.cli.completion import complete_optimizers, optimizer_names

COMMANDS = typer.main.get_command(app).commands
# Typer looks for pydantic by itself.
HEAVY = {"altair", "matplotlib", "numpy", "optuna", "pandas", "scipy", "sklearn", "tensorboard", "torch"}
# Also where a command ends the process, as completion does.
REPORT = """
import atexit, sys
atexit.register(lambda: print("loaded:", *{name.partition(".")[0] for name in sys.modules}))
from steepest.__main__ import _run
"""


def lines_of(script: str, **environment: str) -> list[str]:
    """Return what a new process prints, once it is clear that it has not loaded what takes long."""
    done = subprocess.run(
        [sys.executable, "-c", REPORT + script],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    *lines, loaded = done.stdout.splitlines()
    assert loaded.startswith("loaded: ")
    assert "steepest" in loaded.split()
    assert not HEAVY & {*loaded.split()}
    return lines


def test_help_loads_no_torch() -> None:
    text = "\n".join(lines_of("_run(['--help'])"))
    assert all(name in text for name in [*COMMANDS, "--install-completion"])


def test_the_version_loads_no_torch() -> None:
    (line,) = lines_of("_run(['--version'])")
    assert line.startswith(f"steepest {steepest.__version__}, torch ")


def test_the_help_of_every_command_loads_no_torch() -> None:
    commands = [[name] for name in COMMANDS] + [["study", name] for name in COMMANDS["study"].commands]
    lines = lines_of(f"for command in {commands}: _run([*command, '--help'])")
    assert sum("Usage: steepest" in line for line in lines) == len(commands)


def completed(line: str) -> list[str]:
    """Return what bash is told after Tab at the end of a line."""
    words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    return lines_of("_run([])", _STEEPEST_COMPLETE="complete_bash", **words)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("steepest ra", ["race"]),
        ("steepest race --optimizers li", ["lion"]),
        ("steepest sweep --optimizers adamw,simb", ["adamw,simba", "adamw,simba_leaky"]),
        ("steepest study horizon --optimizers simba,simb", ["simba,simba_leaky"]),
        ("steepest bench --model llama", ["llama-1b", "llama-70b"]),
        ("steepest race --task ", ["text", "digits", "images", "sasrec"]),
    ],
)
def test_tab_completes_without_torch(line: str, expected: list[str]) -> None:
    assert completed(line) == expected


def test_the_optimizers_to_complete_are_those_there_are() -> None:
    assert optimizer_names() == steepest.list_optimizers()
    assert complete_optimizers("") == optimizer_names()
    assert "lion,lion" not in complete_optimizers("lion,")


def test_what_is_completed_exists() -> None:
    from steepest.lab.defaults import TASKS
    from steepest.lab.errors import LabError
    from steepest.lab.tasks import load_task

    with pytest.raises(LabError, match=f"choose {', '.join(TASKS)}"):
        load_task("none such", {})


def test_the_shell_gets_a_script() -> None:
    script = "\n".join(lines_of("_run([])", _STEEPEST_COMPLETE="source_bash"))
    assert "_STEEPEST_COMPLETE=complete_bash" in script
    assert "complete -o default -F _steepest_completion steepest" in script
