"""Compare the cases of a group: construct, profile and time them, and return the rows of a table."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch.optim import Optimizer

from steepest.lab.training.state_memory import state_bytes
from steepest.lab.training.timing import Timing
from steepest.model_shapes import ModelShapes

from .bandwidth import AXPY, COPY, axpy, axpy_bytes, copy, copy_bytes, least_bytes
from .case import GRAPH, Case, Scope
from .config import BenchConfig
from .groups import Group
from .memory import batch_by_memory, estimated_bytes, planned_state_bytes
from .params import SharedParams
from .products import Product, total_flops
from .profiling import StepProfile, capture_graph, profile_step, try_capture
from .results import Row, error_line, timed

# Some optimizers only measure the gradients in their first step and update parameters from the second on.
_FIRST_STEPS = 2
# After this many steps every optimizer has left its initial phase, so a graph can replay the step.
_STEPS_BEFORE_CAPTURE = 5


class InvalidStep(Exception):
    """The optimizer's step does not update the parameters, or makes them non-finite."""


class EagerOnly(Exception):
    """The optimizer was told to compile its step but ran eagerly."""


@dataclass(frozen=True)
class PreparedCase:
    """A case whose optimizer has taken its first steps; `run` takes another one, and leaves the gradients."""

    case: Case
    optimizer: Optimizer
    run: Callable[[], object]
    profile: StepProfile
    scope: Scope

    @property
    def products(self) -> dict[Product, int]:
        """The matrix products of a step."""
        return self.profile.products


def compare(
    group: Group,
    shapes: ModelShapes,
    config: BenchConfig,
) -> list[Row]:
    """Return a row for every case of the group, measured or not, and one for axpy in the first batch."""
    tensors = group.tensors(shapes, config.blocks)
    count = sum(tensor.numel for tensor in tensors)
    param_bytes = 2 * config.dtype.itemsize * count
    needs = {case.key: estimated_bytes(case, tensors, config.dtype) for case in group.cases}
    batches, too_large = batch_by_memory(group.cases, needs, config.memory - param_bytes)
    rows: list[Row] = []
    if batches:
        shared = SharedParams.create(tensors, config.device, config.dtype)
        for batch in batches:
            known = {row["key"] for row in rows}
            new = _measure(group, batch, shared, config)
            rows += [row for row in new if row["key"] not in known]
    for case in too_large:
        need = param_bytes + needs[case.key]
        planned = planned_state_bytes(case, tensors, config.dtype) if case.ours else None
        reason = f"needs {need / 2**30:.1f} GiB, the limit is {config.memory / 2**30:.1f} GiB"
        rows.append({**_case_row(case), "status": "planned", "reason": reason, "state_bytes": planned})
    common = {
        "model": shapes.name,
        "group": group.name,
        "scope": group.scope,
        "tensors": len(tensors),
        "parameters": count,
    }
    return [{**common, **row, **_per_parameter(row, count)} for row in rows]


def _case_row(case: Case) -> Row:
    return {"key": case.key, "label": case.label, "source": case.source, "how": case.how, "reason": ""}


def _per_parameter(row: Row, count: int) -> Row:
    state, least = row.get("state_bytes"), row.get("least_bytes")
    return {
        "state_per_parameter": None if state is None else state / count,
        "least_per_parameter": None if least is None else least / count,
    }


def _measure(group: Group, batch: Sequence[Case], shared: SharedParams, config: BenchConfig) -> list[Row]:
    device = config.device
    prepared: list[PreparedCase] = []
    rows: list[Row] = []
    for case in batch:
        try:
            prepared.append(_prepare(case, group, shared, device))
        except Exception as error:
            rows.append(_failure_row(case, error))
    calls: dict[str, Callable[[], object]] = {AXPY: lambda: axpy(shared)}
    if group.scope == "element":
        calls[COPY] = lambda: copy(shared)
    calls |= {str(product): product.runner(device) for one in prepared for product in one.products}
    calls |= {one.case.key: one.run for one in prepared}
    if prepared:
        shared.set_grads()
        times = config.time(calls)
        rows = [_axpy_row(times, shared), *_rows(prepared, times, shared), *rows]
    if device.type == "cuda":
        by_key = {row["key"]: row for row in rows}
        for one in prepared:
            # steepest's optimizers have a separate row for the graph.
            graph = "" if one.case.ours else try_capture(_step_with_grads(one.optimizer, shared), device)
            by_key[one.case.key]["graph"] = graph
    return rows


def _step_with_grads(optimizer: Optimizer, shared: SharedParams) -> Callable[[], object]:
    """Return a step that restores the gradients before and after, because some optimizers remove them."""

    def step() -> None:
        shared.set_grads()
        optimizer.step()
        shared.set_grads()

    return step


def _failure_row(case: Case, error: Exception) -> Row:
    status, reason = "failed", error_line(error)
    if isinstance(error, ModuleNotFoundError):
        status, reason = "not installed", f"{error.name} is not installed"
    elif isinstance(error, EagerOnly):
        status, reason = "eager only", str(error)
    return {**_case_row(case), "status": status, "reason": reason}


def _prepare(case: Case, group: Group, shared: SharedParams, device: torch.device) -> PreparedCase:
    """Construct the optimizer, take its first steps, check them, and profile one more.

    Raises:
        InvalidStep: the first steps or a replay did not change the parameters, or made them non-finite.
        EagerOnly: the optimizer was told to compile its step but ran eagerly.
        Exception: any error that the optimizer raises.
    """
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("always")
        optimizer = case.make(shared.params)
        before = shared.sample()
        for _ in range(_STEPS_BEFORE_CAPTURE if case.how == GRAPH else _FIRST_STEPS):
            shared.set_grads()
            optimizer.step()
        after = shared.sample()
        if torch.equal(before, after):
            raise InvalidStep("the first steps did not change the parameters")
        if not bool(after.isfinite().all()):
            raise InvalidStep("the first steps made parameters infinite or NaN")
        keeps = shared.has_grads()
        run = optimizer.step if keeps else _step_with_grads(optimizer, shared)
        shared.set_grads()
        profile = profile_step(run, device, products=group.scope == "matrix")
        if case.ours and case.how == "compiled" and not profile.compiled:
            messages = [str(w.message) for w in caught if "compil" in str(w.message)]
            raise EagerOnly(messages[0] if messages else f"{case.rule} runs eagerly even with compile=True")
        if case.how == GRAPH:
            run = capture_graph(optimizer.step, device)
            before = shared.sample()
            replay = profile_step(run, device)
            if torch.equal(before, shared.sample()):
                raise InvalidStep("a replay did not change the parameters")
            # A graph allocates from a private pool during capture and nothing during a replay.
            profile = replace(
                profile, temporary_bytes=None, launches=replay.launches, device_ms=replay.device_ms
            )
    return PreparedCase(case, optimizer, run, profile, group.scope)


def _axpy_row(times: Mapping[str, Timing], shared: SharedParams) -> Row:
    milliseconds = times[AXPY].median_ms
    moved = axpy_bytes(shared)
    rates = f"{moved / milliseconds / 1e6:.1f} GB/s"
    if COPY in times:
        rates += f"; copy {copy_bytes(shared) / times[COPY].median_ms / 1e6:.1f}"
    return {
        "key": AXPY,
        "label": "axpy",
        "source": "p + a·g",
        "how": "foreach",
        "reason": rates,
        **timed(times[AXPY], "step_ms"),
        "least_bytes": moved,
        "limit_ms": milliseconds,
        "of_limit": 1.0,
        "of_copy": _of_copy(times, AXPY, moved, shared),
        "copy_ms": times[COPY].median_ms if COPY in times else None,
        "state_bytes": 0,
    }


def _rows(prepared: Sequence[PreparedCase], times: Mapping[str, Timing], shared: SharedParams) -> list[Row]:
    rows = []
    for one in prepared:
        case, key = one.case, one.case.key
        reference = next((o for o in prepared if o.case.ours and o.case.rule == case.rule), prepared[0])
        state = state_bytes(one.optimizer)
        # A peer may keep more state than the equation needs, so its minimum is computed from our state.
        least_state = state if case.ours else state_bytes(reference.optimizer)
        least = least_bytes(shared.nbytes, shared.nbytes, least_state)
        flops = total_flops(one.products)
        limited = one.scope == "element" or bool(one.products)
        limits, by_products = _limits(times, one.products, least / axpy_bytes(shared))
        fractions = [limit / each for limit, each in zip(limits, times[key].ms, strict=True)]
        rows.append(
            {
                **_case_row(case),
                **timed(times[key], "step_ms"),
                "times_ours": None if one is reference else times[key].ratio(times[reference.case.key]),
                "limited_by": ("products" if by_products else "bytes") if limited else None,
                "least_bytes": least,
                "flops": flops or None,
                "limit_ms": median(limits) if limited else None,
                "of_limit": median(fractions) if limited else None,
                "of_copy": _of_copy(times, key, least, shared),
                "temporary_bytes": one.profile.temporary_bytes,
                "state_bytes": state,
                "launches": one.profile.launches,
                "device_ms": one.profile.device_ms,
                "products": {str(p): count for p, count in one.products.items()} or None,
            }
        )
    return rows


def _of_copy(times: Mapping[str, Timing], key: str, nbytes: int, shared: SharedParams) -> float | None:
    """Return the rate of moving `nbytes` as a fraction of copy's rate; None if copy was not timed."""
    return times[COPY].ratio(times[key]) * nbytes / copy_bytes(shared) if COPY in times else None


def _limits(
    times: Mapping[str, Timing], products: Mapping[Product, int], axpys: float
) -> tuple[list[float], bool]:
    """Return each round's lower bound on a step in milliseconds, and whether the products determine it."""
    by_bytes = [axpys * each for each in times[AXPY].ms]
    by_products = [0.0] * len(by_bytes)
    for product, count in products.items():
        rounds = times[str(product)].ms
        by_products = [total + count * each for total, each in zip(by_products, rounds, strict=True)]
    if sum(by_products) > sum(by_bytes):
        return by_products, True
    return by_bytes, False
