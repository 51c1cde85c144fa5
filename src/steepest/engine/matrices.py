"""The matrix pass: parameters as matrices, equal shapes stacked, one batched computation per bucket."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steepest.engine.chunks import UpdateConfig, advance, member_key, shared_scalars, store
from steepest.engine.collect import ParamBatch, ParamUpdate
from steepest.rule import Group, MatrixRule, Rule
from steepest.views import View, cut

__all__ = [
    "Part",
    "Provide",
    "Write",
    "blank_factors",
    "computed",
    "drop_stale_factors",
    "init_factors",
    "lacks_factors",
    "parts",
    "relate",
    "run_matrix",
]

# A tensor and what is written over it.
Write = tuple[Tensor, Tensor]

# What an optimizer gives a rule's update besides numbers, for one parameter: functions by name.
Provide = Callable[[ParamUpdate], Mapping[str, Any]]

# Indices and the words that are mixed of them, in int64, for an element that is rounded or drawn for.
_NOISE_BYTES = 48


@dataclass
class Part:
    """One logical matrix: a parameter, or a block of a fused one.

    ``shape`` is what the rule sees, [..., m, n]; ``number`` counts the blocks of the parameter's ``view``,
    None if it is not cut.
    """

    member: ParamUpdate
    number: int | None
    shape: tuple[int, ...]
    param: Tensor
    grad: Tensor
    view: View | None = None

    def block(self, whole: Tensor) -> Tensor:
        """What belongs to the part of a tensor of its parameter's shape: a view of that tensor's memory."""
        return cut(whole, self.view, _counts_matrices(self.member.group))[self.number or 0]

    def state_name(self, factor: str) -> str:
        """The name in the parameter's state of a factor that belongs to this matrix."""
        return factor if self.number is None else f"{factor}.{self.number}"


def parts(batch: ParamBatch, member: ParamUpdate) -> list[Part]:
    """The logical matrices of a parameter."""
    assert isinstance(batch.rule, MatrixRule)
    view = _view(batch, member)
    if view is None:
        seen = batch.rule.matrix_shape(member.param.shape, batch.group)
        return [Part(member, None, seen, member.param, member.grad)]
    leading = _counts_matrices(batch.group)
    blocks = zip(cut(member.param, view, leading), cut(member.grad, view, leading), strict=True)
    return [
        Part(member, number, batch.rule.matrix_shape(param.shape, batch.group), param, grad, view)
        for number, (param, grad) in zip(_numbers(view), blocks, strict=True)
    ]


def _numbers(view: View) -> list[int | None]:
    """The numbers of a view's blocks in the names of their factors."""
    return list(range(len(view[1]))) or [None]


def _counts_matrices(group: Group) -> bool:
    """Whether leading dimensions count matrices."""
    return group.get("view") == "batch"


def _view(batch: ParamBatch, member: ParamUpdate) -> Any:
    views = batch.group.get("views")
    return None if not views or member.label is None else views.get(member.label)


def lacks_factors(batch: ParamBatch, member: ParamUpdate) -> bool:
    """Whether a parameter has not all of the factors that its matrices have."""
    return any(
        part.state_name(name) not in member.state
        for part in parts(batch, member)
        for name in batch.factor_sizes(part.shape)
    )


def drop_stale_factors(batch: ParamBatch, member: ParamUpdate) -> None:
    """Remove from a parameter's state the factors that its options no longer keep up with the others."""
    assert isinstance(batch.rule, MatrixRule)
    stale = batch.rule.stale_factors(batch.group)
    for part in parts(batch, member) if stale else ():
        for name in stale:
            member.state.pop(part.state_name(name), None)


def init_factors(batch: ParamBatch, member: ParamUpdate) -> dict[str, Tensor]:
    """The factors of a parameter, as they are before its first step or follow from those it has."""
    assert isinstance(batch.rule, MatrixRule)
    made: dict[str, Tensor] = {}
    for part in parts(batch, member):
        factors = batch.rule.init_factors(part.shape, part.param.dtype, part.param.device, batch.group)
        kept = {
            name: member.state[part.state_name(name)]
            for name in factors
            if part.state_name(name) in member.state
        }
        if kept:
            factors |= batch.rule.derive_factors(kept, batch.group)
        made.update({part.state_name(name): value for name, value in factors.items()})
    return made


def blank_factors(rule: Rule, param: Tensor, label: str | None, group: Group) -> dict[str, Tensor]:
    """A parameter's factors as its state names them, on the meta device; none for the other scopes."""
    if not isinstance(rule, MatrixRule):
        return {}
    view = (group.get("views") or {}).get(label)
    blanks: dict[str, Tensor] = {}
    numbers = [None] if view is None else _numbers(view)
    for number, each in zip(numbers, cut(param, view, _counts_matrices(group)), strict=True):
        seen = rule.matrix_shape(each.shape, group)
        blank = rule.init_factors(seen, each.dtype, torch.device("meta"), group)
        suffix = "" if number is None else f".{number}"
        blanks.update({name + suffix: factor for name, factor in blank.items()})
    return blanks


def relate(batches: list[ParamBatch]) -> None:
    """Give the members what their rule needs of all of their group's gradients at once; mostly nothing."""
    grads: dict[int, list[Tensor]] = {}
    for batch in batches:
        grads.setdefault(id(batch.group), []).extend(member.grad for member in batch.members)
    for batch in batches:
        if isinstance(batch.rule, MatrixRule):
            related = batch.rule.relate(grads[id(batch.group)], batch.group)
            for name, value in related.items():
                there = value.to(batch.device) if isinstance(value, Tensor) else value
                for member in batch.members:
                    member.scalars[name] = there


def run_matrix(batch: ParamBatch, finite: Tensor | None) -> None:
    """Step every member of a batch, stack by stack."""
    recipe = UpdateConfig.of(batch, keep_decay=False)
    shared = shared_scalars(batch)
    # The rule says in which dtype it multiplies; a step within autocast must not change it.
    with torch.autocast(batch.device.type, enabled=False):
        for bucket in _buckets(batch, recipe, together=True):
            for old, new in _step_bucket(batch, recipe, bucket, shared | _scalars(bucket)):
                store(old, new, finite)


def _scalars(bucket: list[Part]) -> dict[str, Any]:
    """A bucket's own numbers: where they are a device's, one for each of its matrices."""
    scalars: dict[str, Any] = dict(bucket[0].member.scalars)
    if len(bucket) > 1 and isinstance(bucket[0].member.step, Tensor):
        for name, value in scalars.items():
            if isinstance(value, Tensor):
                scalars[name] = torch.stack([torch.as_tensor(p.member.scalars[name]) for p in bucket])
    return scalars


def computed(batch: ParamBatch, provide: Provide) -> list[Write]:
    """What a step would write, one parameter at a time, with functions that are the optimizer's own.

    They are somebody's code and may raise: nothing is written before all of them have returned.
    """
    recipe = UpdateConfig.of(batch, keep_decay=False)
    shared = shared_scalars(batch)
    writes: list[Write] = []
    with torch.autocast(batch.device.type, enabled=False):
        for bucket in _buckets(batch, recipe, together=False):
            member = bucket[0].member
            writes += _step_bucket(batch, recipe, bucket, {**shared, **member.scalars, **provide(member)})
    return writes


def _buckets(batch: ParamBatch, recipe: UpdateConfig, *, together: bool) -> Iterator[list[Part]]:
    """Parts of equal shape and step count, at most ``bucket_bytes`` of working memory at once.

    Where only a device knows the counts, parts of all counts: each has its own numbers there.
    """
    assert isinstance(batch.rule, MatrixRule)
    by_kind: dict[tuple[Any, ...], list[Part]] = {}
    for member in batch.members:
        when = None if isinstance(member.step, Tensor) else member.step
        for part in parts(batch, member):
            if math.prod(part.shape) > 0:
                apart = () if together else (id(part),)
                by_kind.setdefault((part.shape, when, *apart), []).append(part)
    for (shape, *_), bucket in by_kind.items():
        numel = math.prod(shape) + sum(batch.factor_sizes(shape).values())
        # The iteration may be asked for in a wider dtype than the rest.
        widest = max(recipe.compute.itemsize, (batch.group.get("ns_dtype") or recipe.compute).itemsize)
        each = widest * batch.rule.working_copies + (_NOISE_BYTES if recipe.noisy else 0)
        need = numel * each
        count = max(1, batch.group["bucket_bytes"] // need)
        for first in range(0, len(bucket), count):
            yield bucket[first : first + count]


def _step_bucket(
    batch: ParamBatch, recipe: UpdateConfig, bucket: list[Part], given: Mapping[str, Any]
) -> Iterator[Write]:
    rule, shape = batch.rule, bucket[0].shape
    assert isinstance(rule, MatrixRule)
    factors = sorted(batch.factor_sizes(shape))
    homes: dict[str, list[Tensor]] = {
        name: [part.block(part.member.state[name]) for part in bucket] for name in batch.element_state
    }
    homes |= {name: [part.member.state[part.state_name(name)] for part in bucket] for name in factors}

    def stack(tensors: list[Tensor], shape: tuple[int, ...]) -> Tensor:
        # Stacking keeps channels_last strides, on which a product rounds differently. A rule changes
        # nothing in place that it is given, so one matrix need not be copied.
        shaped = [tensor.reshape(shape) for tensor in tensors]
        return (torch.stack(shaped) if len(shaped) > 1 else shaped[0].unsqueeze(0)).contiguous()

    stacked = {
        name: stack(tensors, shape if name in batch.element_state else tuple(tensors[0].shape))
        for name, tensors in homes.items()
    }
    stepped, new = advance(
        recipe,
        stack([part.param for part in bucket], shape),
        stack([part.grad for part in bucket], shape),
        stacked,
        given,
        _keys(batch, recipe, bucket, len(shape)),
        lambda: _indices(bucket, shape),
    )
    for at, part in enumerate(bucket):
        yield part.param, stepped[at].reshape(part.param.shape)
        for name, value in new.items():
            home = homes[name][at]
            yield home, value[at].reshape(home.shape)


def _keys(batch: ParamBatch, recipe: UpdateConfig, bucket: list[Part], dims: int) -> Any:
    if not recipe.noisy:
        return None
    keys = [member_key(batch, part.member) for part in bucket]
    device = bucket[0].param.device
    columns = [torch.stack([torch.as_tensor(k[i], device=device) for k in keys]) for i in range(2)]
    return tuple(column.view(-1, *([1] * dims)) for column in columns)


def _indices(bucket: list[Part], shape: tuple[int, ...]) -> Tensor:
    """Every element's place in its whole parameter, so that noise does not depend on how it is cut."""
    device = bucket[0].param.device
    if all(part.view is None for part in bucket):
        return torch.arange(math.prod(shape), device=device).view(1, *shape)
    return torch.stack([_places(part).reshape(shape) for part in bucket])


def _places(part: Part) -> Tensor:
    """The places of a part's elements in its parameter, in the order in which the rule sees them."""
    # Of a tensor that has its places in memory one after another, a block's strides say where it lies.
    seen = part.block(torch.empty(part.member.param.shape, device="meta"))
    device = part.param.device
    places = torch.full((1,) * seen.dim(), int(seen.storage_offset()), device=device)
    for dim, (size, stride) in enumerate(zip(seen.shape, seen.stride(), strict=True)):
        along = torch.arange(size, device=device) * stride
        places = places + along.view([-1 if at == dim else 1 for at in range(seen.dim())])
    return places
