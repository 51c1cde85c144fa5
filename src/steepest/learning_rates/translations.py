"""From AdamW's learning rate and weight decay to another rule's: a table of measured translations."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from steepest.hyperparameters import at_least, positive
from steepest.registry import optimizer_class

__all__ = ["TRANSLATIONS", "Translation", "from_adamw"]


@dataclass(frozen=True)
class Translation:
    """One source's translation of AdamW's options into a rule's.

    Attributes:
        to: the rule's name.
        lr: what AdamW's learning rate is multiplied by.
        weight_decay: what AdamW's weight decay is multiplied by; None leaves the rule its own.
        source: ``"sweep: text"``, ``"sweep: digits"``, or a paper.
        valid: the range of AdamW's learning rates, both ends included, for which the source speaks.
        options: the rule's other options, as the source had them.
    """

    to: str
    lr: float
    weight_decay: float | None
    source: str
    valid: tuple[float, float]
    options: Mapping[str, Any] = field(default_factory=dict)


# Half a decade to either side of AdamW's best learning rate on the task.
_TASKS = {"text": (0.00056, 0.0056), "digits": (0.018, 0.18)}

# rule -> multipliers of the learning rate on the two tasks, and the options. benchmarks/learning_rates.jsonl
# has the trials, and a test computes the numbers from them.
_SWEEP: dict[str, tuple[float, float, dict[str, Any]]] = {
    "adamw": (1.0, 1.0, {"betas": (0.9, 0.999)}),
    "ademamix": (1.0, 1.0, {"betas": (0.9, 0.999, 0.9999)}),
    "hyperball": (18.0, 1.0, {"momentum": 0.95}),
    "lion": (0.31, 0.57, {"betas": (0.9, 0.99)}),
    "muon": (10.0, 1.0, {"momentum": 0.95}),
    "normuon": (10.0, 1.0, {"momentum": 0.95}),
    "polargrad": (180.0, 5.7, {"momentum": 0.95}),
    "procrustes": (5.6, 1.0, {"momentum": 0.95}),
    "quad": (5.6, 1.0, {"momentum": 0.95}),
    "scion": (0.31, 0.18, {"momentum": 0.9, "radius": 50.0}),
    "sgd": (56.0, 18.0, {"weight_decay_method": "decoupled"}),
    "sgd_sai": (1.0, 1.8, {"momentum": 0.9}),
    "signgsd": (1.8, 0.57, {"weight_decay_method": "decoupled"}),
    "signum": (0.31, 0.57, {"momentum": 0.9}),
    "simba": (1.0, 0.18, {}),
    "simba_leaky": (0.31, 0.1, {}),
    "soap": (5.6, 0.57, {"betas": (0.95, 0.95)}),
}
# Their decay is a part of the rule: the norm is held, or λ = 1 keeps the weights within a ball.
_OWN_DECAY = frozenset({"hyperball", "scion"})

_PAPERS = (
    Translation(
        "lion",
        0.2,
        5.0,
        "Chen et al. 2023, arXiv 2302.06675: 3 to 10 times smaller, and a decay larger by the same factor",
        (1e-5, 1e-3),
        MappingProxyType({"betas": (0.9, 0.99)}),
    ),
    Translation(
        "muon",
        1.0,
        1.0,
        "Liu et al. 2025, arXiv 2502.16982: AdamW's own, with the scale that matches its rms",
        (1e-5, 1e-3),
        MappingProxyType({"momentum": 0.95, "scale": "match_rms_adamw"}),
    ),
    Translation(
        "adam_mini",
        1.0,
        1.0,
        "Zhang et al. 2024, arXiv 2406.16793: AdamW's own",
        (1e-5, 1e-3),
    ),
)

# Rules that can have no translation, and the reasons.
_WITHOUT = {
    "orthogonalized": "its step is as long as your orthogonalize() or scaled_orthogonalize_fn makes it",
    "ternary_flip": "it has no learning rate; its threshold says how many votes flip a weight",
}


def _swept() -> tuple[Translation, ...]:
    """Return a translation for each rule and task; the product of learning rate and weight decay stays."""
    return tuple(
        Translation(
            rule,
            factor,
            None if rule in _OWN_DECAY else 1 / factor,
            f"sweep: {task}",
            valid,
            MappingProxyType(options),
        )
        for rule, (*factors, options) in _SWEEP.items()
        for factor, (task, valid) in zip(factors, _TASKS.items(), strict=True)
    )


TRANSLATIONS: tuple[Translation, ...] = (*_swept(), *_PAPERS)
"""All translations; where several are valid, :func:`from_adamw` takes the first."""


def from_adamw(lr: float, weight_decay: float = 0.0, *, to: str) -> dict[str, Any]:
    r"""Translate AdamW's learning rate and weight decay, which work, into another rule's options.

    AdamW's best learning rate is not another rule's, not even where the updates have the same rms. The
    multipliers are measured, by a sweep on two small tasks or by a paper (docs/learning_rates.md), and valid
    in a range of AdamW's learning rates: :data:`steepest.learning_rates.TRANSLATIONS`. The sweep was of short
    trainings of models with up to 0.27 million parameters. It is a place to start a search from.

    The product of learning rate and weight decay is kept, and with it how many steps the weights remember,
    :math:`1/(\eta\lambda)` (Wang and Aitchison, arXiv 2405.13698). Hyperball and Scion keep their own decay.

    For a rule for hidden matrices, the sweep had everything else with AdamW as it was; so does
    ``steepest.build(model, "muon", fallback={"rule": "adamw", "lr": lr, "weight_decay": weight_decay},
    **steepest.from_adamw(lr, weight_decay, to="muon"))``. Without ``fallback``, AdamW
    gets Muon's values.

    Args:
        lr: AdamW's learning rate, > 0: the peak of its schedule. The schedule stays.
        weight_decay: AdamW's decoupled weight decay, ≥ 0.
        to: the rule's name, as for :func:`steepest.create`.

    Returns:
        Options of the rule, for :func:`steepest.create`, :func:`steepest.build` or a param group.

    Raises:
        ValueError: an unknown name, or a rule without a translation; a value out of range.

    Warns:
        UserWarning: no source covers this learning rate; the nearest one is used.

    >>> options = from_adamw(3e-4, 0.1, to="lion")
    >>> {name: round(value, 6) for name, value in options.items() if name != "betas"}
    {'lr': 6e-05, 'weight_decay': 0.5}
    >>> import torch
    >>> from steepest import create
    >>> optimizer = create("lion", [torch.nn.Parameter(torch.ones(3))], **options)
    """
    positive().check("from_adamw()", "lr", lr)
    at_least(0).check("from_adamw()", "weight_decay", weight_decay)
    rule = to if to in _WITHOUT else optimizer_class(to).rule.name
    known = [each for each in TRANSLATIONS if each.to == rule]
    if not known:
        why = _WITHOUT.get(rule, "nobody has measured one; steepest.suggest_lr measures a learning rate")
        raise ValueError(f"from_adamw(): there is no translation to {rule!r}: {why}")
    found = min(known, key=lambda each: _distance(lr, each.valid))
    if _distance(lr, found.valid) > 0:
        low, high = found.valid
        warnings.warn(
            f"from_adamw(): no source covers {rule!r} at AdamW's lr={lr:g}; the nearest, which is used "
            f"({found.source}), covers {low:g} to {high:g}. steepest.suggest_lr measures a learning rate",
            UserWarning,
            stacklevel=2,
        )
    options = {"lr": lr * found.lr, **found.options}
    if found.weight_decay is not None:
        options["weight_decay"] = weight_decay * found.weight_decay
    return options


def _distance(lr: float, valid: tuple[float, float]) -> float:
    """Return by how much, as a logarithm, a learning rate lies outside a range; 0 within it."""
    low, high = valid
    return max(math.log(low / lr), math.log(lr / high), 0.0)
