"""llm-foundry: the page's commands; and its own ``build_optimizer``, which finds ours by the entry point.

It and Composer do not allow the torch of the other tests, so ``make`` installs llm-foundry alone. Without
Composer, only single files of it can be imported.
"""

import functools
import logging
import re
import shlex
from collections import OrderedDict
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import steepest

from .own_environment import needs_own_environment, write_page
from .source import functions_at, module_at, package_folder
from .test_docs import blocks, sections
from .tiny import assert_same, mlp, state, train

(YAML,) = blocks(sections()["llm-foundry"], "yaml")


@pytest.fixture(scope="module")
def build_optimizer():
    """The function; without Composer, with its registry and the rest of what it calls."""
    if find_spec("composer") is not None:
        return pytest.importorskip("llmfoundry.utils.builders").build_optimizer
    utils = package_folder("llmfoundry") / "utils"
    pytest.importorskip("catalogue")
    registries = module_at(utils / "registry_utils.py")
    # As llmfoundry.registry makes it, where Composer is installed.
    made = registries.create_registry(
        "llmfoundry", "optimizers", generic_type=type[torch.optim.Optimizer], entry_points=True
    )
    functions = functions_at(
        utils / "builders.py",
        "_extract_param_groups",
        "build_optimizer",
        registry=SimpleNamespace(optimizers=made),
        construct_from_registry=registries.construct_from_registry,
        log=logging.getLogger("llmfoundry"),
        Optimizer=torch.optim.Optimizer,
        OrderedDict=OrderedDict,
        functools=functools,
        re=re,
        torch=torch,
    )
    return functions["build_optimizer"]


def test_it_builds_from_yaml_what_build_makes_and_resumes(build_optimizer):
    om = pytest.importorskip("omegaconf").OmegaConf

    def prepare():
        config = om.to_container(om.create(YAML))["optimizer"]
        model = mlp()
        return model, build_optimizer(model, config.pop("name"), config)

    whole, resumed = prepare(), prepare()
    train(*whole)
    for loaded, saved in zip(resumed, whole, strict=True):
        loaded.load_state_dict(state(saved))
    expected = mlp()
    own = steepest.build(expected, "muon", lr=1e-3)
    for each in (whole, resumed, (expected, own), (expected, own)):
        train(*each)
    assert_same(state(resumed[0]), state(whole[0]))
    assert_same(state(resumed[1]), state(whole[1]))
    assert_same(state(whole[0]), state(expected))


def test_its_own_groups_are_refused(build_optimizer):
    config = {"rule": "muon", "lr": 1e-3, "param_groups": [{"param_str_match": "bias", "lr": 1e-4}]}
    with pytest.raises(TypeError, match=r"Auto\(\) needs the model"):
        build_optimizer(mlp(), "steepest", config)


@needs_own_environment("llm-foundry")
def test_the_commands_of_the_page_resume_bit_for_bit(tmp_path, monkeypatch):
    # In this process, where Composer can be imported beside any build of torchvision.
    from llmfoundry.cli.cli import app

    monkeypatch.chdir(tmp_path)
    for line in write_page("llm-foundry", tmp_path).splitlines():
        command, *arguments = shlex.split(line)
        assert command == "llmfoundry"
        app(arguments, standalone_mode=False)
    assert not Path("runs/resumed/ep0-ba2-rank0.pt").exists()
    runs = [f"runs/{name}/ep0-ba4-rank0.pt" for name in ("whole", "resumed")]
    whole, resumed = (torch.load(run, weights_only=False)["state"] for run in runs)
    (optimizer,) = whole["optimizers"].values()
    assert {group["rule"] for group in optimizer["param_groups"]} == {"muon", "adamw"}
    for part in ("model", "optimizers", "schedulers"):
        assert_same(resumed[part], whole[part])
