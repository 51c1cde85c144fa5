"""kohya's sd-scripts: its own ``get_optimizer`` and ``--resume``, with the page's options.

It is no package, so this needs a checkout: ``SD_SCRIPTS=path/to/sd-scripts``.
"""

import ast
import importlib
import logging
import os
import shlex
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from .source import functions_at
from .test_docs import blocks, sections
from .tiny import assert_same, mlp, rows, state

OPTIONS = shlex.split(blocks(sections()["kohya"], "sh")[0].replace("\\\n", ""))


@pytest.fixture(scope="module")
def train_util():
    """The two functions, as they are written."""
    if not os.environ.get("SD_SCRIPTS"):
        pytest.skip("SD_SCRIPTS does not name a checkout of kohya's sd-scripts")
    path = Path(os.environ["SD_SCRIPTS"]) / "library" / "train_util.py"
    given = {"ast": ast, "importlib": importlib, "logger": logging.getLogger("kohya"), "torch": torch}
    return functions_at(path, "get_optimizer", "resume_from_local_or_hf_if_specified", **given)


def arguments(**more) -> Namespace:
    """What its parser would make of the page's options; those that it leaves out are off."""
    values = OPTIONS[OPTIONS.index("--optimizer_args") + 1 :]
    end = next(index for index, each in enumerate([*values, "--"]) if each.startswith("--"))
    off = {"use_8bit_adam": False, "use_lion_optimizer": False, "fused_backward_pass": False}
    kind = OPTIONS[OPTIONS.index("--optimizer_type") + 1]
    rate = float(OPTIONS[OPTIONS.index("--learning_rate") + 1])
    given = {"optimizer_type": kind, "learning_rate": rate, "optimizer_args": values[:end]}
    return Namespace(**off, **given, resume_from_huggingface=False, **more)


@pytest.mark.peer
def test_it_makes_our_class_and_resumes(train_util, tmp_path):
    accelerate = pytest.importorskip("accelerate")

    def groups(model):  # as its networks make them, a rate each
        return [{"params": list(layer.parameters()), "lr": 1e-3} for layer in (model[0], model[3], model[5])]

    def train(steps, resume=None, save=None):
        accelerator = accelerate.Accelerator(cpu=True)
        model = mlp()
        name, _, optimizer = train_util["get_optimizer"](arguments(), groups(model))
        assert name == "steepest.rules.lion.Lion"
        model, optimizer = accelerator.prepare(model, optimizer)
        train_util["resume_from_local_or_hf_if_specified"](accelerator, arguments(resume=resume))
        x, y = rows()
        for _ in range(steps):
            accelerator.backward(torch.nn.functional.cross_entropy(model(x), y))
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if save is not None:
            accelerator.save_state(save)
        return state(model)

    train(2, save=str(tmp_path))
    assert_same(train(2, resume=str(tmp_path)), train(4))


@pytest.mark.peer
def test_rules_that_must_see_the_model_say_so(train_util):
    args = arguments()
    args.optimizer_type, args.optimizer_args = "steepest.Auto", ["rule='muon'"]
    with pytest.raises(TypeError, match=r"Auto\(\) needs the model"):
        train_util["get_optimizer"](args, [{"params": list(mlp().parameters()), "lr": 1e-3}])
