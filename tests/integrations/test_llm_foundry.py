"""llm-foundry: its own ``build_optimizer`` finds ours by the entry point, and makes it from the page's YAML.

Composer, on which the rest of llm-foundry is built, needs torch < 2.7.1.
"""

import functools
import logging
import re
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch

import steepest

from .source import functions_at, module_at, package_folder
from .test_docs import blocks, sections
from .tiny import assert_same, mlp, rows, state

(YAML,) = blocks(sections()["llm-foundry"], "yaml")


@pytest.fixture(scope="module")
def build_optimizer():
    """The function, with its registry and the rest of what it calls."""
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

    def train(model, optimizer):
        x, y = rows()
        for _ in range(2):
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()

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
