"""Count steps, and compute the numbers that follow from the counts, on the host or on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steepest.engine.collect import ParamBatch, ParamUpdate
from steepest.engine.cuda_graphs import capturing
from steepest.engine.update import UpdateConfig
from steepest.random import Key, derive_key

__all__ = ["add_step", "count_steps", "noise_key", "noise_keys"]

# Keys that take longer one by one than together.
_MANY = 16


def count_steps(batch: ParamBatch) -> None:
    """Set every member's step (the number of the one being taken) and the scalars that follow from it."""
    config = batch.config
    members = batch.members
    if config.counts_on_device:
        counted = [member for member in members if "step" in member.state]
        if counted:
            _count_on_device(config, counted)
        members = [member for member in members if "step" not in member.state]
    # Members share these scalars; later phases replace the mapping, never change it.
    by_step: dict[float, dict[str, Any]] = {}
    for member in members:
        count = member.state.get("step")
        step = 1.0
        if count is not None:
            member.step = step = float(count) + 1
        if step not in by_step:
            by_step[step] = config.rule.scalars(step, **config.hyper)
        member.scalars = by_step[step]


def _count_on_device(config: UpdateConfig, members: list[ParamUpdate]) -> None:
    """Do the same on a device, with a few operations for all members."""
    device = config.device
    # Apple's GPUs have no float64.
    is_mps = device.type == "mps"
    for member in members:
        count = member.state["step"]
        member.state["step"] = count.to(device, torch.int64) if is_mps else count.to(device)
    exact = torch.stack([member.state["step"] for member in members]) + 1
    steps = exact.to(torch.float32 if is_mps else torch.float64)
    each: dict[str, Any] = {}
    for name, value in config.rule.scalars(steps, **config.hyper).items():
        # A scalar need not depend on the step.
        each[name] = (
            value.expand(steps.shape).unbind() if isinstance(value, Tensor) else [value] * len(members)
        )
    keys: Any = None
    if config.draws:
        seed = config.group["seed"]
        first, second = derive_key(seed, _words(config, members), exact.to(torch.int64))
        keys = list(zip(first.unbind(), second.unbind(), strict=True))  # type: ignore[union-attr]
    for at, (member, step) in enumerate(zip(members, steps.unbind(), strict=True)):
        member.step = step
        member.scalars = {name: values[at] for name, values in each.items()}
        member.key = None if keys is None else keys[at]


def _words(config: UpdateConfig, members: list[ParamUpdate]) -> Tensor:
    """Return the members' key words on the device; a CUDA graph forbids copies from the host."""
    device, known = config.device, config.words
    words = {
        each.word: known[each.word]
        if each.word in known
        else torch.full((), each.word, dtype=torch.int64, device=device)
        for each in members
    }
    # What a graph captures is only computed by its replays.
    if not (device.type == "cuda" and capturing(device)):
        known.update(words)
    return torch.stack([words[each.word] for each in members])


def noise_key(config: UpdateConfig, member: ParamUpdate) -> Key:
    """Return the key of a parameter's noise in this step."""
    if member.key is not None:
        return member.key
    return derive_key(config.group["seed"], member.word, int(member.step))


def noise_keys(config: UpdateConfig, members: Sequence[ParamUpdate]) -> list[Key]:
    """Return the keys of parameters' noise in this step, with a few operations for many of them."""
    if len(members) < _MANY or members[0].key is not None:
        return [noise_key(config, member) for member in members]
    words, steps = (
        torch.tensor(numbers, dtype=torch.int64, device="cpu")
        for numbers in zip(*[(member.word, int(member.step)) for member in members], strict=True)
    )
    first, second = derive_key(config.group["seed"], words, steps)
    assert isinstance(first, Tensor)
    assert isinstance(second, Tensor)
    return list(zip(first.tolist(), second.tolist(), strict=True))


def add_step(batch: ParamBatch, finite: Tensor | None) -> None:
    """Add 1 to the members' step counts, unless the device finds that the step was skipped."""
    counted = [member for member in batch.members if "step" in member.state]
    counts = [member.state["step"] for member in counted]
    if not counts:
        return
    config = batch.config
    on_host = config.counted and config.device.type == "cpu" and not config.counts_on_device
    if finite is not None:
        # After an option was switched off, some counts may still be on the device.
        masks = {where: finite.to(where, counts[0].dtype) for where in {count.device for count in counts}}
        # A list, because torch may read a single tensor on the host.
        torch._foreach_add_(counts, [masks[count.device] for count in counts])
    elif on_host and len({member.step for member in counted}) == 1:
        # Takes a third of the time of adding.
        taken = torch.as_tensor(counted[0].step, dtype=counts[0].dtype, device="cpu")
        torch._foreach_copy_(counts, [taken] * len(counts))
    else:
        torch._foreach_add_(counts, 1)
