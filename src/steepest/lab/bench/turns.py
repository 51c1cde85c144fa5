"""Taking turns: every contestant once a round, so that all meet the same moods of the machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from statistics import median, quantiles

WARMUP_ROUNDS = 2

_SHORTEST_TURN = 0.01
"""Seconds: what is quicker than that acts several times in a turn, so that the clock can tell."""
_MOST_ACTS = 1000


@dataclass(frozen=True)
class Turn:
    """One contestant's: `ready` is not timed, `act` is.

    A `queued` one is made ready once, acts as often as the turn has time for, and then the clock is read:
    on a device that works behind the host's back, waiting for it takes as long as a small product does.
    """

    label: str
    act: Callable[[], object]
    ready: Callable[[], object] = lambda: None
    queued: bool = False


@dataclass
class Times:
    """Seconds of one act, a list entry per round, of all that came through; reasons for those that failed."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def median_ms(self, label: str) -> float:
        """The median over the rounds, in milliseconds."""
        return 1e3 * median(self.seconds[label])

    def quartiles_ms(self, label: str) -> tuple[float, float]:
        """The quartiles over the rounds, in milliseconds."""
        if len(self.seconds[label]) < 2:
            return self.median_ms(label), self.median_ms(label)
        low, _, high = quantiles(self.seconds[label], n=4)
        return 1e3 * low, 1e3 * high

    def ratio(self, label: str, other: str) -> float:
        """The median over the rounds of this one's time over the other's in the same round."""
        pairs = zip(self.seconds[label], self.seconds[other], strict=True)
        return median(one / two for one, two in pairs)


def take_turns(
    turns: Sequence[Turn],
    rounds: int,
    clock: Callable[[], float],
    progress: Callable[[int], None] = lambda done: None,
) -> Times:
    """Time `rounds` rounds after two that do not count; who comes first rotates.

    One that raises is out from then on, and the others go on.
    """
    times = Times({turn.label: [] for turn in turns})
    acts = dict.fromkeys(times.seconds, 1)
    for number in range(WARMUP_ROUNDS + rounds):
        for turn in islice(
            cycle(turns), number % max(1, len(turns)), number % max(1, len(turns)) + len(turns)
        ):
            if turn.label in times.failed:
                continue
            try:
                spent = _timed(turn, acts[turn.label], clock)
            except Exception as error:
                times.failed[turn.label] = reason(error)
                times.seconds.pop(turn.label)
                continue
            if number < WARMUP_ROUNDS:
                acts[turn.label] = max(1, min(_MOST_ACTS, int(_SHORTEST_TURN / max(spent, 1e-9))))
            else:
                times.seconds[turn.label].append(spent)
        progress(number + 1)
    return times


def _timed(turn: Turn, acts: int, clock: Callable[[], float]) -> float:
    if turn.queued:
        turn.ready()
        start = clock()
        for _ in range(acts):
            turn.act()
        return (clock() - start) / acts
    spent = 0.0
    for _ in range(acts):
        turn.ready()
        start = clock()
        turn.act()
        spent += clock() - start
    return spent / acts


def reason(error: BaseException) -> str:
    """What went wrong in one line that fits into a table."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text if len(text) <= 160 else text[:157] + '...'}"
