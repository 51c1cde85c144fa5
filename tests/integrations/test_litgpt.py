"""LitGPT: its command pretrains by the page's files, and resumes bit for bit."""

import shlex
import sys
from pathlib import Path

import pytest
import torch

from .test_docs import blocks, sections
from .tiny import assert_same

SECTION = sections()["LitGPT"]


@pytest.fixture
def pretrain(monkeypatch, tmp_path):
    """LitGPT's main function, in a folder with the page's files. To compile the model would take a minute."""
    command = pytest.importorskip("litgpt.__main__")
    pytest.importorskip("torchdata")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # as ``python -m`` does
    (data,), (config,) = blocks(SECTION), blocks(SECTION, "yaml")
    Path("rows.py").write_text(data, encoding="utf-8")
    Path("tiny.yaml").write_text(config, encoding="utf-8")
    precision = torch.get_float32_matmul_precision()
    torch.compiler.set_stance("force_eager")
    yield command.main
    torch.compiler.set_stance("default")
    torch.set_float32_matmul_precision(precision)


def test_the_commands_of_the_page_resume_bit_for_bit(pretrain, monkeypatch):
    _, commands = blocks(SECTION, "sh")
    for line in commands.replace("\\\n", "").splitlines():
        python, module, *arguments = shlex.split(line)
        assert (python, module) == ("python", "-m")
        monkeypatch.setattr(sys, "argv", arguments)
        pretrain()
    whole, resumed = (torch.load(f"runs/{name}/final/lit_model.pth") for name in ("whole", "resumed"))
    assert whole["step_count"] == 4
    assert {group["rule"] for group in whole["optimizer"]["param_groups"]} == {"muon", "adamw"}
    assert_same(resumed["model"], whole["model"])
    assert_same(resumed["optimizer"], whole["optimizer"])
