"""What an optimizer is: a rule, a pure function of tensors that knows no loop, device or learning rate.

A rule says which phases it has, by overriding their methods: ``measure``, ``update``, ``transform`` and
``retract``, or ``move``. The engine asks which phases there are, and never which rule it runs.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from steepest.arithmetic import Scalar
from steepest.hyperparameters import (
    COMMON_DEFAULTS,
    COMMON_OPTIONS,
    CommonOptions,
    Hyperparameter,
    integer,
    near_miss,
)
from steepest.views import View, check_view, fused_parameters

__all__ = [
    "MATRIX_DEFAULTS",
    "Group",
    "MatrixOptions",
    "Moments",
    "Noise",
    "Rule",
    "Scalar",
    "StateSpec",
    "Targets",
    "find_rule",
    "register_rule",
]

Group = Mapping[str, Any]
States = Mapping[Tensor, Mapping[str, Any]]
Noise = Callable[[int], Tensor]

# DeepSpeed ZeRO 3 and FSDP1 mark flattened or partitioned parameters with these attributes.
_FLAT = ("ds_id", "ds_tensor", "_is_flat_param", "_fsdp_flattened")

# What every rule with ``transform`` takes, since the engine cuts and stacks its matrices.
_MATRIX_HYPER = {"views": fused_parameters(), "bucket_bytes": integer(low=1)}
MATRIX_DEFAULTS = {"views": None, "bucket_bytes": 1 << 28}


class MatrixOptions(CommonOptions, total=False):
    """Keyword-only options of every optimizer whose rule has a ``transform`` phase.

    - ``views``: parameter names -> blocks (:mod:`steepest.views`) of fused parameters.
    - ``bucket_bytes``: bound on the working memory of matrices that are computed together, in bytes.
    """

    views: Mapping[str, View] | None
    bucket_bytes: int


@dataclass(frozen=True)
class StateSpec:
    """One state entry as data: bytes can be counted, and formats chosen, without running the rule.

    Attributes:
        per: what has one: every ``"element"`` (the entry is laid out as the parameter), the ``"tensor"`` (a
            0-dim number on the CPU), or every ``"matrix"`` that the rule sees.
        dtype: None is, per element, ``state_dtype`` or else the parameter's dtype; otherwise the parameter's
            dtype, or float32 if that is wider.
        shape: of a matrix's entry.
        fill: the initial value; ``"identity"`` starts a square matrix as I.
    """

    per: Literal["element", "tensor", "matrix"] = "element"
    dtype: torch.dtype | None = None
    shape: tuple[int, ...] = ()
    fill: float | Literal["identity"] = 0.0

    def make(self, param: Tensor, state_dtype: torch.dtype | None = None) -> Tensor:
        """The entry before a parameter's first step, for a parameter or a block of one (of any device)."""
        if self.per == "element":
            dtype = self.dtype or state_dtype or param.dtype
            return torch.zeros_like(param, dtype=dtype, requires_grad=False)
        dtype = self.dtype or torch.promote_types(param.dtype, torch.float32)
        if self.per == "tensor":
            return torch.full((), float(self.fill), dtype=dtype, device="cpu")
        if self.fill == "identity":
            return torch.eye(self.shape[0], dtype=dtype, device=param.device)
        return torch.full(self.shape, float(self.fill), dtype=dtype, device=param.device)


class Moments(NamedTuple):
    """Sums over all elements of a logical tensor; the sums of its shards add up to them."""

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
        own_defaults: their defaults, which the optimizer's class statement reads off its constructor.
        weight_decay_method: the default of the common option.
        counts_steps: whether the equation needs the number of steps that a parameter has taken.
        conventions: what the state means where libraries differ, by name. Every group, and so every
            checkpoint, says it; a group that says otherwise is refused.
        hidden_only: whether it is for the matrices of hidden layers alone; :func:`steepest.build` asks.
        optional_state: state that only some options ask for and that no method's signature names: a
            checkpoint may hold it after such an option was switched off.
        vectors: whether a rule with ``transform`` takes parameters of fewer than two dimensions.
        temporaries: how many tensors of a chunk's size ``update`` and the step along u hold at once.
        working_copies: how many times the bytes of a matrix and its entries, in the compute dtype, are in use
            at once in ``transform``.
        takes, transform_takes: the names that ``update`` and ``transform`` ask for in their signatures.
        measures, transforms, retracts, moves: whether the rule has these phases.
        has_scalars: whether :meth:`scalars` gives any numbers.
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
    takes: ClassVar[frozenset[str]] = frozenset()
    transform_takes: ClassVar[frozenset[str]] = frozenset()
    measures: ClassVar[bool] = False
    transforms: ClassVar[bool] = False
    retracts: ClassVar[bool] = False
    moves: ClassVar[bool] = False
    has_scalars: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Read off the methods which phases the rule has and what they want to be given."""
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
        """The least part of a parameter that the rule must see at once; it follows from the phases."""
        return "matrix" if self.transforms else "tensor" if self.measures else "element"

    # -- options

    def defaults(self) -> dict[str, Any]:
        """Default of every hyperparameter and common option of a group that this rule serves."""
        return {**self.own_defaults, **COMMON_DEFAULTS, "weight_decay_method": self.weight_decay_method}

    def check(self, owner: str, group: Group) -> None:
        """Raise ``ValueError`` for values that are missing, out of range, or exclude each other."""
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
                "tensors. Use DistributedDataParallel, or an element rule, which takes any; of sharded "
                "tensors only those of fully_shard (FSDP2) keep their shapes"
            )
        if not self.transforms:
            return
        if param.is_complex():
            raise ValueError(
                f"{who} is complex: {self.name!r} takes real parameters; element rules take both"
            )
        if not self.vectors and param.dim() < 2:
            raise ValueError(
                f"{who} has shape {tuple(param.shape)}: {self.name!r} takes matrices. "
                "Give it to an element rule, in a group of its own: {'params': [...], 'rule': 'adamw'}"
            )
        view = (group["views"] or {}).get(name)
        if view is not None:
            check_view(who, view, param.shape)

    def relates(self, group: Group) -> str | None:
        """The option by which a tensor's step depends on the others of its group; None where none does."""
        return None

    def host_sync(self, group: Group) -> str | None:
        """The option that makes the host wait for the device, so that no CUDA graph can hold the step."""
        return None

    def decays_itself(self, group: Group) -> bool:
        """Whether ``update`` applies the weight decay, so that the engine must not."""
        return False

    def moves_like_adamw(self, group: Group) -> bool:
        """Whether an update has AdamW's rms, so that AdamW's learning rate and weight decay carry over."""
        return False

    # -- state

    def state_specs(self, group: Group) -> dict[str, StateSpec]:
        """The entries per element and per tensor, with the group's present options."""
        return {}

    def matrix_specs(self, shape: tuple[int, ...], dtype: torch.dtype, group: Group) -> dict[str, StateSpec]:
        """The entries of one matrix of ``shape``, of a parameter of ``dtype``."""
        return {}

    def target_specs(self, target: Any, group: Group) -> dict[str, StateSpec]:
        """The entries of what a parameter stands for, with their shapes."""
        return {}

    def matrix_shape(self, shape: torch.Size, group: Group) -> tuple[int, ...]:
        """The shape [..., m, n] as which ``transform`` sees a parameter, or a block of a fused one."""
        return tuple(shape)

    # -- the step

    def scalars(self, step: Scalar, **hyper: Any) -> dict[str, Scalar]:
        """What the equation needs of the step count (from 1), in float64: bias corrections and kin.

        ``step`` is a float, or where only a device knows them a tensor [n] of n parameters' counts: compute
        everything element by element, without ``if``, ``min`` and ``max``.
        """
        return {}

    def needs_measure(self, group: Group) -> bool:
        """Whether the ``measure`` phase has anything to do with the group's present options."""
        return True

    def reads_back(self, state: Mapping[str, Tensor], group: Group) -> bool:
        """Whether :meth:`measure` reads a device's numbers on the host; at first ``state`` is empty."""
        return False

    def measure(
        self, moments: Callable[[], Moments], state: Mapping[str, Tensor], group: Group
    ) -> tuple[dict[str, Scalar], dict[str, Scalar]]:
        """(scalars for ``update`` and ``transform``, new per-tensor state) of one tensor in this step.

        ``moments`` reads the whole gradient: call it once, only where it is needed.
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
        """(u, new state): the direction that the engine multiplies by lr and subtracts, and the new entries.

        With a ``transform`` phase u is its input: a tensor, or as many as :meth:`transform_inputs` says.

        A subclass names in its signature what it takes: state entries (cast to the compute dtype; of a
        ``transform`` rule also entries of a matrix that hold one number), hyperparameters (all but lr and
        weight decay, if it ends in ``**options``), entries of :meth:`scalars` and :meth:`measure`, and
        ``noise``, a function from a stream number to uniform [0, 1) noise of grad's shape. Scalars are
        floats, or 0-dim tensors when compiled. Only elementwise torch operations, and none that fuse a
        product and a sum (:mod:`steepest.arithmetic`). ``update`` may overwrite entries per element, and
        returning an overwritten one saves a copy; it must change neither ``grad`` nor ``param``.
        """

    def transform_inputs(self, group: Group) -> int:
        """How many tensors ``update`` hands to ``transform``."""
        return 1

    def transform(self, u: Tensor, *args: Any, **given: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """(direction, new matrix entries) of stacked matrices u [batch, ..., m, n], which it may overwrite.

        Named arguments as for ``update``: entries of the matrix, stacked, in the dtype they are kept in;
        ``key`` and ``index`` for noise (two words [batch, 1, ...], and a function that gives the elements'
        places in their parameters); ``param``, the parameters, stacked; ``grad_dtype``; ``orthogonalize``,
        the optimizer's own matrix function or None. Scalars that follow from a device's step count come as
        tensors, 0-dim for one matrix, [batch] for a stack.
        """
        raise NotImplementedError

    def retract(self, param: Tensor, before: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """Bring stepped matrices back onto the set that they were on ``before`` the step.

        ``state`` are the new entries that ``transform`` returned.
        """
        raise NotImplementedError

    def move(self, target: Any, state: MutableMapping[str, Any], group: Group) -> None:
        """Move what a parameter stands for, its *target*, and count its steps, in place.

        A rule with this phase has no other; the parameter stands for something that is none.
        """
        raise NotImplementedError


class Targets(Protocol):
    """What parameters stand for whose rule has the phase ``move``; an optimizer keeps one such object."""

    def find(self, param: Tensor) -> Any:
        """What a parameter stands for; None if it is an ordinary one."""

    def waits(self) -> bool:
        """Whether a target takes part in the step even if its parameter has no gradient."""

    def agree(self, groups: Sequence[Group], states: States, check: Callable[[], bool | Tensor]) -> bool:
        """Whether all processes take the step; ``check`` says it for this one. Nothing has changed yet."""

    def bind(self, groups: Sequence[Group], states: States) -> None:
        """Go on with these groups and states, which may be others than before: loaded or copied ones."""

    def drop(self) -> None:
        """Forget what backward has left for the step."""

    def check_load(self, groups: Sequence[Group], loaded: Mapping[str, Any]) -> dict[str, Any]:
        """A state dict in present words; raise ``ValueError`` or ``RuntimeError`` if it cannot be loaded."""

    def describe(self, param: Tensor, group: Group) -> dict[str, Any]:
        """The fields in which a target's row of the explanation differs from its parameter's."""


def _wanted(cls: type[Rule], function: Callable[..., Any]) -> frozenset[str]:
    names = inspect.getfullargspec(function)
    options = cls.hyper.keys() - {"lr", "weight_decay"} if names.varkw else set()
    return frozenset({*names.args, *names.kwonlyargs, *options} - {"self"})


_RULES: dict[str, Rule] = {}


def register_rule(rule: Rule) -> None:
    """Make a rule known by its name, in place of an earlier one."""
    _RULES[rule.name] = rule


def find_rule(name: str) -> Rule:
    """Return the rule called ``name``; a ``ValueError`` offers the closest one."""
    if (rule := _RULES.get(name)) is None:
        raise ValueError(
            f"unknown rule {name!r}{near_miss(name, _RULES)}; known: {', '.join(sorted(_RULES))}"
        )
    return rule
