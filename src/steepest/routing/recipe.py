"""Recipe: the arguments of build(), checked and kept until there is a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steepest.routing.build import build
from steepest.routing.model import model_of
from steepest.routing.options import check_options

__all__ = ["Recipe"]


class Recipe:
    """The arguments of :func:`steepest.build` without the model: a factory that pickles.

    ``recipe(model)`` returns the optimizer that ``steepest.build(model, rule, **options)`` does. Frameworks
    that make the optimizer themselves take a recipe where they take a factory or a class path:

    - Transformers 5 and Axolotl: ``optimizer_cls_and_kwargs=(steepest.Recipe, {"rule": "muon"})``, or
      ``(recipe, {})``: they call the first without arguments, and the result with the model.
    - Hydra: ``_target_: steepest.Recipe`` with the options, then ``instantiate(cfg.optimizer)(model)``.

    Args:
        rule: name of the main rule.
        **options: all other arguments of :func:`steepest.build`.

    Raises:
        TypeError: an option that neither ``build`` nor the rule knows; at once, not with the model.
        ValueError: an unknown rule, or a value out of range.

    >>> from torch import nn
    >>> recipe = Recipe("muon", lr=1e-3, fallback={"rule": "adamw", "weight_decay": 0.1})
    >>> type(recipe(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))).__name__
    'Muon+AdamW'
    >>> Recipe("muon", momentun=0.9)
    Traceback (most recent call last):
    TypeError: build() got an unexpected keyword argument 'momentun' (did you mean 'momentum'?): ...
    """

    def __init__(self, rule: str = "muon", **options: Any) -> None:
        hyper = dict(options)
        views, decay_vectors = hyper.pop("views", None), hyper.pop("decay_vectors", False)
        if not (views is None or isinstance(views, Mapping)):
            raise TypeError(f"views must be a dict whose keys are patterns of parameter names, got {views!r}")
        if not isinstance(decay_vectors, bool):
            raise TypeError(f"decay_vectors must be True or False, got {decay_vectors!r}")
        for name in hyper.keys() & {"model", "params"}:
            raise TypeError(f"Recipe() takes no {name}: call the recipe with it")
        check_options(rule, (), **hyper)
        self.rule = rule
        self.options = options

    def __call__(
        self, model: Any = None, training_args: Any = None, /, *, params: Any = None, **more: Any
    ) -> Any:
        """Make the optimizer.

        Args:
            model: the model, or an unread ``model.parameters()``. Without any, the recipe itself is returned,
                with ``more`` added: some frameworks call a factory's class first.
            training_args: not used; Axolotl passes its own to every factory.
            params: the same, for callers that pass it by this name.
            **more: options that take precedence over the recipe's; ``rule`` among them.
        """
        recipe = Recipe(**{"rule": self.rule, **self.options, **more}) if more else self
        given = params if model is None else model
        if given is None:
            return recipe
        return build(model_of("Recipe", given), recipe.rule, **recipe.options)

    def __repr__(self) -> str:
        options = [f"{name}={value!r}" for name, value in self.options.items()]
        return f"Recipe({', '.join([repr(self.rule), *options])})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Recipe):
            return NotImplemented
        return (self.rule, self.options) == (other.rule, other.options)

    __hash__ = None  # type: ignore[assignment]
