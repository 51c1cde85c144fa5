"""plan(): the memory of training a model, or the best optimizer that fits into a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from steepest.hyperparameters import StateDtype
from steepest.planning.budget import FORMATS, choose, parse_bytes
from steepest.planning.memory import Plan, PlanRow, make_plan, own_temporaries, prepare
from steepest.planning.shapes import Shapes, listed

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement

__all__ = ["plan"]


def plan(
    model: nn.Module | Shapes,
    rule: str | None = None,
    *,
    budget: int | str | None = None,
    rules: Sequence[str | Mapping[str, Any]] | None = None,
    state_dtypes: Sequence[StateDtype] = FORMATS,
    param_dtype: torch.dtype | None = None,
    mesh: Sequence[int] | None = None,
    placements: Sequence[Placement] | None = None,
    rank: int = 0,
    device: torch.device | str | None = None,
    **options: Any,
) -> Plan:
    """Plan the memory of training a model on the meta device: nothing is allocated, and no step is taken.

    The state is made by the code that makes it for the first step, so that its bytes are exactly those of
    ``optimizer.state_bytes()`` after it, of this process if the model is sharded. Counted are parameters,
    gradients in their dtype, state, and a bound on the temporaries of a step; not activations, nor what
    torch and its libraries allocate for themselves.

    Temporaries: an element or tensor rule works in chunks, of 1 MiB on a CPU and 128 MiB elsewhere. The
    matrices of a bucket are transformed on the meta device by the rule itself, and what lives at a time is
    counted. The batches of a step run one after the other, so that the largest counts; a CPU also keeps up
    to 64 MiB of stacks. A fused kernel of a device may take less.

    Args:
        model: a module, on any device; or names and shapes of parameters, as a dict or pairs. The names then
            tell embeddings and output layers from hidden ones: a ``weight`` of two dimensions is a linear
            layer's, unless its module's name ends in a word for an embedding (``wte``, ``embed_tokens``),
            and :func:`steepest.build` finds output layers (``lm_head``, ``head``, ...) by their names, or
            takes the last layer. ``overrides`` corrects it.
        rule: the main rule; by default ``"muon"``.
        budget: bytes that parameters, gradients, state and temporaries may take together where the model is,
            as a number or as in ``"22GB"``, ``"22GiB"``, ``"800MB"``. Rule and format of each tensor's state
            are chosen: see below.
        rules: with a budget, rules from the best to the last resort, as names or dicts of group options
            including ``"rule"``; by default ``rule`` alone.
        state_dtypes: with a budget, formats of the state from the best to the last resort.
        param_dtype: of the parameters, if ``model`` are shapes; by default float32.
        mesh, placements, rank: the sizes of a device mesh, how it cuts the parameters (``Replicate()`` or
            ``Shard(dim)`` for each of its dimensions), and the process to plan for, for a model that is not
            yet sharded. What lacks a dimension is replicated. A model of DTensors is planned as it is.
        device: where the model will be trained; by default where it is, and the CPU for shapes and models on
            the meta device.
        **options: all other arguments of :func:`steepest.build`.

    With a budget, every tensor starts with the best rule that takes it in the best format. While the sum
    exceeds the budget, the tensor moves down the ranking (all formats of a rule come before the next rule)
    that saves the most bytes for each of its parameters and ranks; in the end, those go up again that still
    fit. This is tried below every bound on temporaries that some choice has, and the plan with the smallest
    sum of parameters times ranks is taken. It is a good one, not proven to be the best.
    ``Plan.arguments`` are the arguments of ``build``, and ``PlanRow.moved`` says what was saved.

    Raises:
        TypeError: an option that the rule does not know, or that does not go with the others; a string in
            place of a list, or a tensor in place of a shape.
        ValueError: a budget into which nothing fits; see also :func:`steepest.build`, which does not take
            models on the meta device.

    >>> shapes = {"embed.weight": (100, 64), "layers.0.fc.weight": (256, 64), "norm.weight": (64,)}
    >>> [(row.name, row.rule, row.state_bytes) for row in plan(shapes, "muon").rows]
    [('layers.0.fc.weight', 'muon', 65536), ('embed.weight', 'adamw', 51208), ('norm.weight', 'adamw', 520)]
    >>> with torch.device("meta"):
    ...     model = nn.Sequential(nn.Embedding(10**6, 4096), nn.Linear(4096, 4096), nn.Linear(4096, 10**6))
    >>> plan(model, "lion", state_dtype="int8").bytes_per_parameter
    1.062...
    >>> fitting = plan(model, rules=["adamw", "lion"], budget="80GB")
    >>> fitting.total_bytes <= 80e9, fitting.arguments["rule"]
    (True, 'adamw')
    """
    if budget is None:
        if rules is not None:
            raise TypeError("rules needs a budget to choose by; without one give rule")
        meta, where = prepare(model, param_dtype, mesh, placements, rank, device)
        return make_plan(meta, where, {"rule": "muon" if rule is None else rule, **options})
    if rules is not None and rule is not None:
        raise TypeError("give rule or rules: the first of rules is the main one")
    taken = {"memory", "state_dtype"} & options.keys()
    if taken:
        raise TypeError(f"{min(taken)} does not go with a budget, which chooses among state_dtypes")
    ranked = rules if rules is not None else ["muon" if rule is None else rule]
    limit, model = parse_bytes(budget), listed(model)

    def planned(arguments: Mapping[str, Any]) -> Plan:
        meta, where = prepare(model, param_dtype, mesh, placements, rank, device)
        return make_plan(meta, where, arguments)

    def rows_of(arguments: Mapping[str, Any]) -> list[tuple[PlanRow, int]]:
        meta, where = prepare(model, param_dtype, mesh, placements, rank, device)
        return own_temporaries(meta, where, arguments)

    return choose(planned, rows_of, ranked, state_dtypes, limit, options)
