from __future__ import annotations

import pytest

from steepest.lab.bench.turns import WARMUP_ROUNDS, Turn, take_turns


class Clock:
    """Time passes only when somebody acts."""

    def __init__(self) -> None:
        self.time = 0.0
        self.acts: list[str] = []

    def __call__(self) -> float:
        return self.time

    def turn(self, label: str, *seconds: float) -> Turn:
        left = list(seconds)

        def act() -> None:
            self.acts.append(label)
            self.time += left.pop(0) if len(left) > 1 else left[0]

        return Turn(label, act)


def test_all_take_turns_and_none_is_always_first() -> None:
    clock = Clock()
    times = take_turns([clock.turn(label, 1.0) for label in "abc"], 4, clock)
    rounds = [clock.acts[at : at + 3] for at in range(0, len(clock.acts), 3)]
    assert len(rounds) == WARMUP_ROUNDS + 4
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert [one[0] for one in rounds] == ["a", "b", "c", "a", "b", "c"]
    assert {label: len(spent) for label, spent in times.seconds.items()} == dict.fromkeys("abc", 4)


def test_the_warm_up_does_not_count() -> None:
    clock = Clock()
    times = take_turns([clock.turn("a", 100.0, 100.0, 1.0, 2.0, 9.0)], 3, clock)
    assert times.seconds["a"] == [1.0, 2.0, 9.0]
    assert times.median_ms("a") == 2000.0


def test_a_ratio_is_the_median_of_the_rounds_own_and_not_of_the_medians() -> None:
    # The machine slows down tenfold in the last round, for both alike.
    clock = Clock()
    turns = [clock.turn("a", 2, 2, 2, 4, 20), clock.turn("b", 1, 1, 1, 1, 10)]
    times = take_turns(turns, 3, clock)
    assert times.ratio("a", "b") == 2.0
    assert times.median_ms("a") / times.median_ms("b") == 4.0


def test_what_is_too_quick_for_the_clock_acts_several_times_a_turn() -> None:
    clock = Clock()
    times = take_turns([clock.turn("a", 2**-10)], 2, clock)
    # Once in the first round, then as often as ten milliseconds hold.
    assert len(clock.acts) == 1 + 3 * 10
    assert times.seconds["a"] == [2**-10, 2**-10]


def test_getting_ready_is_not_timed() -> None:
    clock = Clock()

    def ready() -> None:
        clock.time += 50.0

    times = take_turns([Turn("a", clock.turn("a", 1.0).act, ready)], 2, clock)
    assert times.seconds["a"] == [1.0, 1.0]


def test_a_queued_one_is_waited_for_once_a_turn() -> None:
    clock = Clock()
    read: list[float] = []

    def waiting() -> float:
        # Waiting for the device takes a second, whatever it has done.
        clock.time += 1.0
        read.append(clock.time)
        return clock.time

    ready: list[int] = []
    turn = clock.turn("a", 2**-10)
    take_turns([Turn("a", turn.act, lambda: ready.append(len(clock.acts)), queued=True)], 1, waiting)
    assert len(read) == 2 * (WARMUP_ROUNDS + 1)
    assert len(ready) == WARMUP_ROUNDS + 1
    clock.acts.clear()
    times = take_turns([Turn("a", turn.act, queued=True)], 1, clock)
    assert times.seconds["a"] == [2**-10]
    assert len(clock.acts) == 1 + 2 * 10


def test_one_that_fails_is_out_and_the_others_go_on() -> None:
    clock = Clock()
    calls = []

    def break_down() -> None:
        calls.append(1)
        if len(calls) == 4:
            raise ValueError("no\nmore")

    times = take_turns([clock.turn("a", 1.0), Turn("b", break_down)], 5, lambda: clock.time + len(calls))
    assert times.failed == {"b": "ValueError: no more"}
    assert len(calls) == 4
    assert list(times.seconds) == ["a"]
    assert len(times.seconds["a"]) == 5


def test_an_interrupt_is_no_failure() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take_turns([Turn("a", interrupt)], 1, lambda: 0.0)
