"""Define the element passes over one chunk of memory, once for eager and compiled execution.

A rule without ``transform`` has one pass over parameter, gradient and state (``whole``). A rule with it has
two: ``before`` writes the state and what ``transform`` is given, ``after`` applies the direction.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from operator import is_
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from steepest.engine.storage import Storage
from steepest.random import Key, Words, element_words, stochastic_round, stream_bits, stream_uniform
from steepest.rule import Group, Rule, Scalar, StateSpec

__all__ = [
    "LOW_PRECISION",
    "NO_NOISE",
    "PLAIN",
    "ChunkNoise",
    "MatrixKind",
    "Pass",
    "UpdateConfig",
    "decay_strength",
    "decayed",
    "descended",
    "element_pass",
    "initial_lr",
    "narrowed",
    "store",
]

PLAIN = (Tensor, torch.nn.Parameter)
LOW_PRECISION = (torch.bfloat16, torch.float16)
_ROUNDING_STREAM = 7  # apart from the streams that rules use

# Bytes of int64 indices and words per element that needs noise.
_NOISE_BYTES = 48

Pass = Literal["whole", "before", "after"]


class MatrixKind(NamedTuple):
    """The shape [..., m, n] of a matrix as ``transform`` sees it, its entries, and the elements of all."""

    shape: tuple[int, ...]
    specs: dict[str, StateSpec]
    numel: int


@dataclass(eq=False)
class UpdateConfig:
    """Everything derived from a group's options and a parameter's dtypes and device; made anew on changes.

    Attributes:
        rule, group: the rule and the param group.
        dtype, grad_dtype: of the parameters and their gradients (complex ones as pairs of reals).
        home: the parameters' device.
        storage: how their state per element is stored.
    """

    rule: Rule
    group: Group
    dtype: torch.dtype
    grad_dtype: torch.dtype
    home: torch.device
    storage: Storage

    def __post_init__(self) -> None:
        group, rule = self.group, self.rule
        # Offloaded: the step runs on the host, the parameters are on another device.
        # Nothing is moved on the meta device, where plans are made.
        self.offloaded: bool = group["state_device"] == "cpu" and self.home.type not in ("cpu", "meta")
        self.device = torch.device("cpu") if self.offloaded else self.home
        specs = rule.state_specs(group)
        self.specs = specs
        # A master weight of 32 bits loses nothing.
        narrow = self.dtype in LOW_PRECISION and self.storage.correction != torch.int16
        self.rounds: bool = group["rounding"] == "stochastic" and narrow
        drawn = self.rounds or self.storage.noisy
        self.noisy: bool = drawn or not rule.takes.isdisjoint({"noise"})
        self.draws = self.noisy or "key" in rule.transform_takes
        self.counts: bool = (rule.counts_steps or drawn) and not rule.moves
        # If steps may be skipped on the device, or replayed, only the device knows their number.
        skips = group["nonfinite"] == "skip" and self.device.type != "cpu"
        self.counts_on_device: bool = skips or bool(group["capturable"])
        decays = not rule.decays_itself(group)
        self.method: str | None = group["weight_decay_method"] if decays else None
        # Whether steps are counted or scalars depend on the count.
        self.counted = self.counts or rule.has_scalars
        self.measures: bool = rule.measures and rule.needs_measure(group)
        self.maximize: bool = group["maximize"]
        # float64 algebra or state must not be rounded to float32 on the way.
        wide = torch.float64 in (group["state_dtype"], rule.compute_dtype(group))
        self.compute = torch.float64 if wide else torch.promote_types(torch.float32, self.dtype)
        self.element_state = self.storage.columns
        self.names = frozenset([*specs, *self.element_state, *["step"] * self.counts])
        taken = rule.takes | rule.transform_takes
        own = sorted(name for name in rule.hyper if name in taken and name != "lr")
        self.fixed = {name: group[name] for name in own if not rule.hyper[name].traced}
        self.update_options = {name: value for name, value in self.fixed.items() if name in rule.takes}
        self.transform_options = {n: value for n, value in self.fixed.items() if n in rule.transform_takes}
        self.traced = tuple(name for name in own if rule.hyper[name].traced)
        self.hyper = {name: group[name] for name in rule.hyper if name != "lr"}
        self.inputs = rule.transform_inputs(group) if rule.transforms else 0
        # Per element of a matrix and its entries, in `transform`.
        self.working_bytes = rule.working_bytes(self.compute, group) + _NOISE_BYTES * self.draws
        self.matrices: dict[torch.Size, MatrixKind] = {}
        # The parameters' key words on the device; the optimizer's configurations share them.
        self.words: dict[int, Tensor] = {}

    def matrix(self, shape: torch.Size) -> MatrixKind:
        """Return how ``transform`` sees a parameter, or a block of one, of this shape."""
        kind = self.matrices.get(shape)
        if kind is None:
            seen = self.rule.matrix_shape(shape, self.group)
            specs = self.rule.matrix_specs(seen, self.dtype, self.group)
            numel = sum(math.prod(each) for each in (seen, *(spec.shape for spec in specs.values())))
            kind = self.matrices[shape] = MatrixKind(seen, specs, numel)
        return kind

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """The part of the configuration on which compiled code is specialized."""
        options = tuple((name, _hashable(value)) for name, value in self.update_options.items())
        return (self.rule, options, self.storage, self.maximize, *self.key_after)

    @property
    def key_after(self) -> tuple[Any, ...]:
        """The same for an ``"after"`` pass, in which no rule takes part: all rules share its code."""
        return (self.storage.correction, self.method, self.rounds, self.compute, self.device)

    def without_group(self) -> UpdateConfig:
        """Return a copy without the group, for code that outlives the optimizer and its parameters."""
        other = copy.copy(self)
        other.group, other.words = {}, {}
        return other

    @cached_property
    def with_wide_corrections(self) -> UpdateConfig:
        """A copy for corrections that are held in 32 bits."""
        other = copy.copy(self)
        other.storage = dataclasses.replace(self.storage, correction=torch.int32)
        other.__dict__.pop("key", None)
        return other

    def without_decay(self) -> UpdateConfig:
        """Return a copy for an optimizer whose own code decays the parameters."""
        other = copy.copy(self)
        other.method = None
        other.__dict__.pop("key", None)
        return other

    def numbers(self) -> dict[str, Any]:
        """Return the numbers that all parameters share: lr, decay, and the rule's float hyperparameters."""
        group = self.group
        lr: Scalar = group["lr"]
        if isinstance(lr, Tensor):
            on_host = "cpu" in (lr.device.type, self.device.type) and not group["capturable"]
            # Apple's GPUs have no float64.
            wide = torch.float32 if self.device.type == "mps" else torch.float64
            lr = float(lr) if on_host else lr.detach().reshape(()).to(self.device, wide)
        weight_decay = group["weight_decay"]
        shared = {
            "lr": lr,
            "decay": decay_strength(group["weight_decay_method"], lr, weight_decay, initial_lr(group)),
        }
        for name in self.traced:
            shared[name] = group[name]
        return shared

    @property
    def decays(self) -> bool:
        """Whether the group has any weight decay at present."""
        return self.method is not None and self.group["weight_decay"] != 0


def _hashable(value: Any) -> Any:
    return tuple(_hashable(item) for item in value) if isinstance(value, (list, tuple)) else value


def initial_lr(group: Group) -> float:
    """Return η₀, by which independent weight decay measures the learning rate.

    It is OneCycleLR's peak, or the one that another scheduler starts from, or else the one the group was made
    with.
    """
    for name in ("max_lr", "initial_lr"):
        value: Any = group.get(name)
        # A scheduler of a device's learning rate starts from a tensor there, which no step should read.
        known = value.device.type == "cpu" if isinstance(value, Tensor) else isinstance(value, (int, float))
        if known and 0 < value <= sys.float_info.max:
            return float(value)
    return float(group["base_lr"])


def decay_strength(method: str, lr: Scalar, weight_decay: float, base_lr: float) -> Scalar:
    """Return the one number that a weight-decay method needs, in float64.

    It is the factor by which p shrinks, for ``"sign"`` how far p moves, and for ``"l2"`` λ itself. With a
    learning rate of 0 nothing decays: torch.distributed.checkpoint takes such a step to create the state.
    """
    if method == "l2":
        return weight_decay
    if method == "sign":
        return lr * weight_decay
    if method == "palm":
        return 1 - weight_decay * lr**2
    if method == "independent":
        return 1 - weight_decay * (lr / base_lr if base_lr > 0 else 1.0 * (lr > 0))
    if method == "untied":
        return 1 - weight_decay * (1.0 * (lr > 0))
    return 1 - lr * weight_decay


def element_pass(
    which: Pass, config: UpdateConfig, scalars: Mapping[str, Any], *, decays: bool, donate: bool
) -> Callable[[Sequence[Tensor], ChunkNoise], list[Tensor | None]]:
    """Return a pass as a function of a chunk's columns and noise.

    It returns what becomes of each column, in the dtype it has, and None where the column stays.

    Args:
        which: ``"whole"`` and ``"before"`` are given (parameter, gradient, state entries…), ``"before"`` also
            the buffers of what ``transform`` is given; ``"after"`` is given (parameter, direction), and the
            correction if masters are kept.
        config: the parameter's.
        scalars: shared and per-parameter numbers by name, floats or 0-dim tensors.
        decays: whether the weight decay is applied.
        donate: whether parameter and state entries may be overwritten; the caller keeps no other use of them.
    """
    rule, wide, names, storage = config.rule, config.compute, config.element_state, config.storage
    floats, master = storage.floats, storage.correction is not None
    method, compiling = config.method if decays else None, torch.compiler.is_compiling()
    options = dict(config.update_options)
    options.update({name: number for name, number in scalars.items() if name in rule.takes})
    first, later = (method, None) if which == "whole" and method not in ("l2", "cautious") else (None, method)

    def run(columns: Sequence[Tensor], noise: ChunkNoise) -> list[Tensor | None]:
        param, other = columns[0], columns[1]
        # torch's .to() takes half a microsecond even where there is nothing to convert.
        p = param if param.dtype == wide else param.to(wide)
        if master:
            p = storage.join(param, columns[2 if which == "after" else 1 + len(names)], wide)
        # Tensor subclasses may keep their elements elsewhere, where only copy_ writes.
        into = param if donate and p is param and type(param) in PLAIN else None
        if which == "after":
            stepped = descended(p, other, scalars, method, into)
            rounded, correction = narrowed(config, stepped, param.dtype, noise)
            return [rounded, None, correction] if master else [rounded, None]
        grad = other if other.dtype == wide else other.to(wide)
        if config.maximize:
            grad = -grad
        if method == "l2":
            grad = (scalars["decay"] * p).add_(grad)
        elif first is not None:
            p = decayed(p, scalars["decay"], first)
        entries = columns[2 : 2 + len(names)]
        given: dict[str, Any] = {
            name: entry.to(wide) if entry.dtype != wide else entry if donate else entry.clone()
            for name, entry in zip(floats, entries, strict=False)
        }
        if storage.ranges:
            state = dict(zip(names, entries, strict=True))
            given |= storage.decode(state, wide)
        if "noise" in rule.takes:
            given["noise"] = lambda stream: stream_uniform(noise.words(), stream).to(wide)
        u, new = rule.update(grad, p, **options, **given)
        written: list[Tensor | None] = [None, None]
        correction = None
        if which == "whole":
            for kept in new.values():
                if kept is param:
                    into = None
            stepped = descended(p, u, scalars, later, into)
            written[0], correction = narrowed(config, stepped, param.dtype, noise)
        for name, entry in zip(floats, entries, strict=False):
            value = new.get(name)
            if compiling and any(value is given[other] for other in floats if other != name):
                # Inductor would drop the copy, and read the other entry after it was overwritten.
                raise NotImplementedError(f"{rule.name!r} keeps one entry of its state as another")
            if value is not None and value.dtype != entry.dtype:
                value = value.to(entry.dtype)
            elif value is not entry and value is not None and any(map(partial(is_, value), columns)):
                # The rule keeps another column, such as the last momentum, which this step overwrites.
                value = value.clone()
            written.append(value)
        if storage.ranges:
            encoded = storage.encode(state, new, lambda stream: stream_uniform(noise.words(), stream))
            written += [encoded.get(name) for name in storage.coded]
        if master:
            written.append(correction)
        if which == "before":
            written += u if isinstance(u, tuple) else (u,)
        return written

    return run


def descended(
    p: Tensor, direction: Tensor, scalars: Mapping[str, Any], method: str | None, into: Tensor | None = None
) -> Tensor:
    """Return p after weight decay and a step along a direction, written to ``into`` if given."""
    if method == "cautious":
        p = torch.where(direction * p >= 0, p * scalars["decay"], p)
    elif method is not None and method != "l2":
        p = decayed(p, scalars["decay"], method)
    # Bitwise equal to p − lr·d, but reuses the product's buffer; a fresh large tensor costs page faults.
    stepped: Tensor = direction * -scalars["lr"]
    return torch.add(stepped, p, out=stepped if into is None else into)


def decayed(p: Tensor, strength: Scalar, method: str) -> Tensor:
    """Return p after weight decay, for the methods that depend on p alone."""
    if method == "sign":
        return p - torch.clamp(p, -strength, strength)  # type: ignore[arg-type]
    return p * strength


class ChunkNoise:
    """A chunk's noise. The words that all streams share are half of the work, and made on first use."""

    def __init__(self, key: Key | None, index: Callable[[], Tensor] | None) -> None:
        self.key, self.index = key, index
        self.mixed: Words | None = None

    def words(self) -> Words:
        """Return the words from which every stream's bits are made."""
        if self.mixed is None:
            assert self.key is not None
            assert self.index is not None
            self.mixed = element_words(self.key, self.index())
        return self.mixed


NO_NOISE = ChunkNoise(None, None)


def narrowed(
    config: UpdateConfig, value: Tensor, dtype: torch.dtype, noise: ChunkNoise
) -> tuple[Tensor, Tensor | None]:
    """Return ``value`` in the parameter's dtype, rounded as the group says, and its correction, if any."""
    bits = stream_bits(noise.words(), _ROUNDING_STREAM) if config.rounds else None
    if config.storage.correction is not None:
        return config.storage.part(value, dtype, bits)
    if bits is not None:
        return stochastic_round(value.to(torch.float32), dtype, bits), None
    return (value if value.dtype == dtype else value.to(dtype)), None


def store(old: Tensor, new: Tensor, finite: Tensor | None) -> None:
    """Write ``new`` over ``old``, unless the device finds that the step must be skipped."""
    old.copy_(new if finite is None else torch.where(finite, new, old))
