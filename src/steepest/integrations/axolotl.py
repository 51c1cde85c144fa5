"""Axolotl: a plugin that trains with the optimizer that the config's ``steepest`` section describes."""

from __future__ import annotations

import re
from typing import Any

from steepest.integrations.failed_import import failed_import

try:
    from axolotl.integrations.base import BasePlugin
    from pydantic import BaseModel
except ImportError as error:
    raise failed_import(__name__, ["axolotl"], error) from error

from steepest.integrations.transformers import SteepestCallback
from steepest.routing import Recipe

__all__ = ["SteepestArgs", "SteepestPlugin"]

# Axolotl's own ways to give layers other learning rates, which only its own optimizers read.
_IGNORED = ("lr_groups", "loraplus_lr_ratio", "embedding_lr", "embedding_lr_scale")
# To YAML 1.1, which Axolotl reads, a number with an exponent but without a point or a sign is text: 1e-3.
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


class SteepestArgs(BaseModel):  # type: ignore[misc, unused-ignore]
    """What the plugin adds to Axolotl's config."""

    # The options of steepest.Recipe.
    steepest: dict[str, Any] | None = None


class SteepestPlugin(BasePlugin):  # type: ignore[misc]
    """Train with ``steepest.Recipe(**cfg.steepest)``.

    .. code-block:: yaml

        plugins: [steepest.integrations.axolotl.SteepestPlugin]
        learning_rate: 1e-3
        weight_decay: 0.1
        steepest: {rule: muon, fallback: adamw}

    The learning rate and weight decay are the config's own unless the section has others; its ``optimizer``
    is not used. :class:`~steepest.integrations.transformers.SteepestCallback` is added.

    Raises:
        TypeError, ValueError: once the trainer is made, as :class:`steepest.Recipe`; ``lr_groups``,
            ``loraplus_lr_ratio``, ``embedding_lr`` and ``embedding_lr_scale``, which would do nothing.
    """

    def get_input_args(self) -> str:
        """Return the path of :class:`SteepestArgs`."""
        return f"{__name__}.{SteepestArgs.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Have the trainer make its optimizer by the recipe, when the model is where it will train."""
        for name in _IGNORED:
            if cfg.get(name) is not None:
                raise ValueError(f"{name} has no effect with SteepestPlugin: use overrides in steepest:")
        given = {"lr": cfg.get("learning_rate"), "weight_decay": cfg.get("weight_decay")}
        options = {name: float(value) for name, value in given.items() if value is not None}
        recipe = Recipe(**{**options, **_plain(cfg.get("steepest") or {})})
        trainer.optimizer_cls_and_kwargs = (_Factory(recipe), {})

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[SteepestCallback]:
        """Return the callback."""
        return [SteepestCallback()]


def _plain(value: Any) -> Any:
    """Return a part of the config as plain dicts and lists, with its numbers as numbers."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


class _Factory:
    """A recipe as Axolotl calls it: first without arguments, then with the model and TrainingArguments."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def __call__(self, model: Any = None, *training_arguments: Any) -> Any:
        return self if model is None else self._recipe(model)
