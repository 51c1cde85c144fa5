"""Frameworks that make an optimizer from a configuration: Hydra, llm-foundry's entry point, LitGPT."""

import pickle
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

import steepest

from .tiny import assert_same, mlp, rows, state

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def trained(model, optimizer):
    x, y = rows()
    for _ in range(2):
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return state(model)


def test_hydra_instantiates_a_recipe_and_a_partial_class():
    hydra = pytest.importorskip("hydra")
    from omegaconf import OmegaConf

    options = {"rule": "muon", "lr": 1e-2, "fallback": {"rule": "adamw", "betas": [0.9, 0.95]}}
    recipe = hydra.utils.instantiate(OmegaConf.create({"_target_": "steepest.Recipe", **options}))
    partial = hydra.utils.instantiate(
        OmegaConf.create({"_target_": "steepest.Auto", "_partial_": True, **options})
    )
    again = pickle.loads(pickle.dumps(recipe))
    models = [mlp() for _ in range(4)]
    made = [recipe(models[0]), again(models[1]), partial(models[2].parameters())]
    made.append(steepest.build(models[3], **options))
    found = [trained(model, optimizer) for model, optimizer in zip(models, made, strict=True)]
    for each in found[:-1]:
        assert_same(each, found[-1])


def test_llm_foundrys_entry_point_takes_what_it_passes():
    """``build_optimizer`` calls the registered class with ``params=`` and the options of the YAML."""
    entries = tomllib.loads(PROJECT.read_text())["project"]["entry-points"]["llmfoundry_optimizers"]
    module, _, name = entries["steepest"].partition(":")
    kind = getattr(import_module(module), name)
    assert issubclass(kind, torch.optim.Optimizer)
    models = mlp(), mlp()
    made = kind(rule="muon", lr=1e-2, weight_decay=0.1, params=models[0].parameters())
    own = steepest.build(models[1], "muon", lr=1e-2, weight_decay=0.1)
    assert_same(trained(models[0], made), trained(models[1], own))


def test_litgpt_instantiates_by_class_path():
    utils = pytest.importorskip("litgpt.utils")
    models = mlp(), mlp()
    path = {"class_path": "steepest.Auto", "init_args": {"rule": "muon", "lr": 1e-2}}
    made = utils.instantiate_torch_optimizer(path, models[0].parameters())
    assert_same(trained(models[0], made), trained(models[1], steepest.build(models[1], "muon", lr=1e-2)))
