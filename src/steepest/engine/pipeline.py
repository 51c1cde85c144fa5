"""The way of one step: state, counts, measure, then each batch's passes. Nothing is written before all is ready."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from torch import Tensor

from steepest.compile.available import wants_compiling
from steepest.engine.collect import ParamBatch
from steepest.engine.compiled import prepare
from steepest.engine.cpu_offload import on_host
from steepest.engine.execute import execute
from steepest.engine.layout import Row
from steepest.engine.matrices import MatrixFunction, step_matrices, step_one_by_one
from steepest.engine.reductions import measure, reads_back
from steepest.engine.state import make_state
from steepest.engine.step_count import add_step, count_steps, noise_key

__all__ = ["take_step"]


def take_step(
    batches: list[ParamBatch],
    finite: bool | Tensor,
    state_of: Callable[[Tensor], MutableMapping[str, Any]],
    states_by_rule: Callable[[], Mapping[str, list[Mapping[str, Tensor]]]],
    matrix_function: Callable[[ParamBatch], MatrixFunction | None],
) -> bool | Tensor:
    """Step parameters if their gradients are finite.

    Args:
        batches: what is stepped.
        finite: whether the gradients are; a tensor where only the device knows.
        state_of: gives a parameter's state, and makes an entry for it.
        states_by_rule: gives, for each rule's name, the state of every parameter that it has ever stepped.
        matrix_function: gives the optimizer's own matrix function for a batch, if it has one.

    Returns:
        Whether the step was taken: ``finite``, a tensor where only the device knows.
    """
    measuring = [batch for batch in batches if batch.config.measures]
    if isinstance(finite, Tensor) and (reads_back(measuring) or any(b.config.offloaded for b in batches)):
        finite = bool(finite)
    if finite is False:
        return False
    mask = finite if isinstance(finite, Tensor) else None
    make_state(batches, state_of)
    for batch in batches:
        count_steps(batch)
    if measuring:
        measure(measuring, states_by_rule)
    # Compiling takes seconds in which much can go wrong: it is done before anything is written.
    compiled = [_compiles(batch, mask is not None) for batch in batches]
    functions = [matrix_function(batch) if batch.config.rule.transforms else None for batch in batches]
    # User code may raise, so it comes first: least has been stepped then.
    for batch, wish, function in zip(batches, compiled, functions, strict=True):
        if function is not None:
            step_one_by_one(batch, _on(mask, batch), wish, function)
    for batch, wish, function in zip(batches, compiled, functions, strict=True):
        if function is None:
            _run(batch, _on(mask, batch), wish)
            _write_measured(batch)
            add_step(batch, mask)
    return finite


def _on(mask: Tensor | None, batch: ParamBatch) -> Tensor | None:
    return None if mask is None else mask.to(batch.config.device)


def _compiles(batch: ParamBatch, guarded: bool) -> bool:
    """Whether a batch's passes run compiled; its code is then made."""
    config = batch.config
    option = config.group["compile"]
    if option is False:
        return False
    elements = sum([member.param.numel() for member in batch.members])
    if not wants_compiling(option, elements, config.device):
        return False
    if not config.offloaded:
        dtypes = {tuple([column.dtype for column in member.columns]) for member in batch.members}
        prepare(config, dtypes, batch.members[0].scalars, guarded)
    return True


def _run(batch: ParamBatch, finite: Tensor | None, compiled: bool) -> None:
    if batch.config.rule.transforms:
        step_matrices(batch, finite, compiled)
    elif batch.config.offloaded:
        for near in on_host(batch):
            _step_elements(near, None, compiled)
    else:
        _step_elements(batch, finite, compiled)


def _step_elements(batch: ParamBatch, finite: Tensor | None, compiled: bool) -> None:
    config = batch.config
    noisy = config.noisy
    rows = [
        Row(member.columns, member.scalars, noise_key(config, member) if noisy else None)
        for member in batch.members
    ]
    execute("whole", config, rows, config.numbers(), finite, compiled)


def _write_measured(batch: ParamBatch) -> None:
    for member in batch.members:
        if member.measured is not None:
            for name, value in member.measured.items():
                entry: Any = member.state[name]
                entry.fill_(value)
