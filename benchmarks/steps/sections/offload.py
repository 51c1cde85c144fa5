"""CPU offload: steps on the host for parameters on CUDA, compared with host work and copies alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from statistics import median

import torch

from steepest.lab.training.state_memory import state_bytes
from steepest.model_shapes import ModelShapes

from ..case import GRAPH, How, ours
from ..config import BenchConfig, log
from ..params import SharedParams
from ..results import Column, Result, Row, timed

NAMES = ("signgsd", "lion", "adamw")
_COPIES = "copies"

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
)
_NOTE = (
    "Medians of {rounds} interleaved rounds. Host alone: the same step for parameters in host memory. Copies "
    "alone: gradients and parameters to pinned memory and parameters back, in both directions at once. "
    "Overlap: (host + copies − step) / min(host, copies) in each round; 100 % hides the shorter one "
    "entirely, at 0 % they run one after the other. The bound is max(host, copies)."
)


def run(config: BenchConfig) -> Iterator[Result]:
    """Yield a table for the first model; none without an accelerator, where there is nothing to offload."""
    rules = {
        c.rule: c for g in config.groups for c in g.cases if c.ours and c.rule in NAMES and c.how != GRAPH
    }
    if config.device.type == "cpu" or not rules:
        return
    shapes = config.models[0]
    log(f"{shapes.title}: state on the host")
    title = f"State on the host: {shapes.title}, all {len(shapes.tensors)} tensors"
    hows: dict[str, How] = {rule: "compiled" if c.how == "compiled" else "eager" for rule, c in rules.items()}
    rows = measure(shapes, hows, config)
    yield Result("offload", title, _COLUMNS, rows, [_NOTE.format(rounds=config.rounds)])


def measure(shapes: ModelShapes, rules: Mapping[str, How], config: BenchConfig) -> list[Row]:
    """Time each optimizer offloaded and on the host alone, and the copies; return a row per optimizer."""
    on_device = SharedParams.create(shapes.tensors, config.device, config.dtype)
    on_host = SharedParams.create(shapes.tensors, torch.device("cpu"), config.dtype)
    calls: dict[str, Callable[[], object]] = {_COPIES: copies(on_device)}
    state: dict[str, int] = {}
    for rule, how in rules.items():
        case = ours(rule, how, state_device="cpu")
        for label, shared in ((rule, on_device), (f"{rule}, host alone", on_host)):
            optimizer = case.make(shared.params)
            shared.set_grads()
            optimizer.step()
            calls[label] = optimizer.step
            state[label] = state_bytes(optimizer)
    times = config.time(calls, {label: lambda: None for label in calls})
    rows: list[Row] = []
    for rule, how in rules.items():
        each = [times[label] for label in (rule, f"{rule}, host alone", _COPIES)]
        rounds = list(zip(*(timing.ms for timing in each), strict=True))
        rows.append(
            {
                "label": rule,
                "how": how,
                **timed(each[0], "step_ms"),
                "host_ms": each[1].median_ms,
                "copies_ms": each[2].median_ms,
                "overlap": median(overlap(*three) for three in rounds),
                "of_bound": median(max(host, copying) / step for step, host, copying in rounds),
                "copies_rate": 3 * on_device.nbytes / each[2].median_ms / 1e6,
                "state_bytes": state[rule],
            }
        )
    return rows


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
