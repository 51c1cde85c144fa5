from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
from rich.console import Console
from rich.text import Text

from steepest.lab import trial_scheduler
from steepest.lab.progress import Callback
from steepest.lab.progress.eta import ETA
from steepest.lab.progress.live_table import LiveTable
from steepest.lab.progress.text_log import TextLog
from steepest.lab.records import Record

from .conftest import make_plan, make_record


def run(callback: Callback, metric: float = 2.0) -> list[Record]:
    """Call a callback for a whole race of two optimizers with one trial and two seeds."""
    plan = make_plan(trials=1, seeds=2)
    records: list[Record] = []
    callback.on_start(plan, records)
    while (progress := trial_scheduler.progress(plan, records)).next is not None:
        at = progress.next
        callback.on_trial_start(at, progress)
        callback.on_step(5, 3.21)
        record = make_record(
            at.optimizer, at.lr, metric, phase=at.phase, number=at.round, seed=at.seed, seconds=60.0
        )
        records.append(record)
        callback.on_trial_end(record)
    callback.on_end()
    return records


def test_the_text_log_has_a_line_per_trial_with_the_eta() -> None:
    stream = io.StringIO()
    run(TextLog(stream))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "4 trials of 10 steps"
    assert lines[1] == "[1/4] a lr 0.001 seed 0: 2.000 nats in 60.0 s, about 3 min 00 s left"
    assert lines[-1] == "[4/4] b lr 0.001 seed 1: 2.000 nats in 60.0 s, the last"
    assert len(lines) == 5
    assert "\x1b" not in stream.getvalue()


def test_the_text_log_reports_divergence() -> None:
    stream = io.StringIO()
    run(TextLog(stream), metric=math.nan)
    assert "[1/2] a lr 0.001 seed 0: diverged in 60.0 s" in stream.getvalue().replace("[1/4]", "[1/2]")


def test_the_live_table_shows_trial_loss_best_metric_and_eta() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    live = LiveTable(console)
    plan = make_plan(trials=2, seeds=2)
    done = [make_record("a", metric=2.5, seconds=60.0), make_record("b", metric=3.5, seconds=60.0)]
    live.on_start(plan, done)
    try:
        live.on_trial_start(trial_scheduler.progress(plan, done).next, trial_scheduler.progress(plan, done))  # type: ignore[arg-type]
        live.on_step(5, 3.21)
        with console.capture() as capture:
            console.print(live.draw())
        shown = capture.get()
    finally:
        live.on_end()
    for part in ("3.210", "5/10", "lr 0.01", "2.500", "3.500", "2/6 trials", "3 min 30 s"):
        assert part in shown


@pytest.mark.parametrize("width", [80, 120])
def test_the_live_table_fits_the_terminal(width: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=width)
    live = LiveTable(console)
    plan = replace(make_plan(("procrustes", "adamw"), trials=2, seeds=2, default_lr=3.2e-5), steps=12_000)
    done = [make_record("procrustes", 3.2e-5, metric=97.5), make_record("adamw", 3.2e-5, metric=9.444)]
    live.on_start(plan, done)
    try:
        live.on_trial_start(trial_scheduler.progress(plan, done).next, trial_scheduler.progress(plan, done))  # type: ignore[arg-type]
        live.on_step(11_999, 3.21)
        with console.capture() as capture:
            console.print(live.draw())
        shown = Text.from_ansi(capture.get()).plain
    finally:
        live.on_end()
    assert "…" not in shown
    lines = shown.splitlines()
    assert max(len(line) for line in lines) <= width
    # One line per optimizer with complete borders. The table is drawn twice: by itself and by this test.
    rows = [line for line in lines if line.startswith("│")][-2:]
    assert [row.split()[1] for row in rows] == list(plan.labels)
    assert all(line.rstrip().endswith("│") for line in rows)
    for part in ("procrustes", "lr 0.00032, seed 0, 11999/12000", "3.210", "97.50", "9.44 ", "left"):
        assert part in shown
    assert ("at lr" in shown) == (width >= 100)


def test_the_live_table_leaves_the_cursor_visible() -> None:
    stream = io.StringIO()
    run(LiveTable(Console(file=stream, force_terminal=True, width=100)))
    hidden, shown = stream.getvalue().rfind("\x1b[?25l"), stream.getvalue().rfind("\x1b[?25h")
    assert shown > hidden >= 0


def test_the_eta_uses_the_plan_until_the_first_trial_ends() -> None:
    plan = make_plan()
    eta = ETA(plan, [])
    # A trial has 10 steps of 11 ms and 3 evaluations of 100 ms.
    assert eta.remaining_seconds(2) == pytest.approx(2 * 0.41)
    eta.update(make_record(seconds=5.0))
    assert eta.remaining_seconds(2) == pytest.approx(10.0)
    assert eta.remaining_seconds(2, done=0.5) == pytest.approx(7.5)
    for _ in range(2):
        eta.update(make_record(seconds=1.0))
    assert eta.remaining_seconds(3) == pytest.approx(3.0)
