"""Interleaved timing: every call runs in every round, so that the machine's noise affects all of them alike.

A machine may be five times slower in one minute than in the next, so times from different minutes are not
comparable. Here all calls take turns, and the results are medians over the rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..defaults import LEAST_ROUNDS
from ..records import Cost
from .clock import device_of, now
from .optimizers import OptimizerSpec, trainable
from .peak_memory import temporary_bytes
from .seeding import infinite_batches, seeded
from .state_memory import state_bytes

if TYPE_CHECKING:
    from ..tasks.task import Task

WARMUP_ROUNDS = 2
MAX_ROUNDS = 51

LR_FACTOR = 1e-3
"""All optimizers update the same weights; at their own learning rates the weights might diverge."""

# A call that takes less than this is repeated within its turn, for the clock's resolution.
_TURN_SECONDS = 0.01
_MAX_REPEATS = 1000


@dataclass(frozen=True)
class Timing:
    """The milliseconds that a call takes, one value per round."""

    ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """The median over the rounds."""
        return median(self.ms)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third quartile over the rounds, in milliseconds."""
        low, _, high = quantiles(self.ms, n=4) if len(self.ms) > 1 else self.ms * 3
        return low, high

    def ratio(self, other: Timing) -> float:
        """Return the median of the ratios to the other call's times in the same rounds."""
        return median(own / its for own, its in zip(self.ms, other.ms, strict=True))


def interleave(
    calls: Mapping[str, Callable[[], object]],
    *,
    device: torch.device,
    rounds: int = LEAST_ROUNDS,
    seconds: float = 0.0,
    setup: Mapping[str, Callable[[], object]] | None = None,
    on_round: Callable[[float], None] = lambda fraction: None,
) -> dict[str, Timing]:
    """Time calls in turns, in an order that rotates from round to round; return the times by name.

    The order rotates because a call finds in the caches what its predecessor left. Before the timed rounds
    come `WARMUP_ROUNDS` untimed ones. A fast call runs several times in its turn, whose time is their mean.

    Args:
        calls: The calls by name.
        device: Where they compute. On an accelerator, the clock is read once all queued work is done; a
            call without a setup is queued repeatedly before that, because waiting takes as long as a small
            step.
        rounds: The least number of timed rounds.
        seconds: More rounds follow while less time than this has passed, up to `MAX_ROUNDS` in all.
        setup: By name, what must run before each call of this name; it is not timed.
        on_round: Receives the fraction of `rounds` that is done after each timed round, at most 1.
    """
    setup = setup or {}
    repeats = dict.fromkeys(calls, 1)
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = 0.0
    for number in range(WARMUP_ROUNDS + max(rounds, MAX_ROUNDS if seconds else 0)):
        timed = number - WARMUP_ROUNDS
        if timed == 0:
            end = now(device) + seconds
        if timed >= rounds and now(device) >= end:
            break
        for name in islice(cycle(calls), number, number + len(calls)):
            mean, whole = _turn(calls[name], setup.get(name), repeats[name], device)
            if timed < 0:
                fitting = round(repeats[name] * _TURN_SECONDS / max(whole, 1e-9))
                repeats[name] = max(1, min(_MAX_REPEATS, fitting))
            else:
                times[name].append(1e3 * mean)
        if timed >= 0:
            on_round(min(1.0, (timed + 1) / rounds))
    return {name: Timing(tuple(each)) for name, each in times.items()}


def _turn(
    call: Callable[[], object], setup: Callable[[], object] | None, repeats: int, device: torch.device
) -> tuple[float, float]:
    """Return the mean seconds of a call, and the seconds of the turn with its setups."""
    begin = now(device)
    if setup is None:
        for _ in range(repeats):
            call()
        whole = now(device) - begin
        return whole / repeats, whole
    seconds = 0.0
    for _ in range(repeats):
        setup()
        start = now(device)
        call()
        seconds += now(device) - start
    return seconds / repeats, now(device) - begin


def training_costs(
    task: Task[Any], optimizers: Sequence[OptimizerSpec], seconds: float = 4.0
) -> dict[str, Cost]:
    """Return what a step of each optimizer costs on the task's model, by the optimizer's label.

    Each timed optimizer step follows a forward and backward pass, as in training, which is timed by itself.
    The weights of the seed-0 model take all the steps, at a thousandth of the learning rates. There are at
    least `LEAST_ROUNDS` rounds, and more for `seconds`, see `interleave`.
    """
    with seeded(0):
        model = task.make(0).train()
        device = device_of(model)
        batches = infinite_batches(task, 0)

        def gradient(model: nn.Module) -> None:
            model.zero_grad(set_to_none=True)
            task.loss(model, next(batches)).backward()  # type: ignore[no-untyped-call]

        calls: dict[str, Callable[[], object]] = {"": partial(gradient, model)}
        setup, built, peaks = {}, {}, {}
        for spec in optimizers:
            own = task.make(0).train() if spec.changes_model else model
            optimizer = built[spec.label] = spec.build(own, {"lr": spec.default_lr * LR_FACTOR})
            calls[spec.label], setup[spec.label] = optimizer.step, partial(gradient, own)
            gradient(own)
            optimizer.step()
            gradient(own)
            peaks[spec.label] = temporary_bytes(optimizer.step, device)
        times = interleave(calls, device=device, seconds=seconds, setup=setup)
        parameters = sum(each.numel() for each in trainable(model))
    return {
        label: Cost(
            optimizer=label,
            model=task.name,
            parameters=parameters,
            state_bytes=(state := state_bytes(optimizer)),
            optimizer_ms=times[label].median_ms,
            optimizer_ms_quartiles=times[label].quartiles,
            gradient_ms=times[""].median_ms,
            peak_bytes=state + peaks[label],
        )
        for label, optimizer in built.items()
    }
