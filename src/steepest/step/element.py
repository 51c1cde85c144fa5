"""The element pass: one rule, one piece of memory at a time, written once for eager and compiled runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steepest.random import Key, bits32, derive_key, uniform
from steepest.rule import Rule, Scalar
from steepest.step.apply import decay_strength, descend, hyper_of, narrowed
from steepest.step.collect import Batch, Member
from steepest.step.flat import flat

__all__ = ["Recipe", "advance", "member_key", "run_eager", "shared_scalars", "store"]

# A piece's temporaries stay in the second-level cache (measured on a CPU: 2**18 elements are fastest);
# an accelerator wants fewer launches instead.
_PIECE_ON_CPU = 1 << 18
_PIECE_ELSEWHERE = 1 << 24

_ROUNDING_STREAM = 7  # apart from the streams that rules use


@dataclass(frozen=True)
class Recipe:
    """All that is fixed about a batch: what a compiled graph is specialized on besides shapes.

    ``method`` is None where nothing decays. Results are computed in ``compute``: float32, or float64
    where a parameter or its state is that wide.
    """

    rule: Rule
    fixed: tuple[tuple[str, Any], ...]
    method: str | None
    maximize: bool
    rounding: str
    noisy: bool
    compute: torch.dtype

    @classmethod
    def of(cls, batch: Batch, *, keep_decay: bool) -> Recipe:
        """Read it off a batch; with ``keep_decay`` a decay of 0 stays in, since it may be scheduled."""
        group, rule = batch.group, batch.rule
        decays = (keep_decay or group["weight_decay"] != 0) and not rule.decays_itself(group)
        compute = torch.promote_types(torch.float32, batch.members[0].param.dtype)
        # A rule whose algebra or state is float64 must not get it rounded to float32 on the way.
        if torch.float64 in (group["state_dtype"], group.get("dtype")):
            compute = torch.float64
        fixed = {name: group[name] for name, hyper in rule.hyper.items() if not hyper.traced}
        return cls(
            rule,
            tuple(sorted(hyper_of(rule.takes, fixed).items())),
            group["weight_decay_method"] if decays else None,
            group["maximize"],
            "stochastic" if batch.rounds_stochastically else "nearest",
            not rule.takes.isdisjoint({"noise", "key"}) or batch.rounds_stochastically,
            compute,
        )


def shared_scalars(batch: Batch) -> dict[str, Any]:
    """The numbers that all of a batch's members share: lr, decay, and the rule's float hyper-parameters."""
    group, rule = batch.group, batch.rule
    lr: Scalar = group["lr"]
    if isinstance(lr, Tensor):
        on_host = "cpu" in (lr.device.type, batch.device.type)
        # Apple's GPUs have no float64.
        wide = torch.float32 if batch.device.type == "mps" else torch.float64
        lr = float(lr) if on_host else lr.detach().reshape(()).to(batch.device, wide)
    decay = decay_strength(group["weight_decay_method"], lr, group["weight_decay"], group["base_lr"])
    traced = {name: group[name] for name, hyper in rule.hyper.items() if hyper.traced and name != "lr"}
    return {"lr": lr, "decay": decay, **hyper_of(rule.takes, traced)}


def member_key(batch: Batch, member: Member) -> Key:
    """The key of a parameter's noise in this step."""
    step = member.step.to(torch.int64) if isinstance(member.step, Tensor) else int(member.step)
    return derive_key(batch.group["seed"], member.place.ordinal, step)


def advance(
    recipe: Recipe,
    param: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    scalars: Mapping[str, Any],
    key: Key | None,
    index: Callable[[], Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """One step of one piece: (new parameter, new state), each in the dtype it had.

    Args:
        recipe: what is fixed.
        param, grad: of one shape; ``state`` entries too.
        scalars: shared and per-parameter numbers by name, floats or 0-dim tensors.
        key, index: of the noise: the parameter's key, and the elements' places in the logical tensor.
    """
    rule, wide = recipe.rule, recipe.compute
    given = dict(recipe.fixed) | hyper_of(rule.takes, scalars)
    if "noise" in rule.takes:
        assert key is not None
        noise_key = key
        given["noise"] = lambda stream: uniform(noise_key, index(), stream)

    if "key" in rule.takes:
        given |= hyper_of(rule.takes, {"key": key, "index": index, "grad_dtype": grad.dtype})

    def direct(g: Tensor, p: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return rule.update(g, p, **{name: entry.to(wide) for name, entry in state.items()}, **given)

    def bits() -> Tensor:
        assert key is not None
        return bits32(key, index(), _ROUNDING_STREAM)

    stepped, new = descend(
        param.to(wide),
        grad.to(wide),
        direct,
        rule.retract,
        lr=scalars["lr"],
        decay=scalars["decay"],
        method=recipe.method,
        maximize=recipe.maximize,
    )
    return (
        narrowed(stepped, param.dtype, recipe.rounding, bits),
        {name: value.to(state[name].dtype) for name, value in new.items()},
    )


def store(old: Tensor, new: Tensor, finite: Tensor | None) -> None:
    """Write ``new`` over ``old``, unless the device finds that the step must be skipped."""
    old.copy_(new if finite is None else torch.where(finite, new, old))


def run_eager(batch: Batch, members: Sequence[Member], finite: Tensor | None) -> None:
    """Step these members of a batch, piece by piece, so that temporaries stay small."""
    recipe = Recipe.of(batch, keep_decay=False)
    shared = shared_scalars(batch)
    limit = _PIECE_ON_CPU if batch.device.type == "cpu" else _PIECE_ELSEWHERE
    names = batch.element_state
    for member in members:
        key = member_key(batch, member) if recipe.noisy else None
        scalars = shared | member.scalars
        tensors = [member.param, member.grad, *(member.state[name] for name in names)]
        for (param, grad, *entries), index in pieces(tensors, limit, ordered=recipe.noisy):
            state = dict(zip(names, entries, strict=True))
            stepped, new = advance(recipe, param, grad, state, scalars, key, index)
            store(param, stepped, finite)
            for name, value in new.items():
                store(state[name], value, finite)


def pieces(
    tensors: Sequence[Tensor], limit: int, *, ordered: bool = True
) -> Iterator[tuple[list[Tensor], Callable[[], Tensor]]]:
    """Cut tensors of one shape into views of about ``limit`` elements, with their element indices.

    Tensors that lie in memory alike are cut anywhere, others between rows of the first dimension. Indices
    count in logical (row-major) order, whatever the strides, unless nobody asks for them: ``ordered`` False.
    """
    shape, numel, device = tensors[0].shape, tensors[0].numel(), tensors[0].device
    if numel == 0:
        return
    if (row_of_all := flat(tensors, ordered=ordered)) is not None:
        tensors, shape = row_of_all, row_of_all[0].shape
    row = numel // shape[0]
    rows = max(1, limit // row)
    for first in range(0, shape[0], rows):
        cut = [tensor[first : first + rows] for tensor in tensors] if rows < shape[0] else list(tensors)
        yield cut, _indices(cut[0].shape, first * row, device)


def _indices(shape: torch.Size, start: int, device: torch.device) -> Callable[[], Tensor]:
    count = math.prod(shape)
    return lambda: torch.arange(start, start + count, device=device).view(shape)
