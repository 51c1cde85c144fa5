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

from ..clock import now
from ..state_memory import state_bytes
from .bandwidth import AXPY, COPY, axpy, axpy_bytes, copy, copy_bytes, least_bytes
from .case import GRAPH, Case, Scope
from .groups import Group
from .interleaved import Measurements, Timer, error_line, time_interleaved
from .memory import batch_by_memory, estimated_bytes, planned_state_bytes
from .params import SharedParams
from .products import Product, total_flops
from .profiling import StepProfile, capture_graph, profile_step, try_capture
from .results import Row
from .section import BenchConfig
from .shapes import ModelShapes

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
    """A case whose optimizer has taken its first steps; `run` takes another one.

    If `repeatable`, the step keeps the gradients, so that the next one may follow without setup.
    """

    case: Case
    optimizer: Optimizer
    run: Callable[[], object]
    repeatable: bool
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
    on_progress: Callable[[float], None] = lambda fraction: None,
    *,
    untimed: str = "",
) -> list[Row]:
    """Return a row for every case of the group, measured or not, and one for axpy in the first batch.

    ``untimed`` is a reason not to measure anything; the rows then contain only planned state.
    """
    tensors = group.tensors(shapes, config.blocks)
    count = sum(tensor.numel for tensor in tensors)
    param_bytes = 2 * config.dtype.itemsize * count
    needs = {case.key: estimated_bytes(case, tensors, config.dtype) for case in group.cases}
    batches, too_large = batch_by_memory(group.cases, needs, config.memory - param_bytes)
    if untimed:
        batches, too_large = [], list(group.cases)
    rows: list[Row] = []
    if batches:
        shared = SharedParams.create(tensors, config.device, config.dtype)
        for number, batch in enumerate(batches):
            known = {row["key"] for row in rows}
            new = _measure(group, batch, shared, config, _part(on_progress, number, len(batches)))
            rows += [row for row in new if row["key"] not in known]
    for case in too_large:
        need = param_bytes + needs[case.key]
        planned = planned_state_bytes(case, tensors, config.dtype) if case.ours else None
        reason = untimed or f"needs {need / 2**30:.1f} GiB, the limit is {config.memory / 2**30:.1f} GiB"
        rows.append({**_case_row(case), "status": "planned", "reason": reason, "state_bytes": planned})
    common = {
        "model": shapes.name,
        "group": group.name,
        "scope": group.scope,
        "tensors": len(tensors),
        "parameters": count,
    }
    return [{**common, **row, **_per_parameter(row, count)} for row in rows]


def _part(on_progress: Callable[[float], None], number: int, batches: int) -> Callable[[float], None]:
    return lambda fraction: on_progress((number + fraction) / batches)


def _case_row(case: Case) -> Row:
    return {"key": case.key, "label": case.label, "source": case.source, "how": case.how, "reason": ""}


def _per_parameter(row: Row, count: int) -> Row:
    state, least = row.get("state_bytes"), row.get("least_bytes")
    return {
        "state_per_parameter": None if state is None else state / count,
        "least_per_parameter": None if least is None else least / count,
    }


def _measure(
    group: Group,
    batch: Sequence[Case],
    shared: SharedParams,
    config: BenchConfig,
    on_progress: Callable[[float], None],
) -> list[Row]:
    device = config.device
    prepared: list[PreparedCase] = []
    rows: list[Row] = []
    for case in batch:
        try:
            prepared.append(_prepare(case, group, shared, device))
        except Exception as error:
            rows.append(_failure_row(case, error))
    products = dict.fromkeys(product for one in prepared for product in one.products)
    queued = device.type != "cpu"
    timers = [Timer(AXPY, lambda: axpy(shared), queued=queued)]
    if group.scope == "element":
        timers.append(Timer(COPY, lambda: copy(shared), queued=queued))
    timers += [Timer(str(product), product.runner(device), queued=queued) for product in products]
    timers += [
        Timer(one.case.key, one.run, shared.set_grads, queued=queued and one.repeatable) for one in prepared
    ]
    if prepared:
        times = time_interleaved(timers, config.rounds, lambda: now(device), on_progress)
        rows = [_axpy_row(times, shared), *_rows(prepared, times, shared), *rows]
    if device.type == "cuda":
        by_key = {row["key"]: row for row in rows}
        for one in prepared:
            # steepest's optimizers have a separate row for the graph.
            graph = "" if one.case.ours else try_capture(_step_with_grads(one, shared), device)
            by_key[one.case.key]["graph"] = graph
    return rows


def _step_with_grads(one: PreparedCase, shared: SharedParams) -> Callable[[], object]:
    """Return a step that first restores the gradients, because some optimizers remove them."""

    def step() -> None:
        shared.set_grads()
        one.optimizer.step()

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
        shared.set_grads()
        profile = profile_step(optimizer.step, device, products=group.scope == "matrix")
        if case.ours and case.how == "compiled" and not profile.compiled:
            messages = [str(w.message) for w in caught if "compil" in str(w.message)]
            raise EagerOnly(messages[0] if messages else f"{case.rule} runs eagerly even with compile=True")
        run: Callable[[], object] = optimizer.step
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
    return PreparedCase(case, optimizer, run, shared.has_grads(), profile, group.scope)


def _axpy_row(times: Measurements, shared: SharedParams) -> Row:
    milliseconds = times.median_ms(AXPY)
    moved = axpy_bytes(shared)
    rates = f"{moved / milliseconds / 1e6:.1f} GB/s"
    if COPY in times.seconds:
        rates += f"; copy {copy_bytes(shared) / times.median_ms(COPY) / 1e6:.1f}"
    return {
        "key": AXPY,
        "label": "axpy",
        "source": "p + a·g",
        "how": "foreach",
        "status": "ok",
        "reason": rates,
        "step_ms": milliseconds,
        "quartiles_ms": times.quartiles_ms(AXPY),
        "rounds": len(times.seconds[AXPY]),
        "least_bytes": moved,
        "limit_ms": milliseconds,
        "of_limit": 1.0,
        "of_copy": _of_copy(times, AXPY, moved, shared),
        "copy_ms": times.median_ms(COPY) if COPY in times.seconds else None,
        "state_bytes": 0,
    }


def _rows(prepared: Sequence[PreparedCase], times: Measurements, shared: SharedParams) -> list[Row]:
    timed = [one for one in prepared if one.case.key in times.seconds]
    rows = []
    for one in prepared:
        case, key = one.case, one.case.key
        if one not in timed:
            rows.append({**_case_row(case), "status": "failed", "reason": times.failed[key]})
            continue
        reference = next((o for o in timed if o.case.ours and o.case.rule == case.rule), timed[0])
        state = state_bytes(one.optimizer)
        # A peer may keep more state than the equation needs, so its minimum is computed from our state.
        least_state = state if case.ours else state_bytes(reference.optimizer)
        least = least_bytes(shared.nbytes, shared.nbytes, least_state)
        flops = total_flops(one.products)
        all_timed = bool(one.products) and all(str(product) in times.seconds for product in one.products)
        limited = one.scope == "element" or all_timed
        products = one.products if limited else {}
        limits, by_products = _limits(times, products, least / axpy_bytes(shared))
        fractions = [limit / seconds for limit, seconds in zip(limits, times.seconds[key], strict=True)]
        rows.append(
            {
                **_case_row(case),
                "status": "ok",
                "step_ms": times.median_ms(key),
                "quartiles_ms": times.quartiles_ms(key),
                "rounds": len(times.seconds[key]),
                "times_ours": None if one is reference else times.ratio(key, reference.case.key),
                "limited_by": ("products" if by_products else "bytes") if limited else None,
                "least_bytes": least,
                "flops": flops or None,
                "product_flops_per_second": flops / median(limits) if by_products else None,
                "limit_ms": 1e3 * median(limits) if limited else None,
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


def _of_copy(times: Measurements, key: str, nbytes: int, shared: SharedParams) -> float | None:
    """Return the rate of moving `nbytes` as a fraction of copy's rate; None if copy was not timed."""
    return times.ratio(COPY, key) * nbytes / copy_bytes(shared) if COPY in times.seconds else None


def _limits(times: Measurements, products: Mapping[Product, int], axpys: float) -> tuple[list[float], bool]:
    """Return each round's lower bound on a step in seconds, and whether the products determine it."""
    by_bytes = [axpys * seconds for seconds in times.seconds[AXPY]]
    by_products = [0.0] * len(by_bytes)
    for product, count in products.items():
        rounds = times.seconds[str(product)]
        by_products = [total + count * each for total, each in zip(by_products, rounds, strict=True)]
    if sum(by_products) > sum(by_bytes):
        return by_products, True
    return by_bytes, False
