"""Take a step: make state, count, measure and compile for all batches, then run the passes of each."""

from __future__ import annotations

import sys
from collections.abc import Callable, MutableMapping, Sequence
from functools import partial
from operator import attrgetter
from types import FrameType
from typing import Any

from torch import Tensor

from steepest.compile.available import PAYS_FROM, wants_compiling
from steepest.engine.batches import ParamBatch
from steepest.engine.chunks import run_eager
from steepest.engine.collect import Collector
from steepest.engine.compiled import prepare, run_compiled
from steepest.engine.cpu_offload import on_host
from steepest.engine.grad_check import check
from steepest.engine.layout import Row
from steepest.engine.matrices import MatrixRun, UserFunctions, step_matrices, step_one_by_one
from steepest.engine.owners import Exchange, step_together
from steepest.engine.reductions import adds_up_shards, measure, reads_back, write_measured
from steepest.engine.state import lacks_state, make_state
from steepest.engine.step_count import add_step, count_steps, noise_keys
from steepest.engine.units import Sharding
from steepest.rule import Group, Targets

__all__ = ["decide", "take_step"]

_kept_rows, _dtypes = attrgetter("rows"), attrgetter("dtypes")


def decide(
    collector: Collector,
    batches: list[ParamBatch],
    groups: Sequence[Group],
    states: MutableMapping[Tensor, Any],
    targets: Targets | None,
    user_functions: Callable[[ParamBatch], UserFunctions | None],
) -> bool | Tensor:
    """Return whether the step may be taken, before anything changes; a tensor if only the device knows.

    Args:
        collector: the optimizer's.
        batches: the step's.
        groups, states: all of the optimizer's.
        targets: what parameters stand for whose rule moves that.
        user_functions: gives a subclass's own code for a batch, if it has any.

    Raises:
        FloatingPointError, RuntimeError, ValueError: see :meth:`steepest.Optimizer.step`.
    """
    sharded = collector.sharded
    watched = sharded or any(group["nonfinite"] != "ignore" for group in groups)
    if not watched and targets is None:
        return True
    sharding = collector.sharding(groups, user_functions) if sharded else None
    exchanging = sharded and (sharding is not None or adds_up_shards(groups, states))
    fault = None if sharding is None else _missing_factor(batches, sharding)
    given = (batches, groups, sharded, exchanging, collector.history, fault)
    may = partial(check, *given) if watched else lambda: True
    return may() if targets is None else targets.agree(groups, states, may)


def _missing_factor(batches: list[ParamBatch], sharding: Sharding) -> ValueError | None:
    """Return the error if this process lacks what it needs to compute its matrices; others would wait."""
    if not sharding.unchecked:
        return None
    sharding.bind(batches)
    for batch in batches:
        for member in batch.members:
            if id(member.owner) in sharding.unchecked:
                try:
                    lacks_state(batch.config, member)
                except ValueError as error:
                    return error
                sharding.unchecked.remove(id(member.owner))
    return None


def take_step(
    batches: list[ParamBatch],
    finite: bool | Tensor,
    groups: Sequence[Group],
    states: MutableMapping[Tensor, Any],
    user_functions: Callable[[ParamBatch], UserFunctions | None],
    sharding: Sharding | None = None,
) -> bool | Tensor:
    """Step parameters if their gradients are finite.

    Args:
        batches: what is stepped.
        finite: whether the gradients are; a tensor where only the device knows.
        groups: all of the optimizer's.
        states: the parameters' states, which makes an entry where there is none.
        user_functions: gives a subclass's own code for a batch, if it has any.
        sharding: who computes the matrices of members that have units; None if no member has any.

    Returns:
        Whether the step was taken: ``finite``, a tensor where only the device knows.
    """
    reads = any(batch.config.offloaded or batch.config.rule.moves for batch in batches)
    if isinstance(finite, Tensor) and (reads_back(batches) or reads):
        finite = bool(finite)
    if finite is False:
        return False
    mask = finite if isinstance(finite, Tensor) else None
    if sharding is not None:
        sharding.bind(batches)
    # Batches of a plan have their state.
    if not all(map(_kept_rows, batches)):
        first = not states
        make_state(batches, states)
        if first and _for_a_checkpoint():
            return finite
    measuring = False
    for batch in batches:
        if batch.config.counted:
            count_steps(batch)
        measuring |= batch.config.measures
    if measuring:
        measure(batches, groups, states)
    own: list[UserFunctions | None] = []
    batches = [*batches]  # a plan keeps its own as they are
    for at, batch in enumerate(batches):
        functions = user_functions(batch) if batch.config.rule.transforms else None
        if functions is not None and functions.decay is not None:
            batches[at] = ParamBatch(batch.config.without_decay(), batch.members)
        own.append(functions)
    # Compiling may fail, so it comes before anything is written.
    compiled = [_compiles(batch, mask is not None) for batch in batches]
    steps = list(zip(batches, compiled, own, strict=True))
    # User code may raise, so it comes first, when the least has been stepped.
    if sharding is not None:
        steps = _step_together(steps, mask, sharding, of_users=True)
    for batch, wish, functions in steps:
        if functions is not None:
            step_one_by_one(batch, _on(mask, batch), wish, functions)
    if sharding is not None:
        steps = _step_together(steps, mask, sharding, of_users=False)
    for batch, wish, functions in steps:
        if functions is None:
            _run(batch, _on(mask, batch), wish)
    return finite


def _for_a_checkpoint() -> bool:
    """Return whether torch.distributed.checkpoint takes this first step only so that the state exists.

    It steps with zero gradients and lr = 0 to save the state or to load into it. As a step, that would count,
    which shifts bias corrections and schedules, and an L2 decay would enter the momentum, even in the run
    that saves. Zero gradients are no sign of it, as one of several processes may have no others; the caller
    is the same on all.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_init_optim_state":
            module: str = frame.f_globals.get("__name__", "")
            return module.startswith("torch.distributed.checkpoint")
        frame = frame.f_back
    return False


_Step = tuple[ParamBatch, bool, "UserFunctions | None"]


def _step_together(
    steps: list[_Step], mask: Tensor | None, sharding: Sharding, *, of_users: bool
) -> list[_Step]:
    """Step the members that have units, of batches with the user's own code or of the others.

    Return what is left.
    """
    exchanges, left = [], []
    for batch, wish, functions in steps:
        shared = [member for member in batch.members if member.units is not None]
        if not shared or (functions is not None) != of_users:
            left.append((batch, wish, functions))
            continue
        config, finite = batch.config, _on(mask, batch)
        run = MatrixRun(config, config.numbers(), finite, run_compiled if wish else run_eager)
        exchanges.append(Exchange(ParamBatch(config, shared), run, functions))
        alone = [member for member in batch.members if member.units is None]
        if alone:
            left.append((ParamBatch(config, alone), wish, functions))
    step_together(exchanges, sharding)
    for exchange in exchanges:
        _finish(exchange.batch, exchange.run.finite)
    return left


def _on(mask: Tensor | None, batch: ParamBatch) -> Tensor | None:
    return None if mask is None else mask.to(batch.config.device)


def _compiles(batch: ParamBatch, guarded: bool) -> bool:
    """Decide whether a batch's passes run compiled, and if so compile them."""
    config = batch.config
    if config.rule.moves:
        return False
    option = config.group["compile"]
    if option is None and sum([member.param.numel() for member in batch.members]) < PAYS_FROM:
        return False
    if not wants_compiling(option, PAYS_FROM, config.device):
        return False
    if not config.offloaded:
        dtypes = (
            {tuple([column.dtype for column in member.columns]) for member in batch.members}
            if batch.rows is None
            else set(map(_dtypes, batch.rows))
        )
        prepare(config, dtypes, batch.members[0].scalars, guarded)
    return True


def _run(batch: ParamBatch, finite: Tensor | None, compiled: bool) -> None:
    config = batch.config
    if config.rule.moves:
        # The rule counts its own steps, those with something to move.
        for member in batch.members:
            config.rule.move(member.target, member.state, config.group)
        return
    if config.rule.transforms:
        step_matrices(batch, finite, compiled)
    elif config.offloaded:
        for near in on_host(batch):
            _step_elements(near, None, compiled)
    else:
        _step_elements(batch, finite, compiled)
    _finish(batch, finite)


def _finish(batch: ParamBatch, finite: Tensor | None) -> None:
    """Write the new state per tensor, and count the step."""
    config = batch.config
    if config.measures:
        write_measured(batch.members)
    # Existing counts go on even if no option needs them any more.
    if config.counted or any(["step" in member.state for member in batch.members]):  # noqa: C419
        add_step(batch, finite)


def _step_elements(batch: ParamBatch, finite: Tensor | None, compiled: bool) -> None:
    config = batch.config
    block = config.storage.block
    rows = batch.rows or [Row(each.columns, {}, None, each.extent, block=block) for each in batch.members]
    for row, member in zip(rows, batch.members, strict=True):
        row.scalars = member.scalars
    if config.noisy:
        for row, key in zip(rows, noise_keys(config, batch.members), strict=True):
            row.key = key
    run = run_compiled if compiled else run_eager
    run("whole", config, rows, config.numbers(), finite)
