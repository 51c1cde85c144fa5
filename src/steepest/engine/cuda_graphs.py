"""Refuse to capture a step in a CUDA graph if a replay would not repeat it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steepest.compile.cache import CapturedTooSoon
from steepest.engine.collect import ParamBatch, ParamUpdate
from steepest.engine.state import lacks_state
from steepest.engine.update import UpdateConfig
from steepest.rule import Group

__all__ = ["capturing", "check_capture", "check_compiles_now"]


def capturing(device: torch.device | None = None) -> bool:
    """Return whether a CUDA graph is capturing, on the current device unless another is given."""
    # A build without CUDA raises in the call below.
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def check_compiles_now() -> None:
    """Raise ``CapturedTooSoon`` if a CUDA graph is capturing a step whose code is yet to be compiled."""
    if capturing():
        raise CapturedTooSoon(
            "this step cannot be captured in a CUDA graph: its code is not compiled yet; take a few steps "
            "with these options first. Nothing was changed"
        )


def check_capture(batches: list[ParamBatch], groups: Sequence[Group]) -> None:
    """Raise ``RuntimeError`` if a CUDA graph is capturing this step but could not repeat it.

    Args:
        batches: what the step is about to be taken with; nothing has changed yet.
        groups: all of the optimizer's param groups, each of which counts skipped steps.
    """
    if not capturing():
        return
    for batch in batches:
        if why := _hindrance(batch, groups):
            raise RuntimeError(f"this step cannot be captured in a CUDA graph: {why}. Nothing was changed")


def _hindrance(batch: ParamBatch, groups: Sequence[Group]) -> str | None:
    """Return why a replay would not step this batch, or None if it would."""
    config = batch.config
    group, rule, device = config.group, config.rule, config.device
    if not group["capturable"]:
        # A loaded checkpoint may have reset the option.
        return f"the group of {batch.members[0].name} does not have capturable=True"
    if device.type != "cuda":
        return f"{batch.members[0].name} is on {device}: a graph would not contain that part of the step"
    if not capturing(device):
        # Work on that stream would run once, immediately.
        return f"{batch.members[0].name} is on {device}, whose current stream is not being captured"
    if group["nonfinite"] == "raise":
        return "nonfinite='raise' waits for the device; 'skip' does not"
    if group["nonfinite"] == "skip" and any(member.extent is not None for member in batch.members):
        return (
            f"{batch.members[0].name} is sharded, and with nonfinite='skip' its processes agree on the host"
        )
    travel = any(member.extent is not None for member in batch.members)
    if rule.transforms and (travel or group["distributed"] == "owners"):
        return f"the matrix of {batch.members[0].name} is sent between processes"
    if why := rule.host_sync(group):
        return f"{why} waits for the device"
    if isinstance(group["lr"], Tensor) and group["lr"].device.type == "cpu":
        return "its lr is a tensor on the CPU; make it one on the parameters' device"
    for member in batch.members:
        if not _is_warm(config, member):
            return (
                f"{member.name} has not been stepped yet since it was made, loaded or given other options; "
                "take a few steps first"
            )
        if config.measures and rule.reads_back(member.state, group):
            return f"the gradient of {member.name} is still being measured; take more steps first"
    if group["nonfinite"] == "skip" and not all(_counts_there(each, device) for each in groups):
        # Otherwise each replay would start a new count in the graph's own memory.
        return "the device has no counter of skipped steps yet; take a few steps first"
    return None


def _counts_there(group: Group, device: torch.device) -> bool:
    count = group["skipped_steps"]
    return isinstance(count, Tensor) and count.device.type == device.type


def _is_warm(config: UpdateConfig, member: ParamUpdate) -> bool:
    """Return whether a parameter has all its state, on the device that the graph uses."""
    count = member.state.get("step")
    if isinstance(count, Tensor) and count.device != config.device:
        return False
    return not lacks_state(config, member)
