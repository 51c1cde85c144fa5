"""Take a model onto the meta device, where its parameters have shapes and layouts but no memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from steepest.distributed.layout import region_at
from steepest.distributed.local import is_dtensor

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement

__all__ = ["blank", "on_meta", "sharding"]

# Attributes of a DTensor that are not the user's.
_DTENSOR = ("_local_tensor", "_spec")


def on_meta(model: nn.Module, place: Callable[[str, Tensor], Tensor] | None = None) -> nn.Module:
    """Return a copy of a model's modules with all tensors on the meta device; nothing is allocated.

    Tied parameters stay tied, and dtypes, strides, layouts, attributes and ``requires_grad`` stay what they
    are. Everything else is shared with the model, on which no constructor, hook or deepcopy runs, so that it
    may be of FSDP2 or compiled.

    Args:
        model: the model, on any device.
        place: returns what takes the place of a parameter, given its name.
    """
    tensors: dict[int, Tensor] = {}
    modules: dict[int, nn.Module] = {}

    def moved(name: str, tensor: Tensor) -> Tensor:
        if id(tensor) not in tensors:
            made = blank(tensor)
            if isinstance(tensor, nn.Parameter) and not is_lazy(tensor):
                made = nn.Parameter(made if place is None else place(name, made), tensor.requires_grad)
                made.__dict__.update({n: v for n, v in tensor.__dict__.items() if n not in _DTENSOR})
            tensors[id(tensor)] = made
        return tensors[id(tensor)]

    def copied(path: str, module: nn.Module) -> nn.Module:
        if id(module) in modules:
            return modules[id(module)]
        made: nn.Module = object.__new__(type(module))
        modules[id(module)] = made
        made.__dict__.update(module.__dict__)
        for kind in ("_parameters", "_buffers"):
            own: dict[str, Any] = getattr(module, kind)
            made.__dict__[kind] = {
                name: None if each is None else moved(path + name, each) for name, each in own.items()
            }
        made.__dict__["_modules"] = {
            name: None if each is None else copied(f"{path}{name}.", each)
            for name, each in module._modules.items()
        }
        return made

    return copied("", model)


@torch.no_grad()
def blank(tensor: Tensor) -> Tensor:
    """Return a tensor of the same shape, dtype and layout on the meta device; lazy ones as they are."""
    if is_lazy(tensor) or tensor.layout is not torch.strided:
        return tensor
    if is_dtensor(tensor):
        return torch.empty_like(tensor, device="meta")
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def sharding(
    mesh: Sequence[int], placements: Sequence[Placement], rank: int, device_type: str
) -> Callable[[str, Tensor], Tensor]:
    """Return a function that makes a parameter a DTensor on a mesh of processes that do not exist.

    A parameter without the dimension that a placement cuts is replicated there.

    Raises:
        ValueError: a mesh and placements of different lengths; a rank that the mesh does not have.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Replicate

    if len(mesh) != len(placements) or min(mesh, default=0) < 1:
        raise ValueError(
            f"mesh must have positive sizes and a placement for each, got {tuple(mesh)} and "
            f"{len(placements)} placements"
        )
    world = math.prod(mesh)
    if not 0 <= rank < world:
        raise ValueError(f"rank must be 0 to {world - 1} on a mesh of {world}, got {rank}")
    ranks = torch.arange(world, device="cpu").view(*mesh)
    # Without a backend it needs no processes; the coordinate follows from the rank. Its names must say the
    # rank, since torch takes equal meshes for the same, and remembers what it has done with the first.
    names = tuple(f"rank_{rank}_of_dim_{dim}" for dim in range(len(mesh)))
    paper = DeviceMesh(device_type, ranks, mesh_dim_names=names, _init_backend=False, _rank=rank)

    def place(name: str, param: Tensor) -> Tensor:
        if is_dtensor(param):
            raise ValueError(f"parameter {name!r} is a DTensor: leave out mesh, which shards plain tensors")
        fitting = tuple(
            Replicate() if getattr(each, "dim", -1) >= param.dim() else each for each in placements
        )
        coordinate = paper.get_coordinate()
        assert coordinate is not None
        try:
            region = region_at(tuple(param.shape), tuple(mesh), fitting, tuple(coordinate))
        except ValueError as error:
            raise ValueError(f"parameter {name!r} {error}") from None
        local = region.of(param)
        made: Tensor = DTensor.from_local(
            torch.empty_like(local), paper, fitting, run_check=False, shape=param.shape, stride=param.stride()
        )
        return made

    return place
