"""Hydra makes a recipe or a partial class from a configuration."""

import pickle

import pytest

import steepest

from .tiny import assert_same, mlp, state, train


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
    for model, optimizer in zip(models, made, strict=True):
        train(model, optimizer)
    for model in models[:-1]:
        assert_same(state(model), state(models[-1]))
