from __future__ import annotations

import pytest

from steepest.lab.bench.interleaved import WARMUP_ROUNDS, Timer, time_interleaved


class Clock:
    """A clock that only advances when a timer runs."""

    def __init__(self) -> None:
        self.time = 0.0
        self.runs: list[str] = []

    def __call__(self) -> float:
        return self.time

    def timer(self, label: str, *seconds: float) -> Timer:
        remaining = list(seconds)

        def run() -> None:
            self.runs.append(label)
            self.time += remaining.pop(0) if len(remaining) > 1 else remaining[0]

        return Timer(label, run)


def test_every_timer_runs_once_per_round_in_a_rotating_order() -> None:
    clock = Clock()
    times = time_interleaved([clock.timer(label, 1.0) for label in "abc"], 4, clock)
    rounds = [clock.runs[at : at + 3] for at in range(0, len(clock.runs), 3)]
    assert len(rounds) == WARMUP_ROUNDS + 4
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert [one[0] for one in rounds] == ["a", "b", "c", "a", "b", "c"]
    assert {label: len(seconds) for label, seconds in times.seconds.items()} == dict.fromkeys("abc", 4)


def test_warm_up_rounds_do_not_count() -> None:
    clock = Clock()
    times = time_interleaved([clock.timer("a", 100.0, 100.0, 1.0, 2.0, 9.0)], 3, clock)
    assert times.seconds["a"] == [1.0, 2.0, 9.0]
    assert times.median_ms("a") == 2000.0


def test_a_ratio_is_the_median_of_ratios_and_not_the_ratio_of_medians() -> None:
    # In the last round the machine is ten times slower for both timers.
    clock = Clock()
    timers = [clock.timer("a", 2, 2, 2, 4, 20), clock.timer("b", 1, 1, 1, 1, 10)]
    times = time_interleaved(timers, 3, clock)
    assert times.ratio("a", "b") == 2.0
    assert times.median_ms("a") / times.median_ms("b") == 4.0


def test_a_fast_timer_runs_several_iterations_per_round() -> None:
    clock = Clock()
    times = time_interleaved([clock.timer("a", 2**-10)], 2, clock)
    # One iteration in the first round, then as many as fit into ten milliseconds.
    assert len(clock.runs) == 1 + 3 * 10
    assert times.seconds["a"] == [2**-10, 2**-10]


def test_setup_is_not_timed() -> None:
    clock = Clock()

    def setup() -> None:
        clock.time += 50.0

    times = time_interleaved([Timer("a", clock.timer("a", 1.0).run, setup)], 2, clock)
    assert times.seconds["a"] == [1.0, 1.0]


def test_a_queued_timer_synchronizes_once_per_round() -> None:
    clock = Clock()
    readings: list[float] = []

    def synchronizing_clock() -> float:
        # Synchronization takes a second.
        clock.time += 1.0
        readings.append(clock.time)
        return clock.time

    setups: list[int] = []
    timer = clock.timer("a", 2**-10)
    time_interleaved(
        [Timer("a", timer.run, lambda: setups.append(len(clock.runs)), queued=True)], 1, synchronizing_clock
    )
    assert len(readings) == 2 * (WARMUP_ROUNDS + 1)
    assert len(setups) == WARMUP_ROUNDS + 1
    clock.runs.clear()
    times = time_interleaved([Timer("a", timer.run, queued=True)], 1, clock)
    assert times.seconds["a"] == [2**-10]
    assert len(clock.runs) == 1 + 2 * 10


def test_a_failed_timer_is_left_out_and_the_others_continue() -> None:
    clock = Clock()
    calls = []

    def fail() -> None:
        calls.append(1)
        if len(calls) == 4:
            raise ValueError("no\nmore")

    times = time_interleaved([clock.timer("a", 1.0), Timer("b", fail)], 5, lambda: clock.time + len(calls))
    assert times.failed == {"b": "ValueError: no more"}
    assert len(calls) == 4
    assert list(times.seconds) == ["a"]
    assert len(times.seconds["a"]) == 5


def test_an_interrupt_is_not_a_failure() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        time_interleaved([Timer("a", interrupt)], 1, lambda: 0.0)
