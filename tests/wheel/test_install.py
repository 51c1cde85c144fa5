"""The wheel works in a fresh environment that has what it asks for, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import steepest

pytestmark = pytest.mark.slow

STEP = """
import torch, steepest
weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
optimizer = steepest.Lion([weight], lr=0.25)
weight.grad = torch.tensor([0.5, -3.0])
optimizer.step()
print(steepest.__version__, weight.tolist(), steepest.__file__)
"""


def closure(requirements: list[str], extra: str = "") -> set[str]:
    """Return the distributions that requirements bring, by name, as installed here."""
    found: set[str] = set()
    waiting = [(text, extra) for text in requirements]
    while waiting:
        text, asked = waiting.pop()
        each = Requirement(text)
        if each.marker and not any(each.marker.evaluate({"extra": one}) for one in ("", asked)):
            continue
        name = canonicalize_name(each.name)
        try:
            needs = distribution(name).requires or []
        except PackageNotFoundError:
            continue  # torch's CUDA libraries beside a CPU build
        if name not in found:
            found.add(name)
            waiting += [(need, one) for need in needs for one in (each.extras or {""})]
    return found


def link(names: set[str], directory: Path) -> None:
    """Put the files of installed distributions into another environment, as links."""
    for name in names:
        files = distribution(name).files or []
        for top in {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}:
            source, target = Path(str(distribution(name).locate_file(top))), directory / top
            if source.exists() and not target.exists():
                target.symlink_to(source)


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and torch alone."""
    directory = tmp_path_factory.mktemp("environment")
    venv.create(directory, with_pip=False)
    python = directory / "bin" / "python"
    command = ["-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([sys.executable, *command, str(wheel)], check=True)
    link(closure(["torch"]), packages(directory))
    return directory


def packages(environment: Path) -> Path:
    return Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))


def run(environment: Path, *command: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(environment / "bin" / command[0]), *command[1:]],
        cwd=environment,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_step_with_torch_alone(environment: Path) -> None:
    done = run(environment, "python", "-c", STEP)
    assert done.returncode == 0, done.stderr
    version, moved, file = done.stdout.strip().split(" [")[0], "[0.75, 1.25]", done.stdout.split()[-1]
    assert version == steepest.__version__
    assert moved in done.stdout
    assert Path(file).is_relative_to(environment)


def test_without_the_lab_the_command_says_what_to_install(environment: Path) -> None:
    done = run(environment, "steepest", "race", "--help")
    assert (done.returncode, done.stdout) == (2, "")
    assert 'pip install "steepest[lab]"' in done.stderr


def test_without_the_lab_the_command_tells_the_versions(environment: Path) -> None:
    done = run(environment, "steepest", "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"steepest {steepest.__version__}, torch ")


def test_with_the_lab_the_command_runs(environment: Path) -> None:
    needs = distribution_requirements(environment)
    link(closure(needs, "lab"), packages(environment))
    done = run(environment, "steepest", "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"steepest {steepest.__version__}, torch ")
    assert run(environment, "steepest", "race", "--help").returncode == 0
    template = "import steepest.lab.report.page as page, steepest.lab as lab; print(lab.write_report)"
    done = run(environment, "python", "-c", template)
    assert done.returncode == 0, done.stderr


def distribution_requirements(environment: Path) -> list[str]:
    (metadata,) = packages(environment).glob("steepest-*.dist-info/METADATA")
    lines = metadata.read_text(encoding="utf-8").splitlines()
    return [line.partition(": ")[2] for line in lines if line.startswith("Requires-Dist: ")]
