"""The rule that docs/adding-a-rule.md adds works, and the contract suite covers it without an edit."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import steepest
from pages import blocks, run_python
from steepest import optimizer, rule

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "adding-a-rule.md").read_text(encoding="utf-8")
(EXAMPLE,) = blocks("docs/adding-a-rule.md")


@pytest.fixture
def example():
    """Its names; it is forgotten afterwards."""
    yield run_python("docs/adding-a-rule.md", {"__name__": "contributing_example"})
    del optimizer.OPTIMIZERS["row_scaled"], rule._RULES["row_scaled"]


def test_it_runs(example, capsys):
    assert example["weight"].tolist() == [[-0.5, -0.5], [0.0, pytest.approx(0.5**0.5)]]


def test_it_follows_its_equation(example):
    generator = np.random.default_rng(0)
    p, (beta1, beta2), lr, eps = generator.standard_normal((4, 6)), (0.8, 0.95), 0.125, 1e-3
    param = torch.nn.Parameter(torch.tensor(p).view(4, 2, 3))
    made = steepest.create("row_scaled", [param], lr=lr, betas=(beta1, beta2), eps=eps)
    m, v = np.zeros((4, 6)), np.zeros(4)
    for t in range(1, 8):
        g = generator.standard_normal((4, 6))
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * (g * g).mean(1)
        p = p - lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)[:, None]
        param.grad = torch.tensor(g).view(4, 2, 3)
        made.step()
        np.testing.assert_allclose(param.detach().view(4, 6).numpy(), p, rtol=1e-12)


def test_the_contract_suite_covers_it_without_an_edit(tmp_path):
    """A few of its files, with the example as a plugin; they count what they found of it."""
    (tmp_path / "contributing_example.py").write_text(EXAMPLE, encoding="utf-8")
    files = ("construction", "first_step", "inapplicable", "views")
    command = [sys.executable, "-m", "pytest", "-p", "contributing_example", "-p", "no:cacheprovider"]
    command += ["-k", "row_scaled", *(f"tests/contract/test_{name}.py" for name in files)]
    path = os.pathsep.join([str(tmp_path), str(Path(steepest.__file__).parents[1])])
    run = subprocess.run(
        [*command, "-o", "addopts=--strict-markers"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None
    assert int(passed[1]) >= 35, run.stdout[-1000:]


def test_its_links_lead_to_files():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert "://" in target or (ROOT / "docs" / target).exists(), target
