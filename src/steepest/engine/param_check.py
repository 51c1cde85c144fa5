"""Check the tensors that a group is given: what no rule can step, and memory that two of them share."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from steepest.distributed.layout import Region
from steepest.distributed.local import checked_region, is_dtensor, local_part
from steepest.engine.batches import describe, name_of
from steepest.engine.update import PLAIN
from steepest.rule import Group, Rule
from steepest.views import is_interleaved

__all__ = [
    "check_materialized",
    "check_memory",
    "check_numbers",
    "check_overlaps",
    "check_param",
    "check_shard",
    "inner_tensors",
]


def check_param(who: str, name: str | None, param: Tensor, rule: Rule, group: Group) -> None:
    """Raise ``ValueError``, beginning with ``who``, for a parameter that this rule or none can step."""
    if not (param.is_floating_point() or param.is_complex()):
        raise ValueError(
            f"{who} has dtype {param.dtype}: only real and complex floating-point parameters can be optimized"
        )
    if param.dtype.itemsize < 2 or param.dtype in (torch.complex32,):
        raise ValueError(f"{who} has dtype {param.dtype}, in which torch does no arithmetic")
    if param.requires_grad:
        check_numbers(who, param)
    if param.layout is not torch.strided:
        raise ValueError(f"{who} has layout {param.layout}: only strided parameters can be optimized")
    check_shard(who, param, rule, group)
    check_memory(who, param)
    if param.is_conj():
        raise ValueError(f"{who} is a conjugate view: pass the result of its resolve_conj()")
    rule.check_param(who, name, param, group)
    view = (group.get("views") or {}).get(name) if rule.transforms else None
    if is_interleaved(view) and type(param) not in PLAIN and is_dtensor(param):
        raise ValueError(
            f"{who} is a DTensor: interleaved views are for whole tensors, since the parts of a block lie on "
            "several processes. Give it no view, which takes the matrix as one"
        )


def check_numbers(who: str, param: Tensor) -> None:
    """Raise ``ValueError``, beginning with ``who``, for a tensor subclass that stores no plain numbers.

    Of a subclass that wraps one tensor of its own shape and dtype, every operation reaches that tensor.
    """
    whole = local_part(param) if type(param) not in PLAIN and is_dtensor(param) else param
    stored = inner_tensors(whole)
    if stored and [(each.shape, each.dtype) for each in stored.values()] != [(whole.shape, whole.dtype)]:
        parts = ", ".join(f"{name} ({str(each.dtype)[6:]})" for name, each in stored.items())
        raise ValueError(
            f"{who} is a {type(whole).__name__}, which stores {parts} for its numbers: an update in place "
            "would be rounded away. Freeze it (requires_grad_(False)) and train others, such as LoRA's "
            "factors; keep the weight in bfloat16, with build(memory='least') for one-byte state; or "
            "use the optimizer of the library that made it"
        )


def inner_tensors(param: Tensor) -> dict[str, Tensor]:
    """Return the tensors that a tensor subclass wraps, by name; none of a plain tensor's."""
    flatten = None if type(param) in PLAIN else getattr(param, "__tensor_flatten__", None)
    if flatten is None:
        return {}
    found = {name: getattr(param, name) for name in flatten()[0]}
    return {name: each for name, each in found.items() if isinstance(each, Tensor)}


def check_shard(who: str, param: Tensor, rule: Rule, group: Group) -> Region | None:
    """Return the part of a DTensor that this process holds; None for others and for those of targets.

    Raises:
        ValueError: the rule does not take DTensors, or no rule takes this one.
    """
    if type(param) in PLAIN or not is_dtensor(param):
        return None
    if rule.moves:
        # The rule itself knows how what the parameter stands for is divided.
        return None
    if group["state_device"] == "cpu" and param.device_mesh.device_type != "cpu":
        raise ValueError(
            f"{who} is a DTensor: state_device='cpu' does not take sharded parameters; "
            "fully_shard(offload_policy=CPUOffloadPolicy()) keeps them and their state on the host"
        )
    return checked_region(who, param)


def check_memory(who: str, param: Tensor) -> None:
    """Raise ``ValueError``, beginning with ``who``, for a parameter that no step may write to."""
    sizes = () if param.is_contiguous() else zip(param.stride(), param.shape, strict=True)
    if any(stride == 0 and size > 1 for stride, size in sizes):
        raise ValueError(f"{who} is expanded: several of its elements are one number in memory")
    if not param.is_contiguous() and _overlaps_itself(param):
        raise ValueError(f"{who} overlaps itself: several of its elements are one number in memory")
    if param.is_inference():
        raise ValueError(
            f"{who} was made in inference mode: autograd cannot use it, nor can a step change it outside; "
            "clone it outside that mode"
        )


def check_materialized(groups: Sequence[Group]) -> None:
    """Refuse to step parameters on the meta device, which has no values: nothing would be trained.

    A constructor takes them, since they may get values in place.
    """
    for index, group in enumerate(groups):
        for at, param in enumerate(group["params"]):
            if param.is_meta and (param.requires_grad or param.grad is not None):
                raise ValueError(
                    f"{describe(group, index, at)} is on the meta device and has no values: materialize the "
                    "model (to_empty(), then initialize it or load weights), and build the optimizer after "
                    "that, because to_empty() makes new parameters. Nothing was stepped"
                )


def check_overlaps(groups: Sequence[Group]) -> None:
    """Refuse parameters that share memory: a step over both at once would lose the update of one."""
    spans: dict[int, list[tuple[int, int, int, Tensor]]] = {}
    for index, group in enumerate(groups):
        for param in group["params"]:
            plain = type(param) in PLAIN and param.layout == torch.strided
            if not plain or param.is_meta or param.numel() == 0:
                continue
            first = param.data_ptr()
            end = first + _length(param) * param.itemsize
            spans.setdefault(param.get_device(), []).append((first, end, index, param))
    for together in spans.values():
        together.sort(key=itemgetter(0))
        before: list[tuple[int, int, int, Tensor]] = []
        for span in together:
            before = [each for each in before if each[1] > span[0]]
            for each in before:
                if each[3] is not span[3] and _share(each[3], span[3]):
                    names = " and ".join(_name(groups[at], p) for *_, at, p in (each, span))
                    raise ValueError(f"parameters {names} share memory: give the optimizer one of them")
            before.append(span)


def _length(param: Tensor) -> int:
    """Return the number of elements between a parameter's ends, those in its gaps included."""
    if param.is_contiguous():
        return param.numel()
    return sum((size - 1) * stride for size, stride in zip(param.shape, param.stride(), strict=True)) + 1


def _overlaps_itself(param: Tensor) -> bool:
    covered = 1
    for stride, size in sorted(zip(param.stride(), param.shape, strict=True)):
        if size > 1 and stride < covered:
            # Strides of interleaved rows are so too.
            seen = torch.zeros(_length(param), dtype=torch.bool, device="cpu")
            seen.as_strided(param.shape, param.stride()).fill_(True)
            return int(seen.sum()) < param.numel()
        covered += (size - 1) * stride
    return False


def _share(one: Tensor, other: Tensor) -> bool:
    """Return whether two parameters whose ends overlap share memory; only one with gaps need not."""
    if all(_length(each) == each.numel() for each in (one, other)):
        return True
    first = min(one.data_ptr(), other.data_ptr())
    end = max(each.data_ptr() + _length(each) * each.itemsize for each in (one, other))
    seen = torch.zeros(end - first, dtype=torch.bool, device="cpu")

    def places(param: Tensor) -> Tensor:
        strides = [stride * param.itemsize for stride in param.stride()]
        return seen.as_strided((*param.shape, param.itemsize), (*strides, 1), param.data_ptr() - first)

    places(one).fill_(True)
    return bool(places(other).any())


def _name(group: Group, param: Any) -> str:
    index = next(index for index, each in enumerate(group["params"]) if each is param)
    name = name_of(group, index)
    return f"of shape {tuple(param.shape)}" if name is None else repr(name)
