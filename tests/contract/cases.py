"""The table: every registered rule with its defaults, and the option variants worth running besides."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

import steepest
from steepest.registry import find_rule
from steepest.rule import Rule

__all__ = ["CASES", "LR", "RULES", "Case", "by_id", "deterministic"]

LR = 0.03

# Options that make another code path of a rule. A rule that is not listed runs with its defaults.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "adamw": [{"amsgrad": True}],
    "sgd": [
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "dampening": 0.5},
    ],
    "sgd_sai": [
        {"normalize": "max"},
        {"momentum": 0.0},
        {"warmup_batches": 3, "relative_eps": True},
        {"scale": "sqrt_numel"},
    ],
    "signgsd": [{"decay_overshoot": True, "weight_decay": 0.1}],
    "simba": [
        {"window_size": 3, "counter_dtype": torch.int8},
        {"memory": "momentum"},
        {"choice": "lion"},
        {"memory": "momentum", "choice": "memory"},
        {"leak": 0.125},
    ],
}


@dataclass(frozen=True)
class Case:
    """A rule's name and the options that it is made with."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        words = [f"{name}={str(value).removeprefix('torch.')}" for name, value in self.options.items()]
        return "-".join([self.name, *words])

    @property
    def rule(self) -> Rule:
        """The rule that serves the case's groups."""
        return find_rule("simba_leaky" if "leak" in self.options else self.name)

    def make(self, params: Any, **options: Any) -> steepest.Optimizer:
        """The optimizer, with a learning rate that moves a bfloat16 and that no float holds exactly."""
        return steepest.create(self.name, params, **{"lr": LR, **self.options, **options})


def deterministic(case: Case) -> bool:
    """Whether the rule draws no noise of its own, so that a parameter's place does not matter."""
    return "noise" not in case.rule.takes


def by_id(case: Case) -> str:
    """The case in a test's name."""
    return str(case)


def _variants(rules: Iterable[Case]) -> list[Case]:
    return [Case(rule.name, options) for rule in rules for options in VARIANTS.get(rule.name, [])]


RULES = [Case(name) for name in steepest.list_optimizers()]
CASES = [*RULES, *_variants(RULES)]
