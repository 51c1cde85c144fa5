"""Plan the memory of training a model, from its modules or its parameters' names and shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from steepest.distributed.local import is_dtensor, local_part
from steepest.engine.batches import ParamBatch, ParamUpdate
from steepest.engine.state import fresh_state
from steepest.engine.units import Sharding
from steepest.explain import Row
from steepest.optimizer import Optimizer
from steepest.planning.meta import blank, on_meta, sharding
from steepest.planning.shapes import Shapes, model_of
from steepest.planning.table import plan_table
from steepest.planning.temporaries import temporary_bytes
from steepest.routing.build import route
from steepest.rule import find_rule

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement

__all__ = ["Plan", "PlanRow", "make_plan", "own_temporaries", "prepare"]


@dataclass(frozen=True)
class PlanRow:
    """What one tensor takes on this process, in bytes.

    Attributes:
        name: the parameter's name; for ternary weights that of the packed ones.
        shape: its shape, of the whole tensor if it is sharded.
        rule: the rule's name.
        numel: the elements that this process holds.
        parameter_bytes: of the parameter.
        gradient_bytes: of its gradient, in the parameter's dtype; 0 if it is frozen. Of ternary weights, the
            votes.
        state_bytes: of the optimizer's state.
        host_bytes: how many of those lie in host memory, by ``state_device="cpu"`` with an accelerator.
        adamw_bytes: what ``torch.optim.AdamW`` would keep: two averages in the parameter's dtype, and a
            step count of 4 bytes. Of ternary weights, as if they were stored in their scales' dtype.
        state: how its averages are stored: ``"float32"``, or ``"int8/64"``; None where it has none.
        master: the format of its master weight; None where none is kept.
        frozen: whether it requires no gradient.
        why: why it has this rule.
        moved: with a budget, how it went down the ranking, and what that saves; otherwise empty.
    """

    name: str
    shape: tuple[int, ...]
    rule: str
    numel: int
    parameter_bytes: int
    gradient_bytes: int
    state_bytes: int
    host_bytes: int
    adamw_bytes: int
    state: str | None
    master: str | None
    frozen: bool
    why: str
    moved: str = ""

    @property
    def bytes_per_parameter(self) -> float:
        """The bytes of state for each element."""
        return self.state_bytes / max(1, self.numel)


@dataclass(frozen=True)
class Plan:
    """What training a model takes on one process, in bytes; ``str()`` makes a table.

    Attributes:
        rows: every tensor, in the order of the optimizer's param groups.
        temporary_bytes: a bound on what a step holds besides parameters, gradients and state; on the
            accelerator, if there is one.
        host_temporary_bytes: the same in host memory, of groups with ``state_device="cpu"`` and an
            accelerator.
        arguments: what :func:`steepest.build` takes beside the model to make this optimizer.
        budget: the bytes that were to suffice, or None.
    """

    rows: tuple[PlanRow, ...]
    temporary_bytes: int
    host_temporary_bytes: int
    arguments: Mapping[str, Any] = field(default_factory=dict)
    budget: int | None = None

    @property
    def parameters(self) -> int:
        """The number of elements that this process holds."""
        return sum(row.numel for row in self.rows)

    @property
    def parameter_bytes(self) -> int:
        """The bytes of all parameters."""
        return sum(row.parameter_bytes for row in self.rows)

    @property
    def gradient_bytes(self) -> int:
        """The bytes of all gradients, if they exist at the same time."""
        return sum(row.gradient_bytes for row in self.rows)

    @property
    def state_bytes(self) -> int:
        """The bytes of all state: ``optimizer.state_bytes()`` after the first step."""
        return sum(row.state_bytes for row in self.rows)

    @property
    def host_bytes(self) -> int:
        """The bytes of state in host memory, by ``state_device="cpu"`` with an accelerator."""
        return sum(row.host_bytes for row in self.rows)

    @property
    def adamw_bytes(self) -> int:
        """The bytes of state that ``torch.optim.AdamW`` would keep."""
        return sum(row.adamw_bytes for row in self.rows)

    @property
    def bytes_per_parameter(self) -> float:
        """The bytes of state for each element."""
        return self.state_bytes / max(1, self.parameters)

    @property
    def total_bytes(self) -> int:
        """Parameters, gradients, state and temporaries where the model is; activations are not counted."""
        state = self.state_bytes - self.host_bytes
        return self.parameter_bytes + self.gradient_bytes + state + self.temporary_bytes

    def __str__(self) -> str:
        return self.table()

    def table(self, width: int = 110) -> str:
        """Format the plan; tensors that differ only in numbers within their names share a line.

        Args:
            width: of the lines, at least 80; longer reasons are wrapped.
        """
        return plan_table(self, max(width, 80))


@torch.inference_mode(False)
def prepare(
    model: nn.Module | Shapes,
    param_dtype: torch.dtype | None,
    mesh: Sequence[int] | None,
    placements: Sequence[Placement] | None,
    rank: int,
    device: torch.device | str | None,
) -> tuple[nn.Module, torch.device]:
    """Return the model on the meta device, sharded as asked, and the device on which it will be trained."""
    if isinstance(model, nn.Module):
        if param_dtype is not None:
            raise ValueError("param_dtype is for shapes: a model's parameters have their own dtypes")
        own = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    elif isinstance(model, (str, bytes, type)) or not hasattr(model, "__iter__"):
        raise TypeError(f"plan() takes a torch.nn.Module or names and shapes, got {type(model).__name__}")
    else:
        model, own = model_of(model, param_dtype or torch.float32), torch.device("cpu")
    where = own if device is None else torch.device(device)
    if where.type == "meta":
        raise ValueError("device is where the model will be trained, such as 'cuda'; got 'meta'")
    place = None
    if (mesh is None) != (placements is None):
        raise ValueError("mesh and placements belong together")
    if mesh is not None and placements is not None:
        place = sharding(mesh, placements, rank, where.type)
    elif rank != 0:
        raise ValueError(f"rank={rank} needs a mesh; a sharded model knows its own")
    return on_meta(model, place), where


@torch.inference_mode(False)
def make_plan(meta: nn.Module, device: torch.device, arguments: Mapping[str, Any]) -> Plan:
    """Plan for a model on the meta device, which must not be in use otherwise.

    Args:
        meta: from :func:`prepare`; its gradients are set.
        device: where it will be trained.
        arguments: of :func:`steepest.build`, beside the model.
    """
    rows, batches, shared = _planned(meta, device, arguments)
    here, on_host = temporary_bytes(batches, shared, device)
    return Plan(rows, here, on_host, dict(arguments))


@torch.inference_mode(False)
def own_temporaries(
    meta: nn.Module, device: torch.device, arguments: Mapping[str, Any]
) -> list[tuple[PlanRow, int]]:
    """Return all rows of a plan, each with what a step of the tensors of its shape and rule holds at most.

    The arguments are :func:`make_plan`'s.
    """
    rows, batches, shared = _planned(meta, device, arguments)
    parts: dict[tuple[str, tuple[int, ...]], list[ParamBatch]] = {}
    for batch in batches:
        by_shape: dict[tuple[int, ...], list[ParamUpdate]] = {}
        for member in batch.members:
            by_shape.setdefault(tuple(member.owner.shape), []).append(member)
        for shape, members in by_shape.items():
            parts.setdefault((batch.config.rule.name, shape), []).append(ParamBatch(batch.config, members))
    found = {key: temporary_bytes(part, shared, device)[0] for key, part in parts.items()}
    return [(row, found.get((row.rule, row.shape), 0)) for row in rows]


def _planned(
    meta: nn.Module, device: torch.device, arguments: Mapping[str, Any]
) -> tuple[tuple[PlanRow, ...], list[ParamBatch], Sharding | None]:
    """Return the rows of a plan, and what its first step would step."""
    optimizer = route(meta, **arguments, materialized=False)
    batches, shared = _first_step(optimizer)
    states = {id(member.owner): member.state for batch in batches for member in batch.members}
    explained = iter(optimizer.explain().rows)
    rows = []
    for group in optimizer.param_groups:
        offloaded = (
            group["state_device"] == "cpu" and device.type != "cpu" and not find_rule(group["rule"]).moves
        )
        for param in group["params"]:
            target = None if optimizer.targets is None else optimizer.targets.find(param)
            rows.append(_row(next(explained), param, states.get(id(param), {}), target, offloaded=offloaded))
    return tuple(rows), batches, shared


def _first_step(optimizer: Optimizer) -> tuple[list[ParamBatch], Sharding | None]:
    """Collect what a first step with all gradients would step, and make its state, on the meta device."""
    groups, collector = optimizer.param_groups, optimizer._collector
    for group in groups:
        # Once some ternary weights have votes, a step makes the state of frozen ones, too.
        moves = find_rule(group["rule"]).moves and any(param.requires_grad for param in group["params"])
        for param in group["params"]:
            param.grad = blank(param) if param.requires_grad or moves else None
    batches = collector.batches_of("plan()", groups, optimizer.state, optimizer.targets)
    shared = collector.sharding(groups, optimizer._user_functions)
    if shared is not None:
        shared.bind(batches)
    for batch in batches:
        for member in batch.members:
            member.state = fresh_state(batch.config, member)
            if (target := member.target) is not None:
                # On the meta device accumulators are whole, also where each process keeps its own rows.
                rows = target.owner.rows(target.name, member.group)
                whole = member.state["accumulator"]
                member.state["accumulator"] = whole if rows is None else whole[rows.own]
            member.columns = [
                member.param,
                member.grad,
                *[member.state[name] for name in batch.config.element_state],
            ]
    return batches, shared


def _row(row: Row, param: Tensor, state: Mapping[str, Any], target: Any, *, offloaded: bool) -> PlanRow:
    local = local_part(param) if is_dtensor(param) else param
    numel, held, grad = local.numel(), local.nbytes, 0 if row.frozen else local.nbytes
    adamw = 0 if row.frozen else 2 * local.nbytes + 4
    if target is not None:
        numel = row.parameters
        held += target.layer.packed.nbytes
        if not row.frozen:
            grad += numel  # votes of one byte
            adamw = 2 * numel * target.layer.scale.itemsize + 4
    kept = sum(each.nbytes for each in state.values() if isinstance(each, Tensor))
    return PlanRow(
        name=row.name,
        shape=tuple(row.shape),
        rule=row.rule,
        numel=numel,
        parameter_bytes=held,
        gradient_bytes=grad,
        state_bytes=kept,
        host_bytes=kept if offloaded else 0,
        adamw_bytes=adamw,
        state=row.state,
        master=row.master,
        frozen=row.frozen,
        why=row.why,
    )
