"""The table: every registered rule with its defaults, variants worth running, and what cannot apply.

Promises of the engine are not checked for every rule times every dtype times every option. Cases that are
alike (:func:`kind`, :func:`reach`) go the same way through the engine: :func:`spread` crosses one of them
with everything and gives every other one combination, each another.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import Parameter

import steepest
from steepest.linalg import newton_schulz
from steepest.rule import Rule, find_rule

from .training import SHAPES, make_params, steps

__all__ = [
    "CASES",
    "LOW_BIT",
    "LR",
    "PECULIAR",
    "RULES",
    "Case",
    "LowBit",
    "able",
    "by_id",
    "cannot",
    "deterministic",
    "kind",
    "one_of_each",
    "reach",
    "related",
    "spread",
    "with_dtypes",
]

LR = 0.03

# Options that make another code path of a rule. A rule that is not listed runs with its defaults.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "adamw": [{"amsgrad": True}],
    "ademamix": [{"t_alpha_beta3": 3}],
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
    "orthogonalized": [{"use_nesterov": True, "scaled_orthogonalize_fn": newton_schulz}],
    "muon": [{"nesterov": False, "method": "svd"}, {"view": "batch"}, {"bucket_bytes": 1}],
    "normuon": [{"view": "batch"}],
    "hyperball": [{"radius": 2.0}],
    "soap": [{"precondition_frequency": 2, "max_precond_dim": 3}, {"precondition_frequency": 1}],
    "quad": [{"literal": True}, {"update_probability": 0.5, "update_flat_steps": 1, "update_decay_steps": 0}],
    "procrustes": [
        {"whiten": "gradient", "max_size_dense": 3},
        {"update_probability": 0.5, "update_flat_steps": 1, "update_decay_steps": 0},
    ],
}

# What else a rule cannot do, and why: what does not follow from its phases and options (:func:`cannot`).
PECULIAR: dict[str, dict[str, str]] = {
    "orthogonalized": {
        "independent decay": "it takes the mixin's names with the mixin's meanings: untied from lr",
        "unknown keywords": "they become options of its groups, for subclasses to read",
    },
    "hyperball": {
        "weight_decay": "the norm is held, so that nothing decays",
        "zeros": "a matrix of zeros has no norm to hold",
        "infinite weights": "their norm cannot be held, nor one that overflows: they become NaN",
    },
}


def cannot(rule: Rule) -> dict[str, str]:
    """What a rule cannot do, and why; test_inapplicable.py holds it against what every rule really does."""
    found = dict(PECULIAR.get(rule.name, {}))
    if rule.transforms:
        found["complex"] = "the pairs of a complex matrix are not a matrix of pairs; element rules take both"
    if not rule.vectors:
        found["vectors"] = "a vector has no polar factor: it belongs to an element rule"
    if not {"momentum", "momentum_beta", "betas"} & set(rule.hyper):
        found["cycled momentum"] = "it has no momentum that a scheduler could cycle"
    if rule.host_sync(rule.defaults()):
        found["quiet steps"] = "the host reads a device's numbers in each of its steps"
    if "dtype" in rule.hyper:
        found["wide products"] = "its products are in the gradient's dtype, unless dtype= says more"
    return found


@dataclass(frozen=True)
class Case:
    """A rule's name and the options that it is made with."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        words = [
            f"{name}={getattr(value, '__name__', str(value).removeprefix('torch.'))}"
            for name, value in self.options.items()
        ]
        return "-".join([self.name, *words])

    @property
    def rule(self) -> Rule:
        """The rule that serves the case's groups."""
        return find_rule("simba_leaky" if "leak" in self.options else self.name)

    @property
    def cannot(self) -> dict[str, str]:
        """What does not apply to the rule, with the reasons."""
        return cannot(self.rule)

    def can(self, **options: Any) -> dict[str, Any]:
        """The options without those that do not apply to the rule."""
        return {name: value for name, value in options.items() if name not in self.cannot or not value}

    def make(self, params: Any, **options: Any) -> steepest.Optimizer:
        """The optimizer, with a learning rate that moves a bfloat16 and that no float holds exactly.

        An option that cannot apply is left out.
        """
        with warnings.catch_warnings():
            # The family's base is an identity until it is told what to do, and says so.
            warnings.filterwarnings("ignore", ".*the momentum is used as it is", UserWarning)
            return steepest.create(self.name, params, **{"lr": LR, **self.options, **self.can(**options)})

    def wide(self, dtype: torch.dtype) -> dict[str, Any]:
        """The option that makes a rule compute all of a parameter of this dtype in float32 at least."""
        return {"dtype": torch.promote_types(dtype, torch.float32)} if "wide products" in self.cannot else {}

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape, or what holds as many elements where the rule takes no vectors: a column."""
        if len(shape) < 2 and "vectors" in self.cannot:
            return (math.prod(shape), 1)
        return tuple(shape)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of three parameters: a matrix, a vector and a scalar, or matrices, two of them alike."""
        if "vectors" not in self.cannot:
            return SHAPES
        return ((2, 4, 3) if self.options.get("view") == "batch" else (4, 3), (4, 3), (1, 5))

    def params(
        self,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        shapes: Iterable[Sequence[int]] | None = None,
    ) -> list[Parameter]:
        """Parameters with fixed values, as ``make_params`` gives, that the rule can serve."""
        wanted = self.shapes if shapes is None else [self.shape(shape) for shape in shapes]
        return make_params(dtype, device, wanted)

    def ones(self, *shape: int, dtype: torch.dtype = torch.float32) -> Parameter:
        """A parameter of ones."""
        return Parameter(torch.ones(self.shape(shape), dtype=dtype))

    def factors(self, optimizer: torch.optim.Optimizer, param: Parameter) -> set[str]:
        """The names of the parameter's state that has not its shape, nor is one number for any rule."""
        return set(optimizer.state[param]) - set(self.rule.state_specs(optimizer.param_groups[0])) - {"step"}

    @property
    def tensor_state(self) -> set[str]:
        """The names of the state that is one number for a whole parameter, but for the step count."""
        specs = self.rule.state_specs({**self.rule.defaults(), **self.options})
        return {name for name, spec in specs.items() if spec.per == "tensor"}


@dataclass(frozen=True)
class LowBit(Case):
    """A case with matrices that are large enough to be stored in one byte, beside tensors that are not."""

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of three parameters: with blocks of 64, of 32, and without."""
        return ((64, 64), (48, 96), self.shape((5,)))


def deterministic(case: Case) -> bool:
    """Whether the rule draws no noise of its own, so that a parameter's place does not matter."""
    return (case.rule.takes | case.rule.transform_takes).isdisjoint({"noise", "key"})


def related(case: Case) -> bool:
    """Whether what a tensor does depends on its neighbours, by design."""
    return case.options.get("normalize") == "max" or bool(case.options.get("literal"))


def by_id(case: Case) -> str:
    """The case in a test's name."""
    return str(case)


def able(cases: Iterable[Case], *what: str) -> list[Case]:
    """The cases to which all of this applies."""
    return [case for case in cases if not case.cannot.keys() & set(what)]


_KINDS: dict[str, frozenset[str]] = {}


def kind(case: Case) -> frozenset[str]:
    """What the engine has to keep and to bring for a case: its state's sorts and dtypes, noise, matrices."""
    if str(case) not in _KINDS:
        params = case.params()
        optimizer = case.make(params)
        steps(optimizer, params, range(2))
        found = {"no vectors"} & {f"no {what}" for what in case.cannot}
        found |= set() if deterministic(case) else {"noise"}
        # The first parameter is a matrix, so that one number for all of it shows.
        for name, value in optimizer.state[params[0]].items():
            if name == "step":
                found.add(name)
            elif value.shape == params[0].shape:
                found.add(str(value.dtype))
            else:
                found.add("number" if value.dim() == 0 else "factor")
        _KINDS[str(case)] = frozenset(found)
    return _KINDS[str(case)]


def reach(case: Case) -> frozenset[str]:
    """How much of a parameter the rule has to see at once, and whether it draws noise; whatever its state."""
    return kind(case) & {"number", "factor", "no vectors", "noise"}


def one_of_each(cases: Iterable[Case], alike: Callable[[Case], Hashable] = kind) -> list[Case]:
    """The first of all cases that are alike: they go the same way through the engine."""
    first: dict[Hashable, Case] = {}
    for case in cases:
        first.setdefault(alike(case), case)
    return list(first.values())


def spread(
    cases: Iterable[Case], *axes: Iterable[Any], alike: Callable[[Case], Hashable] = kind
) -> list[tuple[Any, ...]]:
    """Combinations of cases and values: all for the first of the cases that are alike, one for the others.

    A complex dtype goes only to cases that can take it.
    """
    cases, combinations = list(cases), list(itertools.product(*axes))
    crossed, made = one_of_each(cases, alike), []
    for at, case in enumerate(cases):
        fit = [each for each in combinations if "complex" not in case.cannot or not any(map(_complex, each))]
        made += [(case, *each) for each in (fit if case in crossed else [fit[at % len(fit)]])]
    return made


def _complex(value: Any) -> bool:
    return isinstance(value, torch.dtype) and value.is_complex


def with_dtypes(cases: Iterable[Case], dtypes: Sequence[torch.dtype]) -> list[tuple[Case, torch.dtype]]:
    """Every case with every dtype; complex ones where they apply."""
    return [
        (case, dtype)
        for case in cases
        for dtype in dtypes
        if not (_complex(dtype) and "complex" in case.cannot)
    ]


def _variants(rules: Iterable[Case]) -> list[Case]:
    return [Case(rule.name, options) for rule in rules for options in VARIANTS.get(rule.name, [])]


RULES = [Case(name) for name in steepest.list_optimizers()]
CASES = [*RULES, *_variants(RULES)]

_INT8: dict[str, Any] = {"state_dtype": "int8"}
# Averages in one byte, masters in pieces, and both: all go their own way through the engine.
LOW_BIT: list[tuple[Case, torch.dtype]] = [
    (LowBit("lion", _INT8), torch.float32),
    (LowBit("adamw", {**_INT8, "amsgrad": True}), torch.complex64),
    (LowBit("adamw", {**_INT8, "master": "split8"}), torch.bfloat16),
    (LowBit("sgd_sai", {**_INT8, "master": "split16"}), torch.float16),
    (LowBit("simba", {"master": "split8"}), torch.float16),
    (LowBit("muon", {**_INT8, "master": "split8"}), torch.bfloat16),
    (LowBit("hyperball", {**_INT8, "master": "split16"}), torch.bfloat16),
]
