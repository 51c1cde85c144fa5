from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
from rich.console import Console
from rich.text import Text

from steepest.lab import course
from steepest.lab.progress import Watcher
from steepest.lab.progress.live import Live
from steepest.lab.progress.pace import Pace
from steepest.lab.progress.plain import Plain
from steepest.lab.records import Record

from .conftest import make_plan, make_record


def watch(watcher: Watcher, metric: float = 2.0) -> list[Record]:
    """Show a watcher a whole race of two optimizers with one trial and two seeds."""
    plan = make_plan(trials=1, seeds=2)
    records: list[Record] = []
    watcher.planned(plan, records)
    while (progress := course.survey(plan, records)).next is not None:
        at = progress.next
        watcher.begun(at, progress)
        watcher.ticked(5, 3.21)
        record = make_record(
            at.optimizer, at.lr, metric, phase=at.phase, number=at.round, seed=at.seed, seconds=60.0
        )
        records.append(record)
        watcher.finished(record)
    watcher.closed()
    return records


def test_plain_lines_say_what_happened_and_how_long_it_will_take() -> None:
    stream = io.StringIO()
    watch(Plain(stream))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "4 trials of 10 steps"
    assert lines[1] == "[1/4] a lr 0.001 seed 0: 2.000 nats in 60.0 s, about 3 min 00 s left"
    assert lines[-1] == "[4/4] b lr 0.001 seed 1: 2.000 nats in 60.0 s, the last"
    assert len(lines) == 5
    assert "\x1b" not in stream.getvalue()


def test_a_diverged_trial_is_called_so() -> None:
    stream = io.StringIO()
    watch(Plain(stream), metric=math.nan)
    assert "[1/2] a lr 0.001 seed 0: diverged in 60.0 s" in stream.getvalue().replace("[1/4]", "[1/2]")


def test_the_live_table_shows_trial_loss_best_and_time_left() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    live = Live(console)
    plan = make_plan(trials=2, seeds=2)
    done = [make_record("a", metric=2.5, seconds=60.0), make_record("b", metric=3.5, seconds=60.0)]
    live.planned(plan, done)
    try:
        live.begun(course.survey(plan, done).next, course.survey(plan, done))  # type: ignore[arg-type]
        live.ticked(5, 3.21)
        with console.capture() as capture:
            console.print(live.draw())
        shown = capture.get()
    finally:
        live.closed()
    for part in ("3.210", "5/10", "lr 0.01", "2.500", "3.500", "2/6 trials", "3 min 30 s"):
        assert part in shown


@pytest.mark.parametrize("width", [80, 120])
def test_the_live_table_fits_the_terminal(width: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=width)
    live = Live(console)
    plan = replace(make_plan(("procrustes", "adamw"), trials=2, seeds=2, default_lr=3.2e-5), steps=12_000)
    done = [make_record("procrustes", 3.2e-5, metric=97.5), make_record("adamw", 3.2e-5, metric=9.444)]
    live.planned(plan, done)
    try:
        live.begun(course.survey(plan, done).next, course.survey(plan, done))  # type: ignore[arg-type]
        live.ticked(11_999, 3.21)
        with console.capture() as capture:
            console.print(live.draw())
        shown = Text.from_ansi(capture.get()).plain
    finally:
        live.closed()
    assert "…" not in shown
    lines = shown.splitlines()
    assert max(len(line) for line in lines) <= width
    # A line each, and the borders whole.
    # Drawn twice: by the running table itself, and by us.
    rows = [line for line in lines if line.startswith("│")][-2:]
    assert [row.split()[1] for row in rows] == list(plan.labels)
    assert all(line.rstrip().endswith("│") for line in rows)
    for part in ("procrustes", "lr 0.00032, seed 0, 11999/12000", "3.210", "97.50", "9.44 ", "left"):
        assert part in shown
    assert ("at lr" in shown) == (width >= 100)


def test_a_live_race_leaves_the_cursor_visible_however_it_ends() -> None:
    stream = io.StringIO()
    watch(Live(Console(file=stream, force_terminal=True, width=100)))
    hidden, shown = stream.getvalue().rfind("\x1b[?25l"), stream.getvalue().rfind("\x1b[?25h")
    assert shown > hidden >= 0


def test_the_pace_is_planned_until_a_trial_has_shown_it() -> None:
    plan = make_plan()
    pace = Pace(plan, [])
    # 10 steps of 11 ms and 3 evaluations of 100 ms.
    assert pace.left(2) == pytest.approx(2 * 0.41)
    pace.finished(make_record(seconds=5.0))
    assert pace.left(2) == pytest.approx(10.0)
    assert pace.left(2, done=0.5) == pytest.approx(7.5)
    for _ in range(2):
        pace.finished(make_record(seconds=1.0))
    assert pace.left(3) == pytest.approx(3.0)
