"""Give the engine the local shards of DTensors: parameter, gradient and state as plain tensors."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steepest.distributed.layout import Region, region_at

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

__all__ = [
    "LocalState",
    "assign",
    "check_state_layout",
    "checked_region",
    "is_dtensor",
    "is_pending",
    "is_sum",
    "local_part",
    "redistributed",
    "region_of",
    "shard_of",
    "sharded_entry",
    "sharded_like",
]


def is_dtensor(tensor: object) -> TypeIs[DTensor]:
    """Return whether a tensor is a DTensor."""
    # Importing torch.distributed.tensor takes a second; a DTensor can exist only where it is imported.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def region_of(tensor: DTensor) -> Region:
    """Return the part of the whole tensor that this process holds."""
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError("lies on a mesh that this process is not part of")
    return region_at(tuple(tensor.shape), tuple(mesh.shape), tensor.placements, tuple(coordinate))


def checked_region(who: str, param: DTensor) -> Region:
    """Return :func:`region_of`; raise ``ValueError`` if the local tensor does not match it."""
    try:
        region = region_of(param)
    except ValueError as error:
        raise ValueError(f"{who} is a DTensor that {error}") from None
    local = local_part(param)
    if local.shape != region.shape:
        raise ValueError(
            f"{who} is a DTensor whose local tensor has shape {tuple(local.shape)}, while its placements "
            f"{tuple(map(str, param.placements))} give it {region.shape}"
        )
    return region


def local_part(tensor: DTensor) -> Tensor:
    """Return the local tensor, and wait for it if a collective is still producing it."""
    if torch.is_grad_enabled():
        with torch.no_grad():
            return local_part(tensor)
    local = tensor.to_local()
    # An asynchronous collective returns a subclass.
    return local if type(local) is Tensor else getattr(local, "wait", lambda: local)()


def assign(param: Tensor, whole: Tensor) -> None:
    """Set a parameter, or this process's shard of it, in place."""
    if is_dtensor(param):
        local_part(param).copy_(region_of(param).of(whole))
    else:
        param.copy_(whole)


def is_pending(grad: DTensor, param: DTensor) -> bool:
    """Return whether a gradient's placements differ from its parameter's."""
    return grad.placements != param.placements


def is_sum(grad: DTensor) -> bool:
    """Return whether a gradient is a partial sum on each process."""
    return any(placement.is_partial() for placement in grad.placements)


def redistributed(grad: DTensor, param: DTensor) -> Tensor:
    """Redistribute a gradient to the parameter's placements (a collective); return the local tensor."""
    return local_part(grad.redistribute(param.device_mesh, param.placements))


def sharded_like(param: DTensor, local: Tensor, shape: Sequence[int] | None = None) -> DTensor:
    """Wrap a local tensor in a DTensor with the parameter's mesh and placements.

    Args:
        param: the parameter.
        local: what this process holds.
        shape: the global shape; by default the parameter's, with one dimension more where ``local`` has
            that, as the real state of a complex parameter has.
    """
    from torch.distributed.tensor import DTensor

    mesh, strides = param.device_mesh, tuple(param.stride())
    if local.dim() > param.dim():
        strides = (*(2 * step for step in strides), 1)
    if shape is None:
        shape = (*param.shape, 2) if local.dim() > param.dim() else tuple(param.shape)
    if local.is_contiguous():
        strides = torch.empty(shape, device="meta").stride()
    if mesh.device_type != local.device.type:
        # FSDP2's CPUOffloadPolicy keeps shards on the host, and from_local would move them to the device.
        made = _empty_on_host(param, local, shape)
        local_part(made).copy_(local)
        return made
    return DTensor.from_local(
        local, mesh, param.placements, run_check=False, shape=torch.Size(shape), stride=strides
    )


def _empty_on_host(param: DTensor, local: Tensor, shape: Sequence[int]) -> DTensor:
    """Return an empty DTensor of this shape, laid out as the parameter, with its shard on the host."""
    like: Any = param.detach()
    if like.is_complex():
        like = torch.view_as_real(like)
    same = tuple(shape) == tuple(like.shape)
    empty: Any = torch.empty_like(like, dtype=local.dtype if same else torch.int8)
    # Scales are one number of each block.
    made: DTensor = empty if same else empty.reshape(*shape, -1).select(-1, 0).to(local.dtype)
    return made


def check_state_layout(
    who: str, param: Tensor, state: Mapping[str, Any], per_element: Collection[str]
) -> None:
    """Raise ``ValueError`` for loaded DTensors that are not laid out as the parameter is.

    Entries that are not ``per_element`` have placements of their own on the same mesh.
    """
    for name, value in state.items():
        if not is_dtensor(value):
            continue
        if (
            not is_dtensor(param)
            or value.device_mesh != param.device_mesh
            or (name in per_element and value.placements != param.placements)
        ):
            raise ValueError(
                f"state {name!r} of {who} has the placements {tuple(map(str, value.placements))} in the "
                "state dict, which the parameter does not have: torch.distributed.checkpoint reshards it "
                "(get_optimizer_state_dict, dcp.load, set_optimizer_state_dict)"
            )


def sharded_entry(param: DTensor, value: Tensor) -> DTensor:
    """Return a sharded copy of loaded state, which is a whole tensor or sharded as the parameter."""
    part = shard_of(param, value.detach())
    return sharded_like(param, part.to(local_part(param).device, copy=True), value.shape)


def shard_of(param: DTensor, value: Tensor) -> Tensor:
    """Return this process's part of a tensor that is laid out as the parameter is, or whole."""
    if is_dtensor(value):
        return local_part(value)
    mesh = param.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    return region_at(tuple(value.shape), tuple(mesh.shape), param.placements, tuple(coordinate)).of(value)


def _alike(one: DTensor, other: DTensor) -> bool:
    return one.placements == other.placements and one.device_mesh == other.device_mesh


class LocalState(MutableMapping[str, Any]):
    """View a DTensor's state, and return the local tensors of its DTensor entries."""

    def __init__(self, param: DTensor, entries: MutableMapping[str, Any]) -> None:
        self._param, self._entries = param, entries

    def __getitem__(self, name: str) -> Any:
        entry = self._entries[name]
        if not is_dtensor(entry):
            return entry
        param = self._param
        if not _alike(entry, param):
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} was resharded after a step, but not its "
                f"state {name!r}: load a checkpoint with torch.distributed.checkpoint. Nothing was stepped"
            )
        return local_part(entry)

    def __setitem__(self, name: str, value: Any) -> None:
        self._entries[name] = value

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, fresh: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> None:
        """Add local entries; store those that have a global shape here as DTensors of that shape."""
        for name, value in fresh.items():
            whole = shapes.get(name)
            self._entries[name] = value if whole is None else sharded_like(self._param, value, whole)
