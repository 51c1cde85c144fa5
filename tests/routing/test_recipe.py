"""A recipe is build() without the model: it pickles, and refuses a typo when it is made."""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import pytest
import torch

import steepest
from loops import for_each

from .training import Transformer, same_bits, take_steps

OPTIONS: dict[str, Any] = {
    "lr": 0.02,
    "fallback": {"rule": "lion", "lr": 0.003},
    "overrides": {"*.norm.weight": {"weight_decay": 0.5}, "head.weight": "sgd"},
    "layer_decay": 0.75,
    "momentum": 0.9,
}


def _groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def test_it_makes_the_optimizer_that_build_makes():
    model, twin = Transformer(), Transformer()
    recipe = pickle.loads(pickle.dumps(steepest.Recipe("muon", **OPTIONS)))
    made, built = recipe(model), steepest.build(twin, "muon", **OPTIONS)
    assert _groups(made) == _groups(built)
    assert str(made.explain()) == str(built.explain())
    assert type(made) is type(built)
    take_steps(made, model)
    take_steps(built, twin)
    assert same_bits(model, twin)


def test_more_options_take_precedence_and_are_checked_too():
    recipe = steepest.Recipe("muon", lr=0.5)
    assert recipe(Transformer(), lr=0.25).param_groups[0]["lr"] == 0.25
    assert recipe.options == {"lr": 0.5}
    assert recipe(Transformer(), rule="lion").param_groups[0]["rule"] == "lion"
    with pytest.raises(TypeError, match=r"'momentun' \(did you mean 'momentum'\?\)"):
        recipe(Transformer(), momentun=0.9)


@pytest.mark.parametrize("first", [steepest.Recipe, steepest.Recipe("muon", lr=0.5)])
def test_trainers_that_call_a_factory_first_without_arguments(first: Any):
    """Transformers 5: ``optimizer_cls()(model, **kwargs)`` for all that is no optimizer's class."""
    assert not (inspect.isclass(first) and issubclass(first, torch.optim.Optimizer))
    for given in ((Transformer(),), (Transformer(), object())):  # Axolotl adds its training arguments
        optimizer = first()(*given, rule="muon", lr=0.125)
        assert type(optimizer).__name__ == "Muon+AdamW"
        assert optimizer.param_groups[0]["lr"] == 0.125


def test_callers_that_name_the_argument_params_or_pass_the_iterator():
    recipe, model = steepest.Recipe("muon"), Transformer()
    expected = _groups(recipe(model))
    assert _groups(recipe(params=model.parameters())) == expected
    assert _groups(recipe(model.named_parameters())) == expected
    with pytest.raises(TypeError, match=r"Recipe needs the model.*list of Parameter"):
        recipe(list(model.parameters()))


@for_each(
    ("error", "match", "rule", "options"),
    [
        (TypeError, "'momentun' .did you mean 'momentum'", "muon", {"momentun": 0.9}),
        (TypeError, "'learning_rate' .did you mean 'lr'", "muon", {"learning_rate": 0.1}),
        (TypeError, "'wd' .did you mean 'weight_decay'", "lion", {"wd": 0.1}),
        (TypeError, "'beta1' .did you mean 'betas'", "adamw", {"beta1": 0.9}),
        (TypeError, "'fallbak' .did you mean 'fallback'", "muon", {"fallbak": "adamw"}),
        (TypeError, "fallback: 'beta' is no option", "muon", {"fallback": {"rule": "adamw", "beta": 1}}),
        (TypeError, "overrides.'x'.: 'lrr' is no option", "muon", {"overrides": {"x": {"lrr": 1.0}}}),
        (TypeError, "'e' is no option of 'lion'", "adamw", {"overrides": {"x": {"rule": "lion", "e": 1}}}),
        (TypeError, "overrides must be a dict", "muon", {"overrides": ["x"]}),
        (TypeError, "views must be a dict", "muon", {"views": "rows"}),
        (TypeError, "decay_vectors must be", "muon", {"decay_vectors": "yes"}),
        (TypeError, "ternary must be", "muon", {"ternary": "yes"}),
        (TypeError, "layer_decay must be a number", "muon", {"layer_decay": "0.75"}),
        (TypeError, "takes no model", "muon", {"model": Transformer}),
        (ValueError, "layer_decay must be a number in .0, 1.", "muon", {"layer_decay": 1.5}),
        (ValueError, "memory must be None or 'least'", "muon", {"memory": "most"}),
        (ValueError, "unknown rule 'moun' .did you mean 'muon'", "moun", {}),
        (ValueError, "unknown rule 'lino'", "muon", {"overrides": {"x": "lino"}}),
        (ValueError, "lr must be a finite number", "muon", {"lr": -1.0}),
    ],
)
def test_what_is_wrong_without_a_model_is_refused_without_one(
    error: type[Exception], match: str, rule: str, options: dict[str, Any]
):
    with pytest.raises(error, match=match):
        steepest.Recipe(rule, **options)


def test_an_override_may_name_an_option_of_any_rule_that_it_may_meet():
    overrides = {"head.*": "lion", "head.weight": {"betas": (0.9, 0.95)}}
    optimizer = steepest.Recipe("muon", overrides=overrides)(Transformer())
    assert [group["betas"] for group in optimizer.param_groups if group["rule"] == "lion"] == [
        (0.9, 0.95),
        (0.9, 0.99),
    ]


def test_it_shows_and_compares_by_what_it_holds():
    assert repr(steepest.Recipe("muon", lr=0.5)) == "Recipe('muon', lr=0.5)"
    assert steepest.Recipe(lr=0.5) == steepest.Recipe("muon", lr=0.5)
    assert steepest.Recipe(lr=0.5) != steepest.Recipe("muon", lr=0.25)
