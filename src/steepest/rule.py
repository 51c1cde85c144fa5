"""What an optimizer is: a rule, a pure function of tensors that knows no loop, device or learning rate."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from steepest.hyperparameters import COMMON_OPTIONS, Hyperparameter, check_all, near_miss
from steepest.views import check_view

__all__ = [
    "ElementRule",
    "Group",
    "MatrixRule",
    "Moments",
    "Noise",
    "Rule",
    "Scalar",
    "TensorRule",
    "find_rule",
    "register_rule",
    "weighted_sum",
    "zeros",
]

Group = Mapping[str, Any]
Scalar = float | Tensor
Noise = Callable[[int], Tensor]


# What DeepSpeed ZeRO 3 and FSDP1 mark their parameters with.
_FLAT = ("ds_id", "ds_tensor", "_is_flat_param", "_fsdp_flattened")


class Rule(ABC):
    """An optimizer's equation, with the least part of a parameter that it must see at once (its scope).

    A subclass sets ``name``, ``hyper``, and writes ``init_state`` and ``update``.

    Attributes:
        name: the name in the registry and in every param group that the rule serves.
        scope: ``"element"``, ``"tensor"`` or ``"matrix"``: how the rule may be cut, batched and sharded.
        hyper: the rule's hyper-parameters, ``lr`` and ``weight_decay`` among them.
        weight_decay_method: the default of the common option.
        counts_steps: whether the equation needs the number of steps a parameter has taken.
        tensor_state: the state entries that are one number for a whole tensor: 0-dim, on the CPU.
        conventions: what the numbers of the state mean where libraries differ, by name. Every group says
            it, so that a checkpoint does, and a group that says otherwise is refused.
        hidden_only: whether the rule is meant for the matrices of hidden layers alone, so that
            :func:`steepest.build` gives everything else to another.
    """

    name: ClassVar[str]
    scope: ClassVar[Literal["element", "tensor", "matrix"]]
    hyper: ClassVar[Mapping[str, Hyperparameter]]
    weight_decay_method: ClassVar[str] = "decoupled"
    counts_steps: ClassVar[bool] = False
    tensor_state: ClassVar[frozenset[str]] = frozenset()
    conventions: ClassVar[Mapping[str, str]] = MappingProxyType({})
    hidden_only: ClassVar[bool] = False
    takes: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Read off ``update``'s signature what it wants to be given: state, hyper-parameters, noise."""
        super().__init_subclass__(**kwargs)
        if not inspect.isabstract(cls):
            wanted = inspect.signature(cls.update).parameters
            cls.takes = frozenset(wanted) - {"self", "grad", "param"}
            if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in wanted.values()):
                cls.takes |= frozenset(cls.hyper) - {"lr", "weight_decay"}

    def defaults(self) -> dict[str, Any]:
        """Default of every hyper-parameter and common option of a group that this rule serves."""
        common = {name: hyper.default for name, hyper in COMMON_OPTIONS.items()}
        common["weight_decay_method"] = self.weight_decay_method
        return {name: hyper.default for name, hyper in self.hyper.items()} | common

    def check(self, owner: str, group: Group) -> None:
        """Raise ``ValueError`` for values that are missing, out of range, or exclude each other."""
        if missing := [name for name in (*self.hyper, *COMMON_OPTIONS) if name not in group]:
            raise ValueError(
                f"{owner}: {self.name!r} needs {', '.join(missing)}, which the group does not have: its rule "
                "cannot be changed by name alone; add_param_group() and new optimizers fill in the defaults"
            )
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"{owner}: Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
        check_all(owner, {**self.hyper, **COMMON_OPTIONS}, group)
        for name, ours in self.conventions.items():
            if group.get(name, ours) != ours:
                raise ValueError(f"{owner}: {name} of {self.name!r} is {ours!r}, got {group[name]!r}")

    def check_param(self, who: str, name: str | None, param: Tensor, group: Group) -> None:
        """Raise ``ValueError``, beginning with ``who``, for a parameter that the rule cannot serve."""
        return

    def relates(self, group: Group) -> str | None:
        """The option by which a tensor's step depends on the others of its group; None where none does."""
        return None

    def waits(self, group: Group) -> str | None:
        """The option by which a step waits for the device, so that no graph can hold it; mostly none."""
        return None

    def decays_itself(self, group: Group) -> bool:
        """Whether ``update`` applies the weight decay, so that the step must not."""
        return False

    def moves_like_adamw(self, group: Group) -> bool:
        """Whether an update has AdamW's rms, so that AdamW's learning rate and weight decay carry over.

        ``group`` has all of the rule's options. :func:`steepest.build` asks the main rule and the fallback.
        """
        return False

    @abstractmethod
    def init_state(self, param: Tensor, group: Group) -> dict[str, Tensor]:
        """The state of a parameter that has not been stepped, on its device (the meta device too).

        Entries have the parameter's shape, those named in ``tensor_state`` none.
        """

    def scalars(self, step: Scalar, **hyper: Any) -> dict[str, Scalar]:
        """What the equation needs of the step count (from 1), in float64: bias corrections and kin.

        ``step`` is a float, or where only a device knows the counts (``capturable``, ``nonfinite="skip"`` on
        accelerators) a tensor [n] of as many parameters' counts: what follows from it must be computed
        element by element, without ``if``, ``min`` and ``max``.
        """
        return {}

    @abstractmethod
    def update(self, grad: Tensor, param: Tensor, **given: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """(direction, new state): what is subtracted, times lr, and what each state entry becomes.

        A subclass names in its signature what it takes: entries of its state (cast to the compute
        dtype), hyper-parameters (all of them but lr and weight decay, if it ends in ``**options``),
        entries of :meth:`scalars`, and ``noise``, a function from a stream number to uniform [0, 1)
        noise of grad's shape; or ``key``, the noise's two key words, and with it ``index``, a function
        that gives the elements' places, and ``grad_dtype``, the gradient's own. Scalars are floats, or
        0-dim tensors when compiled. Nothing that is given may be changed in place; what ``update`` has
        made itself may, and is better, since it takes less memory to step with.
        Only elementwise torch operations, without fused multiply-add ones
        (lerp, addcmul, add with alpha): those round differently at the end of a vector than within it,
        and a shard's bits would differ from the whole's.
        """

    def retract(self, param: Tensor, before: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """Bring a stepped parameter back onto the set that the rule keeps it on: here, everything.

        ``before`` is the parameter before the step, ``state`` the new one that ``update`` returned.
        """
        return param


class ElementRule(Rule):
    """A rule whose every element stands alone: any piece of a tensor can be stepped by itself."""

    scope = "element"


class Moments(NamedTuple):
    """Sums over all elements of a logical tensor; the sums of its shards add up to them."""

    numel: int
    total: Tensor
    square: Tensor


class TensorRule(Rule):
    """An element rule that also needs scalars of the whole logical tensor's gradient."""

    scope = "tensor"

    def reads_back(self, state: Mapping[str, Tensor], group: Group) -> bool:
        """Whether :meth:`measure` will read a device's numbers on the host in this step (a sync).

        ``state`` is empty before a parameter's first step.
        """
        return False

    @abstractmethod
    def measure(
        self, moments: Callable[[], Moments], state: Mapping[str, Tensor], group: Group
    ) -> tuple[dict[str, Scalar], dict[str, Scalar]]:
        """(scalars for ``update``, new values of per-tensor state) for one tensor in this step.

        ``moments`` reads the whole gradient once: call it only when it is needed.
        """

    def relate(
        self, scalars: Sequence[dict[str, Scalar]], states: Sequence[Mapping[str, Any]], group: Group
    ) -> None:
        """Adjust the scalars of a group's tensors to one another, in place.

        ``states`` holds the state of every tensor in the optimizer that this rule has stepped so far.
        """


class MatrixRule(Rule):
    """A rule that must see whole matrices.

    Parameters are viewed as matrices, equal shapes are stacked, and ``update`` gets a stack: grad and
    param of shape [batch, ..., m, n], state likewise. Norms and products are over the last two
    dimensions. Its ``hyper`` includes ``bucket_bytes``, which bounds a stack's working memory, and
    ``views``, which says that a parameter is several matrices (:mod:`steepest.views`).
    ``working_copies`` is how many times the bytes of a matrix and its factors, in the compute dtype, are
    in use at once in a step. Scalars that follow from a step count which only a device knows come as
    tensors, 0-dim for one matrix and [batch] for a stack.
    """

    scope = "matrix"
    working_copies: ClassVar[int] = 12

    def check(self, owner: str, group: Group) -> None:
        """Matrix products are the accelerator's work, and its state must be there."""
        super().check(owner, group)
        if group.get("state_device") is not None:
            raise ValueError(
                f"{owner}: state_device must be None for {self.name!r}, got {group['state_device']!r}: only "
                "element and tensor rules are stepped on the host. Set it in the groups that have one "
                '(build: fallback={"rule": "adamw", "state_device": "cpu"})'
            )

    def check_param(self, who: str, name: str | None, param: Tensor, group: Group) -> None:
        """Complex matrices are not matrices of pairs, and a fused parameter's blocks must fill it."""
        if param.is_complex():
            raise ValueError(
                f"{who} is complex: {self.name!r} takes real parameters; element rules take both"
            )
        if any(hasattr(param, mark) for mark in _FLAT):
            raise ValueError(
                f"{who} is flattened or partitioned (DeepSpeed ZeRO, FSDP1): {self.name!r} needs whole "
                "tensors; element rules take any"
            )
        view = (group["views"] or {}).get(name)
        if view is not None:
            check_view(who, view, param.shape)

    @abstractmethod
    def matrix_shape(self, shape: torch.Size, group: Group) -> tuple[int, ...]:
        """The shape [..., m, n] as which a parameter, or a part of a fused one, is seen."""

    def init_factors(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, group: Group
    ) -> dict[str, Tensor]:
        """State that belongs to one matrix of ``shape`` and has not the parameter's shape."""
        return {}

    def derive_factors(self, kept: Mapping[str, Tensor], group: Group) -> dict[str, Tensor]:
        """Factors that follow from the ``kept`` ones, where an option begins to ask for more of them."""
        return {}

    def stale_factors(self, group: Group) -> tuple[str, ...]:
        """Names of factors that the group's present options let fall behind: dropped, to be derived anew."""
        return ()

    def relate(self, grads: Sequence[Tensor], group: Group) -> dict[str, Scalar]:
        """Scalars for ``update`` that depend on all gradients of a group, each a real view."""
        return {}


def weighted_sum(a: Scalar, x: Tensor, b: Scalar, y: Tensor) -> Tensor:
    """a·x + b·y, rounded as the formula is, with one tensor fewer in memory.

    >>> weighted_sum(0.5, torch.tensor([2.0]), 0.25, torch.tensor([4.0]))
    tensor([2.])
    """
    total = a * x
    total += b * y
    return total


def zeros(param: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A state tensor laid out as the parameter: its shape, strides, device, and dtype unless given."""
    return torch.zeros_like(param, dtype=dtype or param.dtype, requires_grad=False)


_RULES: dict[str, Rule] = {}


def register_rule(rule: Rule) -> None:
    """Make a rule known by its name; a later one of the same name replaces it."""
    _RULES[rule.name] = rule


def find_rule(name: str) -> Rule:
    """The rule called ``name``.

    Raises:
        ValueError: no rule has that name; the message offers the closest one.
    """
    if name not in _RULES:
        raise ValueError(
            f"unknown rule {name!r}{near_miss(name, _RULES)}; known: {', '.join(sorted(_RULES))}"
        )
    return _RULES[name]
