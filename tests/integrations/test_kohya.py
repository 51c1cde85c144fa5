"""kohya's sd-scripts: their ``train_network.py`` trains by the page's files, and resumes bit for bit.

They are no package. This needs a checkout, ``SD_SCRIPTS=path/to/sd-scripts``, and what that requires.
"""

import ast
import importlib
import logging
import os
import runpy
import shlex
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from .source import functions_at
from .test_docs import blocks, sections
from .tiny import assert_same, mlp
from .tiny_diffusion import save_model, shrink

SECTION = sections()["kohya"]


@pytest.fixture(scope="module")
def checkout():
    if not os.environ.get("SD_SCRIPTS"):
        pytest.skip("SD_SCRIPTS does not name a checkout of kohya's sd-scripts")
    return Path(os.environ["SD_SCRIPTS"]).absolute()


@pytest.fixture
def launch(checkout, tmp_path, monkeypatch):
    """What runs a command of the page, in a folder with the page's files and a tiny model."""
    for module in ("cv2", "diffusers", "einops", "imagesize", "toml", "voluptuous"):
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(checkout))  # as ``python train_network.py`` does there
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (pictures,) = blocks(SECTION)
    exec(compile(pictures, "docs/frameworks.md, kohya", "exec"), {})
    for name, text in zip(("images.toml", "lora.toml"), blocks(SECTION, "toml"), strict=True):
        Path(name).write_text(text, encoding="utf-8")
    save_model(tmp_path)

    def run(line):
        accelerate, launch, *arguments = shlex.split(line)
        assert (accelerate, launch) == ("accelerate", "launch")
        for name in [name for name in sys.modules if name.partition(".")[0] in ("library", "networks")]:
            del sys.modules[name]  # they keep what the last run has set
        shrink(importlib.import_module("library.original_unet"))
        monkeypatch.setattr(sys, "argv", arguments)
        runpy.run_path(str(checkout / arguments[0]), run_name="__main__")

    return run


@pytest.mark.peer
def test_the_commands_of_the_page_resume_bit_for_bit(launch):
    from safetensors.torch import load_file

    _, commands = blocks(SECTION, "sh")
    for line in commands.replace("\\\n", "").splitlines():
        launch(line)
    names = ("whole-000001", "whole", "resumed")
    half, whole, resumed = (load_file(f"runs/{name}.safetensors") for name in names)
    assert_same(resumed, whole)
    # It did not train the first epoch again, which the seed would make equal too.
    assert not Path("runs/resumed-000001.safetensors").exists()
    assert {name.split("_")[1] for name in whole} == {"te", "unet"}
    assert any(not torch.equal(half[name], whole[name]) for name in whole)
    ours, theirs = (torch.load(f"runs/{name}-state/optimizer.bin") for name in ("whole", "resumed"))
    assert {group["rule"] for group in ours["param_groups"]} == {"lion"}
    assert_same(theirs, ours)


@pytest.mark.peer
def test_rules_that_must_see_the_model_say_so(checkout):
    given = {"ast": ast, "importlib": importlib, "logger": logging.getLogger("kohya"), "torch": torch}
    functions = functions_at(checkout / "library" / "train_util.py", "get_optimizer", **given)
    off = {"use_8bit_adam": False, "use_lion_optimizer": False, "fused_backward_pass": False}
    groups = [{"params": list(mlp().parameters()), "lr": 1e-3}]
    auto = {"optimizer_type": "steepest.Auto", "optimizer_args": ["rule='muon'"], "learning_rate": 1e-4}
    with pytest.raises(TypeError, match=r"Auto\(\) needs the model"):
        functions["get_optimizer"](Namespace(**off, **auto), groups)
