"""torchtitan: its command trains by the page's job, with its own checkpoints, and resumes bit for bit."""

import os
import runpy
from pathlib import Path

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from .own_environment import run_page, write_page
from .tiny import assert_same, mlp, state, train

ON_CPU = Path(__file__).with_name("torchtitan_on_cpu.py")

pytest.importorskip("torchtitan")


@pytest.mark.slow
def test_the_commands_of_the_page_resume_bit_for_bit(tmp_path, monkeypatch):
    write_page("torchtitan", tmp_path)
    monkeypatch.chdir(tmp_path)
    runpy.run_path("tiny.py")  # here, where Transformers can be imported beside any build of torchvision
    # Modules are looked for in this folder for `torchrun -m`, but for a script in its own.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", ""))))
    run_page("torchtitan", tmp_path, {"python tiny.py": ":", "-m torchtitan.train": str(ON_CPU)})
    runs = []
    for name in ("whole", "resumed"):
        dcp_to_torch_save(tmp_path / "runs" / name / "checkpoint" / "step-4", tmp_path / name)
        runs.append(torch.load(tmp_path / name, weights_only=False))
    whole, resumed = runs
    assert whole["train_state"]["step"] == 4
    rules = {key: value for key, value in whole["optimizer"].items() if key.endswith(".rule")}
    assert set(rules.values()) == {"muon", "adamw"}
    assert_same(resumed, whole)


def test_the_container_resumes_with_other_activation_checkpointing(tmp_path):
    write_page("torchtitan", tmp_path)
    container = runpy.run_path(str(tmp_path / "job.py"))["SteepestOptimizers"]

    def prepare(checkpointed):
        model = mlp()
        if checkpointed:
            model[3] = checkpoint_wrapper(model[3])
        return model, container.Config(rule="muon", lr=1e-2).build(model_parts=[model])

    whole, resumed = prepare(True), prepare(False)
    train(*whole)
    for loaded, saved in zip(resumed, whole, strict=True):
        loaded.load_state_dict(state(saved))
    train(*whole)
    train(*resumed)
    for found, expected in zip(resumed, whole, strict=True):
        assert_same(state(found), state(expected))
