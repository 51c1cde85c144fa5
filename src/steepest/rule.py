"""Rules: the equations of optimizers, as pure functions of tensors without loops, devices or learning rates.

A rule has the phases whose methods it overrides: ``measure``, ``update``, ``transform`` and ``retract``, or
``move``. The engine depends only on a rule's phases, never on which rule it runs.
"""

from __future__ import annotations

import inspect
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from steepest.arithmetic import Scalar
from steepest.formats.int8 import Range
from steepest.hyperparameters import (
    COMMON_DEFAULTS,
    COMMON_OPTIONS,
    CommonOptions,
    Hyperparameter,
    StateDtype,
    at_least,
    choice,
    count,
    integer,
    is_int8,
    learning_rate,
    near_miss,
)
from steepest.views import View, check_view, fused_parameters

__all__ = [
    "LEARNING_RATES",
    "MATRIX_DEFAULTS",
    "STATE_FORMAT",
    "VERSION",
    "Group",
    "MatrixOptions",
    "Moments",
    "Noise",
    "Rule",
    "Scalar",
    "StateSpec",
    "States",
    "Targets",
    "find_rule",
    "register_rule",
    "rules_with",
]

Group = Mapping[str, Any]
States = Mapping[Tensor, Mapping[str, Any]]
Noise = Callable[[int], Tensor]

# DeepSpeed ZeRO 3 and FSDP1 mark flattened or partitioned parameters with these attributes.
_FLAT = ("ds_id", "ds_tensor", "_is_flat_param", "_fsdp_flattened")

# Options of every rule with ``transform``, because the engine cuts and stacks its matrices.
_MATRIX_HYPER = {
    "views": fused_parameters(),
    "bucket_bytes": integer(low=1),
    "distributed": choice(None, "owners", "everywhere"),
    "exchange_dtype": choice(None, torch.bfloat16, torch.float16, torch.float32, torch.float64),
}
# What the library itself keeps in a group.
STATE_FORMAT = "state_format"
"""The key of every group, and so of every checkpoint, with the version of how state is written."""

VERSION = 1
"""Checkpoints without a version are from before there were codes and corrections, and load as this one."""

LEARNING_RATES = ("lr", "base_lr", "initial_lr")
"""The keys of a group that hold learning rates: of the rule, of this library, of torch's schedulers."""

_BOOKKEEPING = {
    "base_lr": at_least(0),
    "initial_lr": learning_rate(),
    "skipped_steps": count(),
    STATE_FORMAT: choice(VERSION),
}
MATRIX_DEFAULTS = {"views": None, "bucket_bytes": 1 << 28, "distributed": None, "exchange_dtype": None}


class MatrixOptions(CommonOptions, total=False):
    """Keyword-only options of every optimizer whose rule has a ``transform`` phase.

    - ``views``: parameter names -> blocks (:mod:`steepest.views`) of fused parameters.
    - ``bucket_bytes``: bound, in bytes, on the working memory of matrices that are computed together.
    - ``distributed``: where the matrices of several processes are computed. ``"owners"``: each by one
      process, which sends the result to the others; None does so for sharded parameters (DTensors), while
      every process computes those that it has whole. ``"everywhere"``: every process receives all shards and
      computes all matrices.
    - ``exchange_dtype``: the dtype in which matrices travel; None is that of the computation.
      ``torch.bfloat16`` halves the bytes of float32, and rounds what a matrix function is given and returns.
    """

    views: Mapping[str, View] | None
    bucket_bytes: int
    distributed: Literal["owners", "everywhere"] | None
    exchange_dtype: torch.dtype | None


@dataclass(frozen=True)
class StateSpec:
    """A state entry as data, to count its bytes or choose its format without running the rule.

    Attributes:
        per: one entry for every ``"element"`` (in the parameter's layout), for the ``"tensor"`` (a 0-dim
            number on the CPU), or for every ``"matrix"`` that the rule sees.
        dtype: None means, per element, ``state_dtype`` or else the parameter's dtype; otherwise the
            parameter's dtype, or float32 if that is wider.
        shape: the shape of an entry per matrix.
        fill: the initial value; ``"identity"`` starts a square matrix as I.
        range: of an average per element whose values ``state_dtype="int8"`` may store as codes
            (:mod:`steepest.formats.int8`): ``"signed"`` or ``"nonnegative"``. None is never coded.
        beta: how much of a signed average a step keeps. Above 0.99 its codes are rounded stochastically.
        numbers: what the numbers of a small entry may be; a state dict with others is refused. None checks
            none, because reading large entries would take time.
    """

    per: Literal["element", "tensor", "matrix"] = "element"
    dtype: torch.dtype | None = None
    shape: tuple[int, ...] = ()
    fill: float | Literal["identity"] = 0.0
    range: Literal["signed", "nonnegative"] | None = None
    beta: float = 0.0
    numbers: Hyperparameter | None = None

    @property
    def coded(self) -> Range | None:
        """How ``state_dtype="int8"`` stores the entry; None if not as codes."""
        # At 0.999, increments are so far below a code that nearest ones lose a third of the direction.
        return "slow" if self.range == "signed" and self.beta > 0.99 else self.range

    def make(self, param: Tensor, state_dtype: StateDtype = None) -> Tensor:
        """Return the entry before the first step, for a parameter or a block of one, on any device.

        With ``"int8"`` this is what a tensor has that is not coded.
        """
        if self.per == "element":
            if not isinstance(state_dtype, torch.dtype) or is_int8(state_dtype):
                state_dtype = None if state_dtype is None else torch.promote_types(param.dtype, torch.float32)
            dtype = self.dtype or state_dtype or param.dtype
            return torch.zeros_like(param, dtype=dtype, requires_grad=False)
        dtype = self.dtype or torch.promote_types(param.dtype, torch.float32)
        if self.per == "tensor":
            return torch.full((), float(self.fill), dtype=dtype, device="cpu")
        if self.fill == "identity":
            return torch.eye(self.shape[0], dtype=dtype, device=param.device)
        return torch.full(self.shape, float(self.fill), dtype=dtype, device=param.device)


class Moments(NamedTuple):
    """Sums over all elements of a whole tensor, also if it is sharded; NaN if they are not finite.

    ``total``, the sum of the elements, is NaN also for a rule that does not set ``needs_total``.
    """

    numel: int
    total: Tensor
    square: Tensor


class Rule(ABC):
    """An optimizer's equation.

    A subclass sets ``name`` and ``hyper``, and writes ``state_specs`` and ``update``; ``measure``,
    ``transform`` and ``retract`` if it has these phases.

    Attributes:
        name: the name in the registry and in every param group that the rule serves.
        hyper: the rule's hyperparameters, ``lr`` and ``weight_decay`` among them, with their ranges. Those of
            :class:`MatrixOptions` come with the ``transform`` phase.
        own_defaults: their defaults, read from the constructor of the optimizer's class.
        weight_decay_method: the default of the common option.
        counts_steps: whether the equation needs the number of steps that a parameter has taken.
        conventions: the meaning of the state where libraries differ, by name. Every group, and so every
            checkpoint, records it; a group with another value is refused.
        hidden_only: whether :func:`steepest.build` gives the rule only matrices of hidden layers.
        optional_state: state that only some options need and that no method's signature names; a
            checkpoint may hold it even after such an option was switched off.
        vectors: whether a rule with ``transform`` takes parameters of fewer than two dimensions.
        temporaries: how many tensors of a chunk's size ``update`` and the step along u hold at once.
        working_copies: how many times the bytes of a matrix and its entries, in the compute dtype, are in use
            at once in ``transform``.
        spreads: the numbers by which ``update`` only multiplies gradients or state, and in which tensors
            differ: small tensors that are joined end to end have one for each element.
        streams: whether ``transform`` takes a few passes over its matrices, and no products of them.
        takes, transform_takes: the arguments that the signatures of ``update`` and ``transform`` name.
        measures, transforms, retracts, moves: whether the rule has these phases.
        has_scalars: whether the rule overrides :meth:`scalars`.
        needs_total: whether :meth:`measure` reads ``Moments.total``.
    """

    name: ClassVar[str]
    hyper: ClassVar[Mapping[str, Hyperparameter]]
    own_defaults: Mapping[str, Any] = MappingProxyType({})
    weight_decay_method: ClassVar[str] = "decoupled"
    counts_steps: ClassVar[bool] = False
    conventions: ClassVar[Mapping[str, str]] = MappingProxyType({})
    hidden_only: ClassVar[bool] = False
    optional_state: ClassVar[frozenset[str]] = frozenset()
    vectors: ClassVar[bool] = True
    temporaries: ClassVar[int] = 3
    working_copies: ClassVar[int] = 12
    streams: ClassVar[bool] = False
    spreads: ClassVar[frozenset[str]] = frozenset()
    takes: ClassVar[frozenset[str]] = frozenset()
    transform_takes: ClassVar[frozenset[str]] = frozenset()
    measures: ClassVar[bool] = False
    transforms: ClassVar[bool] = False
    retracts: ClassVar[bool] = False
    moves: ClassVar[bool] = False
    has_scalars: ClassVar[bool] = False
    needs_total: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Derive the rule's phases and their arguments from its methods."""
        super().__init_subclass__(**kwargs)
        cls.measures = cls.measure is not Rule.measure
        cls.transforms = cls.transform is not Rule.transform
        cls.retracts = cls.retract is not Rule.retract
        cls.moves = cls.move is not Rule.move
        cls.has_scalars = cls.scalars is not Rule.scalars
        if hasattr(cls, "hyper"):
            cls.hyper = {**(_MATRIX_HYPER if cls.transforms else {}), **cls.hyper}
            cls.takes = _wanted(cls, cls.update) - {"grad", "param"}
            cls.transform_takes = _wanted(cls, cls.transform) - {"u"} if cls.transforms else frozenset()

    @property
    def scope(self) -> Literal["element", "tensor", "matrix"]:
        """The smallest part of a parameter that the rule must see at once, derived from its phases."""
        return "matrix" if self.transforms else "tensor" if self.measures else "element"

    # -- options

    def defaults(self) -> dict[str, Any]:
        """Return the default of every hyperparameter and common option of a group of this rule."""
        return {**self.own_defaults, **COMMON_DEFAULTS, "weight_decay_method": self.weight_decay_method}

    def check(self, owner: str, group: Group) -> None:
        """Raise ``ValueError`` for values that are missing, out of range, or mutually exclusive."""
        options = {**self.hyper, **COMMON_OPTIONS}
        if missing := [name for name in options if name not in group]:
            raise ValueError(
                f"{owner}: {self.name!r} needs {', '.join(missing)}, which the group does not have: its rule "
                "cannot be changed by name alone; add_param_group() and new optimizers fill in the defaults"
            )
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"{owner}: Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
        for name, hyper in options.items():
            hyper.check(owner, name, group[name])
        for name, hyper in _BOOKKEEPING.items():
            if name in group:
                hyper.check(owner, name, group[name])
        for name, ours in self.conventions.items():
            if group.get(name, ours) != ours:
                raise ValueError(f"{owner}: {name} of {self.name!r} is {ours!r}, got {group[name]!r}")
        if self.transforms and group.get("state_device") is not None:
            raise ValueError(
                f"{owner}: state_device must be None for {self.name!r}, got {group['state_device']!r}: "
                "matrix products run on the accelerator, and their state must be there. Set it in groups of "
                'element rules (build: fallback={"rule": "adamw", "state_device": "cpu"})'
            )

    def check_param(self, who: str, name: str | None, param: Tensor, group: Group) -> None:
        """Raise ``ValueError``, beginning with ``who``, for a parameter that the rule cannot serve."""
        if self.scope != "element" and any(hasattr(param, mark) for mark in _FLAT):
            raise ValueError(
                f"{who} is flattened or partitioned (DeepSpeed ZeRO, FSDP1): {self.name!r} needs whole "
                "tensors. Use DistributedDataParallel or fully_shard (FSDP2), which keep the shapes, or an "
                "element rule, such as 'adamw', which takes any"
            )
        if self.scope != "element" and _cut_by_megatron(param):
            raise ValueError(
                f"{who} is a shard of Megatron's tensor parallelism: {self.name!r} needs whole tensors. Use "
                "an element rule, such as 'adamw', which takes any, or torch's parallelize_module, whose "
                "DTensors know the whole"
            )
        if param.dtype in (torch.float64, torch.complex128) and is_int8(group["state_dtype"]):
            coded = [entry for entry, spec in self.state_specs(group).items() if spec.range is not None]
            if coded:
                raise ValueError(
                    f"{who} has dtype {param.dtype}: state_dtype='int8' would store its {coded[0]} in eight "
                    "bits, with scales in float32; state_dtype=None keeps it in 64"
                )
        if not self.transforms:
            return
        if param.is_complex():
            raise ValueError(
                f"{who} is complex: {self.name!r} takes real parameters; element rules take both"
            )
        if not self.vectors and param.dim() < 2:
            built = (
                f"steepest.build(model, {self.name!r}) gives each tensor the right rule, embeddings and "
                "output layers too. By hand: give it to an"
                if self.hidden_only
                else "Give it to an"
            )
            raise ValueError(
                f"{who} has shape {tuple(param.shape)}: {self.name!r} takes matrices. {built} element rule, "
                "in a group of its own: {'params': [...], 'rule': 'adamw'}"
            )
        view = (group["views"] or {}).get(name)
        if view is not None:
            check_view(who, view, param.shape)

    def relates(self, group: Group) -> str | None:
        """Return the option that makes a step depend on all tensors of the group; None if there is none."""
        return None

    def host_sync(self, group: Group) -> str | None:
        """Return what makes the host wait for the device, which no CUDA graph can capture; or None."""
        return None

    def way(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, group: Group
    ) -> str | None:
        """Return how ``transform`` computes matrices of this shape, where that is chosen by timing."""
        return None

    def compute_dtype(self, group: Group) -> torch.dtype | None:
        """Return the dtype of the algebra if an option sets it; float64 is then not rounded on the way."""
        return None

    def working_bytes(self, dtype: torch.dtype, group: Group) -> int:
        """Return the bytes per element of a matrix and its entries in use at once in ``transform``."""
        return self.working_copies * dtype.itemsize

    def cost(self, shape: tuple[int, ...], group: Group) -> float:
        """Return roughly the flops of ``transform`` for matrices [..., m, n], by which work is shared out."""
        numel = math.prod(shape)
        return 16.0 * numel * (min(shape[-2:]) if len(shape) > 1 else 1)

    def counts_matrices(self, group: Group) -> bool:
        """Return whether the leading dimensions of a parameter count matrices."""
        return bool("view" in self.hyper and group["view"] == "batch")

    def rows_apart(self, group: Group) -> bool:
        """Return whether ``transform`` computes each row of a parameter [m, n] by itself.

        The engine may then cut such a parameter into rows: shards of rows do not travel, and large matrices
        of a rule that ``streams`` are stepped by some rows at a time. All entries of a matrix have a number
        for each row.
        """
        return False

    def decays_itself(self, group: Group) -> bool:
        """Return whether ``update`` applies the weight decay, so that the engine must not."""
        return False

    def moves_like_adamw(self, group: Group) -> bool:
        """Return whether updates have AdamW's rms, so that equal learning rates move parameters as far."""
        return False

    # -- state

    def state_specs(self, group: Group) -> dict[str, StateSpec]:
        """Return the entries per element and per tensor, under the group's current options."""
        return {}

    def matrix_specs(self, shape: tuple[int, ...], dtype: torch.dtype, group: Group) -> dict[str, StateSpec]:
        """Return the entries of one matrix of ``shape``, from a parameter of ``dtype``."""
        return {}

    def target_specs(self, target: Any, group: Group) -> dict[str, StateSpec]:
        """Return the entries of a parameter's target, with their shapes."""
        return {}

    def matrix_shape(self, shape: torch.Size, group: Group) -> tuple[int, ...]:
        """Return the shape [..., m, n] in which ``transform`` sees a parameter, or a block of a fused one."""
        return tuple(shape)

    # -- the step

    def scalars(self, step: Scalar, **hyper: Any) -> dict[str, Scalar]:
        """Return the numbers that depend on the step count (from 1), in float64, such as bias corrections.

        ``step`` is a float, or a tensor [n] of n parameters' counts if these are on a device: compute
        elementwise, without ``if``, ``min`` and ``max``.
        """
        return {}

    def needs_measure(self, group: Group) -> bool:
        """Return whether the ``measure`` phase has anything to do under the group's current options."""
        return True

    def needs_moments(self, state: Mapping[str, Tensor], group: Group) -> bool:
        """Return whether :meth:`measure` needs the gradient's sums in this step.

        They cost a pass over the gradient, and collectives if it is sharded: the result must not differ
        between processes.
        """
        return True

    def reads_back(self, state: Mapping[str, Tensor], group: Group) -> bool:
        """Return whether :meth:`measure` reads a device's numbers on the host; ``state`` starts empty."""
        return False

    def measure(
        self, moments: Moments | None, state: Mapping[str, Tensor], group: Group
    ) -> tuple[dict[str, Scalar], dict[str, Scalar]]:
        """Return one tensor's (scalars for ``update`` and ``transform``, new per-tensor state) in this step.

        ``moments`` are the gradient's, or None if :meth:`needs_moments` returned False.
        """
        raise NotImplementedError

    def relate(
        self, scalars: Sequence[dict[str, Scalar]], states: Sequence[Mapping[str, Any]], group: Group
    ) -> None:
        """Adjust the measured scalars of a group's tensors to one another, in place; see :meth:`relates`.

        ``states`` are those of every tensor in the optimizer that this rule has stepped so far.
        """
        raise NotImplementedError

    @abstractmethod
    def update(self, grad: Tensor, param: Tensor, *args: Any, **given: Any) -> tuple[Any, dict[str, Tensor]]:
        """Return (u, new state): the direction that the engine scales by lr and subtracts, and new entries.

        With a ``transform`` phase, u is its input: a tensor, or :meth:`transform_inputs` of them.

        The signature of a subclass names the arguments that it needs: state entries (cast to the compute
        dtype; with ``transform`` also matrix entries that hold one number), hyperparameters (``**options``
        takes all but lr and weight decay), entries of :meth:`scalars` and :meth:`measure`, and ``noise``, a
        function from a stream number to uniform [0, 1) noise of grad's shape. Scalars are floats, or 0-dim
        tensors when compiled. Use only elementwise torch operations, and none that fuse a product and a sum
        (:mod:`steepest.arithmetic`). ``update`` may overwrite entries per element, and returning an
        overwritten one saves a copy; it must change neither ``grad`` nor ``param``.
        """

    def transform_inputs(self, group: Group) -> int:
        """Return how many tensors ``update`` passes to ``transform``."""
        return 1

    def transform(self, u: Tensor, *args: Any, **given: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (direction, new matrix entries) of stacked matrices u [batch, ..., m, n]; may overwrite u.

        The signature names the arguments, as for ``update``: stacked matrix entries, in the state's dtype;
        ``key`` and ``index`` for noise (two words [batch, 1, ...], and a function of two slices, of rows and
        of columns, all by default, that returns their elements' places in the parameters); ``param``, the
        stacked parameters; ``grad_dtype``; ``orthogonalize``, the optimizer's own matrix function or None.
        Scalars derived from a step count on a device are
        tensors, 0-dim for one matrix, [batch] for a stack.
        """
        raise NotImplementedError

    def retract(self, param: Tensor, before: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """Bring stepped matrices back onto the set that they were on ``before`` the step.

        ``state`` holds the new entries that ``transform`` returned.
        """
        raise NotImplementedError

    def move(self, target: Any, state: MutableMapping[str, Any], group: Group) -> None:
        """Move a parameter's *target*, the object that it stands for, and count its steps, in place.

        A rule with this phase has no others.
        """
        raise NotImplementedError


class Targets(Protocol):
    """The targets of parameters whose rule has the phase ``move``; an optimizer keeps one such object."""

    def find(self, param: Tensor) -> Any:
        """Return a parameter's target, or None."""

    def waits(self) -> bool:
        """Return whether a target takes part in the step even if its parameter has no gradient."""

    def agree(self, groups: Sequence[Group], states: States, check: Callable[[], bool | Tensor]) -> bool:
        """Return whether all processes take the step, before any change; ``check`` decides for this one."""

    def bind(self, groups: Sequence[Group], states: States) -> None:
        """Use these groups and states from now on; they may have been loaded or copied."""

    def drop(self) -> None:
        """Discard what backward has stored for the step."""

    def check_load(self, groups: Sequence[Group], loaded: Mapping[str, Any]) -> dict[str, Any]:
        """Return a state dict in today's format, or raise ``ValueError`` or ``RuntimeError``."""

    def describe(self, param: Tensor, group: Group) -> dict[str, Any]:
        """Return the fields of the explanation's row in which a target differs from its parameter."""


def _cut_by_megatron(param: Tensor) -> bool:
    """Return whether the parameter may be a shard; Megatron marks those that one rank has whole, too."""
    state: Any = sys.modules.get("megatron.core.parallel_state")
    if state is None or not getattr(param, "tensor_model_parallel", False):
        return False
    # Experts have a group of their own, which older releases lack. The mark does not say which group it is.
    names = ("get_tensor_model_parallel_group", "get_expert_tensor_parallel_group")
    getters = (getattr(state, name, None) for name in names)
    groups = [get(check_initialized=False) for get in getters if get is not None]
    return any(group is not None and group.size() > 1 for group in groups)


def _wanted(cls: type[Rule], function: Callable[..., Any]) -> frozenset[str]:
    wanted = inspect.signature(function).parameters
    rest = {name for name, each in wanted.items() if each.kind is each.VAR_KEYWORD}
    options = cls.hyper.keys() - {"lr", "weight_decay"} if rest else set()
    return frozenset({*wanted, *options} - {"self", "args", *rest})


_RULES: dict[str, Rule] = {}


def register_rule(rule: Rule) -> None:
    """Register a rule under its name, replacing any earlier one."""
    _RULES[rule.name] = rule


def rules_with(option: str) -> list[str]:
    """Return the names of the registered rules that have a hyper-parameter."""
    return sorted(name for name, rule in _RULES.items() if option in rule.hyper)


def find_rule(name: Any) -> Rule:
    """Return the rule called ``name``, or raise ``ValueError`` with the closest name."""
    if not isinstance(name, str) or (rule := _RULES.get(name) or _import_rule(name)) is None:
        # A rule that moves targets gets its group from what makes those.
        known = sorted(other for other, each in _RULES.items() if not each.moves)
        raise ValueError(f"unknown rule {name!r}{near_miss(name, known)}; known: {', '.join(known)}")
    return rule


def _import_rule(name: str) -> Rule | None:
    # Rules register themselves when they are imported; unpickling an optimizer may ask for one before.
    for module in ("steepest.rules", "steepest.ternary"):
        import_module(module)
        if name in _RULES:
            return _RULES[name]
    return None
