"""Find out which process computes which matrix, for parameters whose processes share that work."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from steepest.distributed.groups import Groups, Team, everyone, team_of
from steepest.distributed.layout import Layout, Region, layout_of
from steepest.distributed.local import is_dtensor
from steepest.distributed.ownership import Load, assign, is_empty, overlap
from steepest.engine.batches import ParamBatch, name_of
from steepest.engine.blocks import cut_blocks, rows_apart, view_of
from steepest.engine.layout import Extent
from steepest.engine.storage import storage_of
from steepest.engine.update import PLAIN, MatrixKind, UpdateConfig
from steepest.rule import Group, StateSpec, find_rule
from steepest.views import is_interleaved, is_transposed

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Sharding", "Unit", "Way", "is_large"]


def is_large(spec: StateSpec, shape: Sequence[int]) -> bool:
    """Return whether only the owner of a matrix of ``shape`` keeps an entry: if it is more than a vector."""
    return spec.per == "matrix" and math.prod(spec.shape) > math.prod(shape[:-2]) * max(shape[-2:])


@dataclass(slots=True)
class Unit:
    """A matrix of a parameter, or some of a batch of matrices, that is computed at one place.

    Attributes:
        suffix: of its entries' names in the parameter's state.
        kind: its shape as ``transform`` sees it, and its entries.
        shape: its shape before matrices are merged to that.
        box: where it lies in the parameter.
        swapped: the dimensions that its view swaps.
        extent: its places in the parameter.
        rows: in entries of a batch of matrices, or of a matrix whose rows are computed apart, the first
            index and the number of those that are its own; None if they all are.
        specs: the entries, of the whole batch.
        team: the processes that share the work.
        parts: what each of them holds, within the parameter.
        owner: the position in the team of the one that computes it; None if each replica's processes all do.
    """

    suffix: str
    kind: MatrixKind
    shape: torch.Size
    box: Region
    swapped: tuple[int, int] | None
    extent: Extent
    rows: tuple[int, int] | None
    specs: Mapping[str, StateSpec]
    team: Team = field(init=False)
    parts: list[Region] = field(init=False)
    owner: int | None = None

    @property
    def is_mine(self) -> bool:
        """Whether this process computes it."""
        return self.owner is None or self.owner == self.team.own

    @property
    def kept(self) -> dict[str, StateSpec]:
        """The entries that this process keeps; a large one is empty unless it computes the unit.

        All processes have the same names, on which torch's checkpoints rely.
        """
        if self.is_mine:
            return dict(self.specs)
        return {
            name: replace(spec, shape=(0,), fill=0.0) if name in self.large else spec
            for name, spec in self.specs.items()
        }

    @property
    def large(self) -> list[str]:
        """The entries that only the process that computes it keeps."""
        kind = self.kind
        return [name for name, spec in kind.specs.items() if is_large(spec, kind.shape)]

    @property
    def own_part(self) -> Region:
        """What this process holds."""
        return self.parts[self.team.own]

    def receivers(self, at: int) -> Sequence[int]:
        """Return the processes to which one of them sends what it holds: the owner, or all of its replica."""
        if self.owner is None:
            return self.team.replica(at)
        return [self.owner] if self.team.replicas[at] == self.team.replicas[self.owner] else []

    def senders(self) -> Sequence[int]:
        """Return the processes that send what they hold to this one, which computes the unit."""
        return [at for at in self.team.replica(self.team.own) if not is_empty(self.parts[at])]

    @property
    def is_gathered(self) -> bool:
        """Whether what ``update`` returns has to travel."""
        return self.owner is None or self.parts[self.owner] != self.box

    @property
    def is_scattered(self) -> bool:
        """Whether the direction has to travel."""
        return self.owner is not None and any(
            at != self.owner and not is_empty(part) for at, part in enumerate(self.parts)
        )

    def whole(self, matrix: Tensor) -> Tensor:
        """Return a matrix as ``transform`` sees it in the parameter's dimensions."""
        seen = matrix.view(self.shape)
        return seen if self.swapped is None else seen.transpose(*self.swapped)

    def within(self, matrix: Tensor, part: Region) -> Tensor:
        """Return a part of the parameter within such a matrix."""
        first = tuple(a - b for a, b in zip(part.first, self.box.first, strict=True))
        return Region(first, part.shape).of(self.whole(matrix))


class Way(NamedTuple):
    """How processes share the work on parameters.

    Attributes:
        mesh: the parameters'; None for plain tensors.
        cut_by: its dimensions that cut them.
        processes: how many there are.
        mode: ``"owners"`` or ``"everywhere"``.
    """

    mesh: DeviceMesh | None
    cut_by: tuple[int, ...]
    processes: int
    mode: str


_Found = tuple[Tensor, "Layout | None", UpdateConfig, list[Unit]]


class Sharding:
    """Which process computes which matrix; made from the groups, and again when their parameters change."""

    def __init__(self) -> None:
        self.groups = Groups()
        # The units that each team shares, in the order of the parameters.
        self.teams: dict[Team, list[tuple[UpdateConfig, Unit]]] = {}
        self._units: dict[int, list[Unit]] = {}
        # Kept when parameters are added, so that owners keep their factors.
        self._teams: dict[Way, Team] = {}
        # Objects, not ids, because another tensor may get the id of one that is gone.
        self.params: list[Tensor] = []
        # The ids of parameters that no step has found to have the state of this process's matrices.
        self.unchecked: set[int] = set()

    @property
    def is_shared(self) -> bool:
        """Whether there is any such parameter."""
        return bool(self._units)

    def bind(self, batches: Sequence[ParamBatch]) -> None:
        """Give the members of a step their units."""
        for batch in batches:
            for member in batch.members if batch.config.rule.transforms else ():
                member.units = units = self.of(member.owner)
                if units and not batch.config.matrices:
                    # Compiling needs the names of their entries.
                    batch.config.matrices.update({unit.shape: unit.kind for unit in units})

    def of(self, param: Tensor) -> list[Unit] | None:
        """Return the units of a parameter whose processes share the work on it; None for others."""
        return self._units.get(id(param))

    def make(
        self,
        groups: Sequence[Group],
        whole: Callable[[UpdateConfig], bool],
        way_of: Callable[[Tensor, Group], tuple[Way | None, Layout | None]] | None = None,
    ) -> None:
        """Make the units of all groups; those that there were keep their owners.

        Args:
            groups: the optimizer's.
            whole: whether the optimizer's own code must see whole parameters.
            way_of: how a parameter's processes share the work, and its layout; by default, as it is placed.
        """
        params = [param for group in groups for param in group["params"]]
        kept = {id(param) for param in params} & {id(param) for param in self.params}
        before = {
            (key, unit.team, unit.suffix, unit.rows): unit.owner
            for key, units in self._units.items()
            if key in kept
            for unit in units
        }
        self.params = params
        by_way: dict[Way, list[_Found]] = {}
        for group in groups:
            if not find_rule(group["rule"]).transforms:
                continue
            configs: dict[Any, UpdateConfig] = {}
            for index, param in enumerate(group["params"]):
                way, layout = (way_of or _way)(param, group)
                label = name_of(group, index)
                # A unit is a box of the parameter. Every process computes by itself what is spread over it.
                if way is None or is_interleaved((group["views"] or {}).get(label)):
                    continue
                config = configs.get(param.dtype)
                if config is None:
                    rule, dtype = find_rule(group["rule"]), param.dtype
                    # Units know of masters, not of codes, of which the steps' own configurations know.
                    storage = storage_of(rule, group, torch.empty(0, dtype=dtype, device="meta"), None, {})
                    config = UpdateConfig(rule, group, dtype, dtype, param.device, storage)
                    configs[dtype] = config
                units = list(_units(config, param, label, layout, whole(config)))
                by_way.setdefault(way, []).append((param, layout, config, units))
        self._units, self.teams = {}, {}
        for way, found in by_way.items():
            team = self._teams.get(way)
            if team is None:
                count = sum(len(units) for *_, units in found)
                team = self._teams[way] = _team(way, count, found[0][0].device.type)
            if len(team) > 1:
                self._share(team, way.mode, found, before)
        self.unchecked = set(self._units)

    def _share(self, team: Team, mode: str, found: list[_Found], before: Mapping[Any, Any]) -> None:
        """Give the units of parameters that are cut along the same dimensions of a mesh to a team."""
        loads: list[Load] = []
        known: list[int | None] = []
        shared = self.teams.setdefault(team, [])
        # Most matrices of a model are alike, and a list has a box for each process.
        parts: dict[Any, list[Region]] = {}
        for param, layout, config, units in found:
            self._units[id(param)] = units
            held = parts.setdefault((id(layout), param.shape), [])
            held += [] if held else _held(team, layout, param)
            blank = torch.empty(0, dtype=param.dtype, device="meta")
            for unit in units:
                unit.team = team
                unit.parts = parts.setdefault((id(layout), param.shape, unit.box), [])
                unit.parts += [] if unit.parts else [overlap(unit.box, region) for region in held]
                shared.append((config, unit))
                holders = tuple(at for at, part in enumerate(unit.parts) if part == unit.box)
                large = [spec for spec in unit.kind.specs.values() if is_large(spec, unit.kind.shape)]
                loads.append(
                    Load(
                        config.rule.cost(unit.kind.shape, config.group),
                        sum([spec.make(blank).nbytes for spec in large]),
                        None if len(holders) in (0, len(team)) else holders,
                    )
                )
                known.append(before.get((id(param), team, unit.suffix, unit.rows)))
        if mode == "owners":
            units = [unit for *_, own in found for unit in own]
            for unit, owner in zip(units, assign(loads, len(team), known), strict=True):
                unit.owner = owner


def _way(param: Tensor, group: Group) -> tuple[Way | None, Layout | None]:
    """Return how a parameter's processes share the work, or None, and its layout."""
    mode = group["distributed"]
    if type(param) in PLAIN or not is_dtensor(param):
        shares = mode == "owners" and dist.is_available() and dist.is_initialized()
        return (Way(None, (), dist.get_world_size(), mode) if shares else None), None
    cut_by = tuple(dim for dim, each in enumerate(param.placements) if not each.is_replicate())
    if not cut_by and mode != "owners":
        return None, None
    mesh = param.device_mesh
    layout = layout_of(tuple(param.shape), tuple(mesh.shape), param.placements)
    return Way(mesh, cut_by, mesh.size(), mode or "owners"), layout


def _team(way: Way, matrices: int, device_type: str) -> Team:
    if way.mesh is None:
        return everyone(matrices, device_type)
    return team_of(way.mesh, way.cut_by, matrices if way.mode == "owners" else None)


def _held(team: Team, layout: Layout | None, param: Tensor) -> list[Region]:
    """Return the region of a parameter that each process of a team holds."""
    if layout is None:
        return [Region((0,) * param.dim(), tuple(param.shape))] * len(team)
    return [layout.region(coordinate) for coordinate in team.coordinates]


def _units(
    config: UpdateConfig, param: Tensor, label: str | None, layout: Layout | None, whole: bool
) -> Iterator[Unit]:
    """Cut a parameter into what one process may compute by itself."""
    shape = tuple(param.shape)
    # The blocks of a contiguous meta tensor give each element's place by their offset and strides.
    blank = torch.empty(shape, device="meta")
    view = view_of(config, label)
    batch = config.rule.counts_matrices(config.group)
    swapped = None
    if is_transposed(view):
        swapped = (len(shape) - 2, len(shape) - 1) if batch else (0, 1)
    strides = blank.stride()
    for suffix, block in cut_blocks(config, blank, view):
        kind = config.matrix(block.shape)
        counted = batch and not whole and len(block.shape) > 2 and swapped != (0, 1)
        if view is None and rows_apart(config, block.shape):
            ranges = _shards(block, layout)
        else:
            ranges = _ranges(block, kind, layout) if counted else None
        for rows in ranges or (None,):
            part = block if rows is None else block.narrow(0, *rows)
            stored = part if swapped is None else part.transpose(*swapped)
            offset = int(part.storage_offset())
            first = []
            for stride in strides:
                at, offset = divmod(offset, stride) if stride else (0, offset)
                first.append(at)
            box = Region(tuple(first), tuple(stored.shape))
            extent = Extent(int(part.storage_offset()), part.stride())
            yield Unit(suffix, config.matrix(part.shape), part.shape, box, swapped, extent, rows, kind.specs)


def _ranges(block: Tensor, kind: MatrixKind, layout: Layout | None) -> list[tuple[int, int]] | None:
    """Cut a batch of matrices: where its processes' shards begin, or into single matrices.

    None if it must stay whole, because it has entries that are not a matrix's own.
    """
    count = block.shape[0]
    for spec in kind.specs.values():
        if spec.shape[:1] != (count,) or is_large(spec, kind.shape):
            return None
    return _shards(block, layout) or [(at, 1) for at in range(count)]


def _shards(block: Tensor, layout: Layout | None) -> list[tuple[int, int]] | None:
    """Return (first index, number of indices) of each shard; None unless dimension 0 alone is cut."""
    if layout is not None and layout.mesh_dims[0] and not any(layout.mesh_dims[1:]):
        held = sorted({(run.start, run.stop) for run in layout.intervals[0].values() if len(run)})
        if sum(stop - start for start, stop in held) == block.shape[0]:
            return [(start, stop - start) for start, stop in held]
    return None
