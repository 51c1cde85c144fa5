"""Interleaved timing: every timer runs once per round, so that noise affects all of them alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from statistics import median, quantiles

WARMUP_ROUNDS = 2

_MIN_SECONDS = 0.01
"""A timer that takes less than this runs several iterations per round, for the clock's resolution."""
_MAX_ITERATIONS = 1000


@dataclass(frozen=True)
class Timer:
    """A function to time; `setup` runs before it and is not timed.

    A `queued` timer runs `setup` once per round, then all iterations, and reads the clock once at the end:
    on an asynchronous device, synchronizing takes as long as a small matrix product.
    """

    label: str
    run: Callable[[], object]
    setup: Callable[[], object] = lambda: None
    queued: bool = False


@dataclass
class Measurements:
    """By label, the seconds per iteration of each round; for timers that failed, the error."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def median_ms(self, label: str) -> float:
        """Return the median over the rounds in milliseconds."""
        return 1e3 * median(self.seconds[label])

    def quartiles_ms(self, label: str) -> tuple[float, float]:
        """Return the quartiles over the rounds in milliseconds."""
        if len(self.seconds[label]) < 2:
            return self.median_ms(label), self.median_ms(label)
        low, _, high = quantiles(self.seconds[label], n=4)
        return 1e3 * low, 1e3 * high

    def ratio(self, label: str, other: str) -> float:
        """Return the median over the rounds of the ratio of two times from the same round."""
        pairs = zip(self.seconds[label], self.seconds[other], strict=True)
        return median(one / two for one, two in pairs)


def time_interleaved(
    timers: Sequence[Timer],
    rounds: int,
    clock: Callable[[], float],
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> Measurements:
    """Run the warm-up rounds and `rounds` timed ones; the order of the timers rotates.

    A timer that raises is left out from then on.
    """
    times = Measurements({timer.label: [] for timer in timers})
    iterations = dict.fromkeys(times.seconds, 1)
    total = WARMUP_ROUNDS + rounds
    for number in range(total):
        first = number % max(1, len(timers))
        for timer in islice(cycle(timers), first, first + len(timers)):
            if timer.label in times.failed:
                continue
            try:
                seconds = _time(timer, iterations[timer.label], clock)
            except Exception as error:
                times.failed[timer.label] = error_line(error)
                times.seconds.pop(timer.label)
                continue
            if number < WARMUP_ROUNDS:
                iterations[timer.label] = max(1, min(_MAX_ITERATIONS, int(_MIN_SECONDS / max(seconds, 1e-9))))
            else:
                times.seconds[timer.label].append(seconds)
        on_progress((number + 1) / total)
    return times


def _time(timer: Timer, iterations: int, clock: Callable[[], float]) -> float:
    if timer.queued:
        timer.setup()
        start = clock()
        for _ in range(iterations):
            timer.run()
        return (clock() - start) / iterations
    seconds = 0.0
    for _ in range(iterations):
        timer.setup()
        start = clock()
        timer.run()
        seconds += clock() - start
    return seconds / iterations


def error_line(error: BaseException) -> str:
    """Format an error as one line that fits into a table."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text if len(text) <= 160 else text[:157] + '...'}"
