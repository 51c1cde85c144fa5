"""Make the state that a rule's specs describe, before anything is written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from steepest.distributed.local import LocalState
from steepest.engine.batches import ParamBatch, ParamUpdate
from steepest.engine.blocks import shapes_of, view_of
from steepest.engine.param_check import check_memory
from steepest.engine.storage import CORRECTION, SCALE, storage_of
from steepest.engine.units import Unit
from steepest.engine.update import UpdateConfig
from steepest.hyperparameters import Hyperparameter, is_finite
from steepest.rule import Group, StateSpec, find_rule

__all__ = ["STEP", "blank_state", "fresh_state", "lacks_state", "make_state"]

# float32 counts no further than 2²⁴, and torch's own optimizers take no integers.
STEP = StateSpec(
    "tensor",
    torch.float64,
    numbers=Hyperparameter(
        lambda value: is_finite(value) and value >= 0 and value % 1 == 0, "a step count, a whole number ≥ 0"
    ),
)
_BESIDE = StateSpec()


def _entries(
    config: UpdateConfig,
    param: Tensor,
    label: str | None,
    target: Any = None,
    units: Iterable[Unit] | None = None,
) -> Iterator[tuple[str, StateSpec, Tensor]]:
    """Yield (name, spec, parameter or block) for every entry that this process keeps."""
    for name, spec in config.specs.items():
        yield name, spec, param
    for name in config.storage.beside:
        yield name, _BESIDE, param
    if units is not None:
        # Units of one batch of matrices have the same entries.
        for unit in {unit.suffix: unit for unit in units}.values():
            for name, spec in unit.kept.items():
                yield name + unit.suffix, spec, param
    elif config.rule.transforms:
        for suffix, shape in shapes_of(config, param.shape, view_of(config, label)):
            for name, spec in config.matrix(shape).specs.items():
                yield name + suffix, spec, param
    if target is not None:
        for name, spec in config.rule.target_specs(target, config.group).items():
            yield name, spec, param
    if config.counts:
        yield "step", STEP, param


def blank_state(
    param: Tensor,
    group: Group,
    label: str | None,
    target: Any = None,
    stored: Mapping[str, torch.dtype] | None = None,
) -> dict[str, tuple[StateSpec, Tensor]]:
    """Make the specs and entries of a parameter's first step on the meta device, with ``step`` if counted.

    Args:
        param: a real view; it may be on the meta device itself.
        group, label: the parameter's.
        target: what it stands for, if any.
        stored: the dtypes of the entries that it has, by name, whose formats stay.
    """
    blank = torch.empty_like(param, device="meta")
    rule = find_rule(group["rule"])
    view = (group.get("views") or {}).get(label) if rule.transforms else None
    storage = storage_of(rule, group, blank, view, stored or {})
    config = UpdateConfig(rule, group, blank.dtype, blank.dtype, blank.device, storage)
    return {
        name: (spec, _made(config, name, spec, block))
        for name, spec, block in _entries(config, blank, label, target)
    }


def lacks_state(config: UpdateConfig, member: ParamUpdate) -> bool:
    """Return whether a parameter lacks entries that the present options need."""
    if config.rule.moves:
        return any(name not in member.state for name, *_ in _entries_of(config, member, member.param))
    if not config.rule.transforms:
        return not config.names <= member.state.keys()
    view = view_of(config, member.label) if config.group["views"] else None
    if view is None and member.units is None:
        own = config.matrix(member.param.shape).specs
        return not (config.names <= member.state.keys() and own.keys() <= member.state.keys())
    entries = [(name, spec) for name, spec, _ in _entries_of(config, member, member.param)]
    for name, spec in entries if member.units is not None else ():
        if (
            spec.per == "matrix"
            and name in member.state
            and member.state[name].numel() < math.prod(spec.shape)
        ):
            raise ValueError(
                f"the {name} of {member.name} lies on another process, because an option was changed, or "
                "the optimizer copied, after a step: load a checkpoint. Nothing was stepped"
            )
    return any(name not in member.state for name, _ in entries)


def _entries_of(
    config: UpdateConfig, member: ParamUpdate, like: Tensor
) -> Iterator[tuple[str, StateSpec, Tensor]]:
    return _entries(config, like, member.label, member.target, member.units)


def make_state(batches: Iterable[ParamBatch], states: MutableMapping[Tensor, Any]) -> None:
    """Give every member its state and columns; allocate everything before storing any of it.

    Raises:
        ValueError: a parameter has another shape than its state; an option that matrices' entries depend on
            was changed after a step. Nothing was changed.
    """
    made = []
    for batch in batches:
        config = batch.config
        names, special = config.element_state, config.rule.transforms or config.rule.moves
        for member in batch.members:
            state, shape = member.state, member.param.shape
            _check_fits(config, member, shape)
            if config.rule.optional_state:
                _drop_unasked(config, member)
            if config.storage.correction is None and CORRECTION in state:
                del state[CORRECTION]  # the parameter was given a wider dtype
            if not state or not config.names <= state.keys() or (special and lacks_state(config, member)):
                # FSDP1 flattens parameters in place, perhaps after the optimizer was made.
                config.rule.check_param(member.name, member.label, member.owner, member.group)
                with torch.inference_mode(False):  # no later step could change what is made there
                    fresh = fresh_state(config, member)
                made.append((member, fresh, config))
                state = {**state, **fresh}
            columns = [member.param, member.grad]
            for name in names:
                entry = state[name]
                if entry.shape != shape and entry.shape != config.storage.shape_of(name, shape):
                    raise ValueError(
                        f"{member.name} has shape {tuple(shape)}, but its state {name!r} has "
                        f"{tuple(entry.shape)}: the parameter was given another shape after a step. Make a "
                        "new optimizer, or clear its state. Nothing was stepped"
                    )
                columns.append(entry)
            member.columns = columns
    for member, fresh, config in made:
        owner, state = member.owner, states[member.owner]
        if member.extent is None:
            state.update(fresh)
        else:
            whole = (*owner.shape, 2) if owner.is_complex() else owner.shape
            state = LocalState(owner, state)  # type: ignore[arg-type]
            names = config.element_state
            state.add(fresh, {name: config.storage.shape_of(name, whole) for name in names})
            # Shards on the host are copied into their DTensors.
            member.columns[2:] = [state[name] for name in names]
        member.state = state


def _check_fits(config: UpdateConfig, member: ParamUpdate, shape: torch.Size) -> None:
    """Refuse a parameter whose ``.data`` was replaced and no longer fits its gradient, or a step."""
    if config.rule.transforms and shape not in config.matrices:
        config.rule.check_param(member.name, member.label, member.owner, member.group)
    if member.grad.shape != shape:
        raise ValueError(
            f"{member.name} has shape {tuple(shape)}, its gradient {tuple(member.grad.shape)}: the parameter "
            "was given another shape after the backward pass. Nothing was stepped"
        )
    check_memory(member.name, member.param)


def _drop_unasked(config: UpdateConfig, member: ParamUpdate) -> None:
    """Drop entries that the present options do not need, because no step would update them."""
    kept = config.rule.optional_state
    optional = [n for n in member.state if n.partition(".")[0].removesuffix(SCALE) in kept]
    if optional:
        asked = {name for name, *_ in _entries_of(config, member, member.param)}
        for name in set(optional) - asked:
            del member.state[name]


def fresh_state(config: UpdateConfig, member: ParamUpdate) -> dict[str, Tensor]:
    """Make the entries that a parameter lacks."""
    # An offloaded step has its state on the host. The values do not matter.
    like = torch.empty_like(member.param, device="cpu") if config.offloaded else member.param
    fresh: dict[str, Tensor] = {}
    entries = list(_entries_of(config, member, like))
    of_matrices = [name for name, spec, _ in entries if spec.per == "matrix"]
    for name, spec, block in entries:
        if name in member.state:
            continue
        if spec.per == "matrix" and any(known in member.state for known in of_matrices):
            raise ValueError(
                f"{member.name} was stepped before, but has no state {name!r}, which its options now need: "
                "one of them cannot change after the first step. Nothing was stepped"
            )
        fresh[name] = _made(config, name, spec, block)
    return fresh


def _made(config: UpdateConfig, name: str, spec: StateSpec, block: Tensor) -> Tensor:
    storage = config.storage
    if name in storage.coded or name in storage.beside:
        return storage.make(name, block)
    return spec.make(block, config.group["state_dtype"])
