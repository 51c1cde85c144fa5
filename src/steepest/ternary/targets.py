"""The packed weights of a model's layers, as an optimizer steps them: their votes, and who takes part."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steepest.compile.available import wants_compiling
from steepest.distributed.agreement import digest
from steepest.distributed.local import is_dtensor, local_part
from steepest.random import derive_key
from steepest.rule import Group, StateSpec, find_rule
from steepest.ternary.checksum import checksum
from steepest.ternary.flipping import flip_layer
from steepest.ternary.layer import TernaryLinear
from steepest.ternary.old_checkpoints import renewed
from steepest.ternary.packing import count_zeros
from steepest.ternary.ranks import Group as ProcessGroup
from steepest.ternary.ranks import all_reduce, find_group, rank_and_world_size
from steepest.ternary.rows import WHOLE, AccumulatorRows, Rows, find_rows
from steepest.ternary.schedule import annealed
from steepest.ternary.stats import FlipStats, LayerStats
from steepest.ternary.vote_buffer import VoteBuffer, narrowest
from steepest.ternary.votes import LARGEST_VOTE

__all__ = ["PackedWeights", "ternary_layers"]


@dataclass(eq=False, frozen=True)
class _Target:
    """T of one layer."""

    name: str
    layer: TernaryLinear
    owner: PackedWeights

    @property
    def shape(self) -> tuple[int, int]:
        return self.layer.out_features, self.layer.in_features

    def accumulator(self, group: Group) -> StateSpec:
        rows = self.owner.rows(self.name, group)
        device = self.layer.packed.device
        return AccumulatorRows("matrix", group["accumulator"], self.shape, rows=rows, device=device)

    def move(self, state: MutableMapping[str, Any], group: Group) -> None:
        self.owner.move(self.name, state, group)


class PackedWeights:
    """What the ``votes`` of a model's layers stand for; see :class:`steepest.rule.Targets`."""

    def __init__(
        self, model: nn.Module, custom: Callable[[int], float] | None, process_group: ProcessGroup
    ) -> None:
        kind = type(model).__name__
        if not isinstance(model, nn.Module):
            raise TypeError(f"TernaryFlip takes a torch.nn.Module, got {kind}")
        self.layers = ternary_layers(model)
        if not self.layers:
            raise ValueError(f"{kind} has no ternary layers: steepest.ternary.ternarize(model) makes some")
        self._custom = custom
        self._asked_group = process_group
        # The ranks whose votes are summed.
        self.process_group: ProcessGroup = False
        # The parameters in the optimizer's groups.
        self._votes: dict[str, Tensor] = {}
        # The votes of each layer, once the optimizer's groups are known.
        self.buffers: dict[str, VoteBuffer] = {}
        # Votes that a copy brought, until its buffers are made.
        self._brought: dict[str, Any] = {}
        self._targets: dict[int, _Target] = {}
        # The steps taken, and the number of those before the one being taken.
        self._taken = self._step = 0
        self._thresholds: dict[int, float] = {}
        # The largest possible sum of a weight's votes over all ranks.
        self._largest: dict[str, int] = {}
        # Whether a byte holds each rank's own sum.
        self._fits_byte: dict[str, bool] = {}
        self._flips: dict[str, Tensor] = {}
        self._total_flips: dict[str, Tensor | int] = {}

    def find(self, param: Tensor) -> _Target | None:
        """T, for the parameter that stands for it."""
        return self._targets.get(id(param))

    def waits(self) -> bool:
        """Return True once there are votes: then all layers on all ranks step, so that their counts agree."""
        return self._taken > 0 or self._world_size() > 1 or any(b.passes > 0 for b in self.buffers.values())

    def rows(self, name: str, group: Group) -> Rows | None:
        """Return this rank's rows of a layer; None if it keeps the whole layer's accumulators."""
        layer = self.layers[name]
        if group["distributed"] is None:
            return None
        return find_rows(self.process_group, (layer.out_features, layer.in_features))

    def bind(self, groups: Sequence[Group], states: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """Read votes' options from these groups."""
        moved = [group for group in groups if find_rule(group["rule"]).moves]
        by_param = {id(param): group for group in moved for param in group["params"]}
        votes = {name: self._votes_of(name) for name in self.layers}
        for name, param in votes.items():
            if id(param) not in by_param:
                raise ValueError(f"the votes of ternary layer {name!r} are not among the parameters")
        self._check_options(moved)
        self.process_group = find_group(self._asked_group, votes)
        self._votes = votes
        self._targets = {id(param): _Target(name, self.layers[name], self) for name, param in votes.items()}
        self._taken = self._steps(states)
        self._divide(by_param, states)
        total = sum(layer.in_features * layer.out_features for layer in self.layers.values())
        for name, layer in self.layers.items():
            group = by_param[id(votes[name])]
            if (buffer := self.buffers.get(name)) is not None:
                buffer.options, buffer.step, buffer.group = group, self._taken, self.process_group
                continue
            # Warns now if there is no compiler.
            wants_compiling(group["compile"], total, layer.packed.device)
            # Noise is keyed by the layer's name, so it does not depend on the other layers.
            noise_id = zlib.crc32(name.encode())
            buffer = VoteBuffer(group, noise_id, total, self._taken, self.process_group)
            buffer.pending, buffer.passes, buffer.finite = self._brought.pop(name, (None, 0, None))
            self.buffers[name] = buffer
            layer.vote_buffer = buffer.handle

    def agree(
        self,
        groups: Sequence[Group],
        states: Mapping[Tensor, Mapping[str, Any]],
        check: Callable[[], bool | Tensor],
    ) -> bool:
        """Decide whether to take the step, the same on all ranks; if not, drop the votes."""
        self._check_owner()
        self._check_options(buffer.options for buffer in self.buffers.values())
        self._check_accumulators(states)
        self._step = self._taken = self._steps(states)
        # Once a step, before anything moves: a schedule given as a function may count or raise.
        self._thresholds = self._find_thresholds()
        finite, error = False, None
        try:
            # The host must know whether it may flip.
            finite = bool(check())
        except FloatingPointError as found:
            error = found
        # The largest sum rather than the number of passes: a rank without votes does not know their kind.
        largest = [b.passes * LARGEST_VOTE[b.kind] for b in self.buffers.values()]
        wide = [int(narrowest(each) != torch.int8) for each in largest]
        if self._world_size() > 1:
            largest, wide, finite = self._agreed(largest, wide, finite, compare=error is None)
        # The other ranks have learned of it.
        if error is not None:
            raise error
        self._largest = dict(zip(self.buffers, largest, strict=True))
        self._fits_byte = {name: each == 0 for name, each in zip(self.buffers, wide, strict=True)}
        if not finite:
            self.drop()
        return finite

    @torch.no_grad()
    def move(self, name: str, state: MutableMapping[str, Any], group: Group) -> None:
        """Sum the ranks' votes for a layer, and flip."""
        # torch's distributed checkpoints fill a fresh state by a step of their own, which must not count.
        if self._step == 0 and not any(self._largest.values()):
            return
        buffer = self.buffers[name]
        votes = self._sum(name, group)
        # Frees memory for the next layer; and if a later layer fails, these votes are not counted twice.
        buffer.clear()
        self._flips.pop(name, None)
        if votes is not None and self._votes[name].requires_grad:
            self._flips[name] = flips = self._flip(name, state, group, votes)
            self._total_flips[name] = self._total_flips.get(name, 0) + flips
        self._taken = buffer.step = self._step + 1
        state["step"].fill_(self._taken)

    def _flip(self, name: str, state: MutableMapping[str, Any], group: Group, votes: Tensor) -> Tensor:
        """Flip a layer, on every rank the whole of it or the own rows; return the layer's flips."""
        layer, buffer, rows = self.layers[name], self.buffers[name], self.rows(name, group)
        packed, a = layer.packed, state["accumulator"]
        if rows is None:
            # Where the layer is now, and contiguous, since counters are read as words where they lie.
            a = state["accumulator"] = a.to(packed.device).contiguous()
        else:
            packed, a = packed[rows.own], local_part(a)
        threshold = self._thresholds[id(buffer.options)]
        flips = flip_layer(
            packed,
            a,
            votes,
            bits=layer.bits,
            threshold=math.ceil(min(threshold, torch.iinfo(a.dtype).max + 1)),
            outward=group["outward"],
            zero_pull=group["zero_pull"],
            at_most=_at_most(group["max_flip_fraction"], layer),
            key=derive_key(group["seed"], buffer.noise_id, self._step),
            compiled=buffer.is_compiled(packed.device),
            part=WHOLE if rows is None else rows,
        )
        if rows is not None:
            flips = rows.share(layer.packed, flips)
        layer.seal()
        return flips

    def drop(self) -> None:
        """Drop votes that no step has counted."""
        for buffer in self.buffers.values():
            buffer.clear()

    def check_load(self, groups: Sequence[Group], loaded: Mapping[str, Any]) -> dict[str, Any]:
        """Return a state dict with the current names; raise an error if it cannot be loaded."""
        self._check_owner()
        loaded = self._placed(groups, renewed(groups, loaded, self.layers))
        try:
            self._check_options(g for g in loaded["param_groups"] if g.get("rule") == "ternary_flip")
        except ValueError as error:
            raise ValueError(f"the state dict's {error}; nothing was loaded") from None
        return dict(loaded)

    def _placed(self, groups: Sequence[Group], loaded: Mapping[str, Any]) -> dict[str, Any]:
        """Keep the present ``distributed``, which belongs to the processes and not to the training."""
        names = {id(votes): name for name, votes in self._votes.items()}
        kept = [dict(theirs) for theirs in loaded["param_groups"]]
        # Numbers of groups that differ are reported later.
        for ours, theirs in zip(groups, kept, strict=False):
            if "distributed" not in ours or theirs.get("rule") != ours["rule"]:
                continue
            theirs["distributed"] = ours["distributed"]
            for votes, key in zip(ours["params"], theirs["params"], strict=False):
                a = loaded["state"].get(key, {}).get("accumulator")
                name = names.get(id(votes))
                if name is not None and is_dtensor(a) and not _laid_out(a, self.rows(name, ours)):
                    raise ValueError(
                        f"the accumulator of ternary layer {name!r} is divided among processes "
                        "differently than here: load it with torch.distributed.checkpoint; nothing was loaded"
                    )
        return {**loaded, "param_groups": kept}

    def describe(self, param: Tensor, group: Group) -> dict[str, Any]:
        """Return the fields in which the row of T differs from that of its parameter."""
        target = self.find(param)
        assert target is not None
        # Not the layer's own class, which fully_shard replaces by one of its own.
        kind = "BinaryLinear, 1 bit" if target.layer.bits == 1 else "TernaryLinear, 2 bits"
        why = f"linear: {kind} a weight"
        if param.requires_grad:
            why += f"; moved by {group['votes']} votes, threshold {group['threshold']:g} {group['schedule']}"
            why += "; accumulators divided by rows" if self.rows(target.name, group) is not None else ""
        return {
            "name": f"{target.name}.packed" if target.name else "packed",
            "shape": target.shape,
            "lr": math.nan,
            "why": why,
            "parameters": math.prod(target.shape),
        }

    @torch.no_grad()
    def stats(self) -> FlipStats:
        """Return flips of the last step and the fraction of zeros, in all and by layer; a host sync."""
        layers, zeros, total = [], 0, 0
        for name, layer in self.layers.items():
            size = layer.in_features * layer.out_features
            zero = int(count_zeros(layer.packed, layer.in_features, layer.bits))
            layers.append(LayerStats(name, size, int(self._flips.get(name, 0)), zero / size))
            zeros, total = zeros + zero, total + int(self._total_flips.get(name, 0))
        weights = sum(each.weights for each in layers)
        return FlipStats(
            step=self._taken,
            threshold=max(self._find_thresholds().values()),
            weights=weights,
            flips=sum(each.flips for each in layers),
            total_flips=total,
            zeros=zeros / weights,
            layers=tuple(layers),
        )

    def _world_size(self) -> int:
        return rank_and_world_size(self.process_group)[1]

    def _steps(self, states: Mapping[Tensor, Mapping[str, Any]]) -> int:
        """Return the steps taken, one number for all layers, since a frozen layer may have no state."""
        found = (states.get(votes, {}).get("step", 0) for votes in self._votes.values())
        return max(int(step) for step in found)

    def _divide(self, groups: Mapping[int, Group], states: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """Cut whole accumulators, which a state dict may bring, where each rank keeps its rows."""
        for name, votes in self._votes.items():
            rows, state = self.rows(name, groups[id(votes)]), states.get(votes, {})
            a = state.get("accumulator")
            if rows is not None and a is not None and not is_dtensor(a):
                assert isinstance(state, MutableMapping)
                state["accumulator"] = rows.part_of(a)

    def _votes_of(self, name: str) -> Tensor:
        """Return the parameter that stands for T of a layer."""
        known, now = self._votes.get(name), self.layers[name].votes
        # After a forward pass, FSDP2 may leave a whole copy in a DTensor's place.
        return now if known is None or is_dtensor(now) or not is_dtensor(known) else known

    def _sum(self, name: str, group: Group) -> Tensor | None:
        """Sum all ranks' votes for a layer, or for the own rows, with room for a pull; None without votes."""
        buffer, layer, largest = self.buffers[name], self.layers[name], self._largest[name]
        if largest == 0:
            return None
        dtype = narrowest(largest + (group["zero_pull"] > 0))
        mine = buffer.pending
        if mine is None:
            mine = torch.zeros(layer.out_features, layer.in_features, dtype=dtype, device=layer.packed.device)
        rows = self.rows(name, group)
        if rows is not None:
            mine = mine.to(layer.packed.device, torch.int8 if self._fits_byte[name] else dtype)
            return rows.sum_votes(mine, dtype)
        mine = mine.to(layer.packed.device, dtype)
        return all_reduce(self.process_group, mine) if self._world_size() > 1 else mine

    def _find_thresholds(self) -> dict[int, float]:
        """τ of the next step, by the id of a group."""
        return {key: self._threshold(group) for key, group in self._groups().items()}

    def _threshold(self, group: Group) -> float:
        if group["schedule"] == "annealed":
            return annealed(group["threshold"], self._taken, group["total_steps"], group["power"])
        if group["schedule"] == "constant":
            return float(group["threshold"])
        assert self._custom is not None
        value = float(self._custom(self._taken))
        if math.isnan(value) or value <= 0:
            raise ValueError(f"the schedule's threshold at step {self._taken} must be above 0, got {value!r}")
        return value

    def _check_owner(self) -> None:
        for name, layer in self.layers.items():
            if id(self._votes_of(name)) not in self._targets:
                raise RuntimeError(
                    f"the votes of ternary layer {name!r} are not the tensor that this optimizer was "
                    "made for: load_state_dict(assign=True) replaces it. Nothing was changed. Make the "
                    "optimizer after loading."
                )
            if layer.vote_buffer is not self.buffers[name].handle:
                raise RuntimeError(
                    f"the ternary layer {name!r} belongs to another TernaryFlip, made later for its model; "
                    "nothing was changed"
                )

    def _agreed(
        self, largest: list[int], wide: list[int], finite: bool, compare: bool
    ) -> tuple[list[int], list[int], bool]:
        """Return over all ranks: the largest sums of votes, how many are wide, whether all are finite.

        Raises:
            RuntimeError: on all ranks that ``compare``, if options or weights T differ.
        """
        packed = [layer.packed for layer in self.layers.values()]
        digests = {id(group): self._digest(group) for group in self._groups().values()}
        options = [digests[id(buffer.options)] for buffer in self.buffers.values()]
        # Once, since equal layers that take equal steps stay equal.
        # The upper 40 bits, so that sums over ranks do not overflow.
        weights = [int(checksum(each) >> 24) if self._taken == 0 else 0 for each in packed]
        unfit = [not finite] * len(packed)
        table = torch.tensor([largest, wide, unfit, options, weights], device=packed[0].device)
        largest, wide, unfit, *totals = all_reduce(self.process_group, table).tolist()
        # Distributed checkpoints fill a fresh state by a step without votes, before they load T.
        if compare and any(largest):
            if (name := self._differing(options, totals[0])) is not None:
                raise RuntimeError(
                    f"the processes have different options for ternary layer {name!r}; nothing was changed"
                )
            if (name := self._differing(weights, totals[1])) is not None:
                raise RuntimeError(
                    f"the processes have different weights T in ternary layer {name!r}; nothing was changed. "
                    "Make the model with the same seed on all of them: fully_shard does not broadcast buffers"
                )
        return largest, wide, not any(unfit)

    def _groups(self) -> dict[int, Group]:
        """Return the layers' param groups by id."""
        return {id(buffer.options): buffer.options for buffer in self.buffers.values()}

    def _digest(self, group: Group) -> int:
        """Return 40 bits of the options that must be equal on all ranks, and of this step's threshold."""
        names = {*find_rule(group["rule"]).hyper, "seed"} - {"lr", "weight_decay"}
        return digest([self._thresholds[id(group)], *((name, group[name]) for name in sorted(names))]) >> 16

    def _differing(self, numbers: Sequence[int], totals: Sequence[int]) -> str | None:
        """Return the first layer whose number is not the same on all ranks, from the numbers' sums."""
        world_size = self._world_size()
        each = zip(self.layers, numbers, totals, strict=True)
        return next((name for name, own, total in each if total != own * world_size), None)

    def _check_options(self, groups: Any) -> None:
        binary = next((name for name, layer in self.layers.items() if layer.bits == 1), None)
        for group in groups:
            if group.get("zero_pull", 0) > 0 and binary is not None:
                raise ValueError(
                    f"TernaryFlip: zero_pull is for ternary weights, and layer {binary!r} is binary; make a "
                    "TernaryFlip of its own for the ternary part of the model"
                )
            if group.get("schedule") == "custom" and self._custom is None:
                raise ValueError(
                    "TernaryFlip: schedule='custom' needs the function, which state dicts do not hold: make "
                    "it with schedule=..."
                )

    def _check_accumulators(self, states: Mapping[Tensor, Mapping[str, Any]]) -> None:
        for name, votes in self._votes.items():
            asked = self.buffers[name].options["accumulator"]
            a = states.get(votes, {}).get("accumulator")
            if a is not None and a.dtype != asked:
                raise ValueError(
                    f"TernaryFlip: accumulator was {a.dtype} when the accumulators were made and cannot "
                    f"become {asked}; nothing was changed"
                )
            if a is not None and not _laid_out(a, self.rows(name, self.buffers[name].options)):
                raise ValueError(
                    "TernaryFlip: distributed, or the number of processes, was different when the "
                    f"accumulator of layer {name!r} was made; nothing was changed. Make a new optimizer, and "
                    "load a checkpoint with torch.distributed.checkpoint"
                )

    def __getstate__(self) -> dict[str, Any]:
        """Copy the votes, not the buffers that hold them. Process groups cannot be copied."""
        votes = {name: (b.pending, b.passes, b.finite) for name, b in self.buffers.items()}
        asked = False if self._asked_group is False else None
        fresh = {"buffers": {}, "_targets": {}, "process_group": False}
        return {**self.__dict__, **fresh, "_brought": votes, "_asked_group": asked}


# What torch.compile and activation checkpointing call the module that they wrap.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")


def _laid_out(accumulator: Tensor, rows: Rows | None) -> bool:
    """Tell whether an accumulator is whole, or of these rows."""
    return not is_dtensor(accumulator) if rows is None else rows.fits(accumulator)


def _at_most(fraction: float, layer: TernaryLinear) -> int | None:
    """Return how many weights of a layer may flip in a step; None means no limit."""
    size = layer.in_features * layer.out_features
    # At least one, or a small layer would never move.
    return None if fraction == 1 else max(int(fraction * size), int(fraction > 0))


def ternary_layers(model: nn.Module) -> dict[str, TernaryLinear]:
    """Find a model's ternary and binary layers, by their names without the prefixes of torch's wrappers."""
    wrapper = nn.parallel.DistributedDataParallel
    while hasattr(model, inner := "module" if isinstance(model, wrapper) else "_orig_mod"):
        model = getattr(model, inner)
    return {
        ".".join(part for part in name.split(".") if part not in _WRAPPED): module
        for name, module in model.named_modules()
        if isinstance(module, TernaryLinear)
    }
