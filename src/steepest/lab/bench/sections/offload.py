"""CPU offload: steps on the host for parameters on CUDA, compared with host work and copies alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median

import torch

from ...clock import now
from ...state_memory import state_bytes
from ..callbacks import Callback
from ..case import GRAPH, Case, How, ours
from ..interleaved import Measurements, Timer, error_line, time_interleaved
from ..params import SharedParams, available_bytes
from ..results import Column, Result, Row
from ..section import BenchConfig
from ..shapes import ModelShapes

NAMES = ("signgsd", "lion", "adamw")
_COPIES = "copies"
# Host memory in multiples of the parameters: parameters, gradients, buffers, and each rule's state twice.
_HOST_COPIES = 10

_COLUMNS = (
    Column("label", "optimizer"),
    Column("how", "how"),
    Column("step_ms", "step, ms", "ms"),
    Column("host_ms", "host alone, ms", "ms"),
    Column("copies_ms", "copies alone, ms", "ms"),
    Column("overlap", "overlap", "percent"),
    Column("of_bound", "of the bound", "percent"),
    Column("copies_rate", "copies, GB/s", "rate"),
    Column("state_bytes", "state on the host", "bytes"),
    Column("reason", ""),
)
_NOTE = (
    "Medians of {rounds} interleaved rounds. Host alone: the same step for parameters in host memory. Copies "
    "alone: gradients and parameters to pinned memory and parameters back, in both directions at once. "
    "Overlap: (host + copies − step) / min(host, copies) in each round; 100 % hides the shorter one "
    "entirely, at 0 % they run one after the other. The bound is max(host, copies)."
)
_NOTHING = "The parameters are in host memory, so there is nothing to offload. Use --device cuda."


class Offload:
    """A table for the first model; only a note without an accelerator."""

    name = "offload"

    def work_units(self, config: BenchConfig) -> int:
        """Return 1 on an accelerator if any of `NAMES` is selected."""
        return int(config.device.type != "cpu" and bool(_cases(config)))

    def run(self, config: BenchConfig, callback: Callback) -> Iterator[Result]:
        """Yield one table."""
        if not _cases(config):
            return
        shapes = config.models[0]
        title = f"State on the host: {shapes.title}, all {len(shapes.tensors)} tensors"
        if config.device.type == "cpu":
            yield Result(self.name, title, _COLUMNS, [], [_NOTHING])
            return
        callback.on_unit_start(f"{shapes.title}: state on the host")
        skipped = _memory_shortage(shapes, config)
        rows = [] if skipped else measure(shapes, config, callback.on_progress)
        callback.on_unit_end()
        notes = [skipped] if skipped else [_NOTE.format(rounds=config.rounds)]
        yield Result(self.name, title, _COLUMNS, rows, notes)


def _cases(config: BenchConfig) -> list[Case]:
    """Return steepest's optimizers with state on the host, each once, compiled if selected."""
    cases: dict[str, Case] = {}
    for group in config.groups:
        for case in group.cases:
            if case.ours and case.rule in NAMES and case.how != GRAPH:
                how: How = "compiled" if case.how == "compiled" else "eager"
                cases.setdefault(case.rule, ours(case.rule, how, state_device="cpu"))
    return list(cases.values())


def _memory_shortage(shapes: ModelShapes, config: BenchConfig) -> str:
    """Return a note if the measurement does not fit into memory, otherwise an empty string."""
    param_bytes = shapes.numel * config.dtype.itemsize
    host_limit = available_bytes(torch.device("cpu"))
    for need, limit, place in (
        (2 * param_bytes, config.memory, "device"),
        (_HOST_COPIES * param_bytes, host_limit, "host"),
    ):
        if need > limit:
            return f"skipped: needs {need / 2**30:.1f} GiB on the {place}, there are {limit / 2**30:.1f} GiB"
    return ""


def measure(
    shapes: ModelShapes, config: BenchConfig, on_progress: Callable[[float], None] = lambda fraction: None
) -> list[Row]:
    """Time each optimizer offloaded and on the host alone, and the copies; return a row per optimizer."""
    device = config.device
    on_device = SharedParams.create(shapes.tensors, device, config.dtype)
    on_host = SharedParams.create(shapes.tensors, torch.device("cpu"), config.dtype)
    timers = [Timer(_COPIES, copies(on_device))]
    optimizers: dict[str, torch.optim.Optimizer] = {}
    failed: dict[str, str] = {}
    for case in _cases(config):
        try:
            for label, shared in ((case.key, on_device), (_host_key(case), on_host)):
                optimizer = optimizers[label] = case.make(shared.params)
                shared.set_grads()
                optimizer.step()
                timers.append(Timer(label, optimizer.step, shared.set_grads))
        except Exception as error:
            failed[case.key] = error_line(error)
    times = time_interleaved(timers, config.rounds, lambda: now(device), on_progress)
    return [_row(case, times, failed, optimizers, on_device) for case in _cases(config)]


def _host_key(case: Case) -> str:
    return f"{case.key}, host alone"


def _row(
    case: Case,
    times: Measurements,
    failed: dict[str, str],
    optimizers: dict[str, torch.optim.Optimizer],
    shared: SharedParams,
) -> Row:
    row: Row = {"key": case.key, "label": case.label, "how": case.how, "reason": ""}
    labels = (case.key, _host_key(case), _COPIES)
    errors = failed | times.failed
    for label in labels:
        if label not in times.seconds or label in errors:
            return row | {"status": "failed", "reason": errors.get(label, "not constructed")}
    rounds = list(zip(*(times.seconds[label] for label in labels), strict=True))
    return row | {
        "status": "ok",
        "rounds": len(rounds),
        "step_ms": times.median_ms(case.key),
        "quartiles_ms": times.quartiles_ms(case.key),
        "host_ms": times.median_ms(_host_key(case)),
        "copies_ms": times.median_ms(_COPIES),
        "overlap": median(overlap(*each) for each in rounds),
        "of_bound": median(max(host, copies) / step for step, host, copies in rounds),
        "copies_rate": 3 * shared.nbytes / times.median_ms(_COPIES) / 1e6,
        "state_bytes": state_bytes(optimizers[case.key]),
    }


def overlap(step: float, host: float, copies: float) -> float:
    """Return the fraction of the shorter of the host's and the copies' times that the longer one hides.

    Example:
        >>> overlap(3.0, 3.0, 1.0), overlap(4.0, 3.0, 1.0), overlap(3.5, 3.0, 1.0)
        (1.0, 0.0, 0.5)
    """
    return (host + copies - step) / min(host, copies)


def copies(shared: SharedParams) -> Callable[[], None]:
    """Return the copies of an offloaded step as a function: gradients and parameters down, parameters up."""
    params = [param.detach() for _, param in shared.params]
    device = params[0].device
    pinned = device.type == "cuda"
    down, up = (
        [torch.empty_like(each, device="cpu", pin_memory=pinned).copy_(each) for each in tensors]
        for tensors in (shared.grads, params)
    )

    def move_down() -> None:
        for buffers, tensors in ((down, shared.grads), (up, params)):
            for buffer, tensor in zip(buffers, tensors, strict=True):
                buffer.copy_(tensor, non_blocking=pinned)

    def move_up() -> None:
        # The buffers hold the parameters' own values, so the order of the copies does not matter.
        for param, buffer in zip(params, up, strict=True):
            param.copy_(buffer, non_blocking=pinned)

    def sequential() -> None:
        move_down()
        move_up()

    if not pinned:
        return sequential
    streams = [torch.cuda.Stream(device) for _ in range(2)]  # type: ignore[no-untyped-call]

    def concurrent() -> None:
        for stream, move in zip(streams, (move_down, move_up), strict=True):
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                move()

    return concurrent
