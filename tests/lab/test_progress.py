from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from steepest.lab import Experiment, Record
from steepest.lab.progress import Callback, Several
from steepest.lab.progress.live import Live
from steepest.lab.progress.plain import Plain
from steepest.lab.progress.tensorboard import TensorBoard
from steepest.lab.records import Cost
from steepest.lab.training.trial import Trial

from .conftest import make_experiment, make_record


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still until a test sets it."""
    seconds = [0.0]
    monkeypatch.setattr("steepest.lab.progress.state.time.monotonic", lambda: seconds[0])
    return seconds


def show(callback: Callback, experiment: Experiment, done: Sequence[Record], new: Sequence[Record]) -> None:
    """Call a callback for an experiment's trials, the way a runner does."""
    callback.on_start(experiment, done)
    for record in new:
        callback.on_trial_start(
            Trial(record.optimizer, record.phase, record.seed, record.searched, record.steps)
        )
        for step, _, loss in record.training_loss:
            callback.on_step(step, loss)
        callback.on_trial_end(record)
    callback.on_end()


def test_plain_has_a_line_per_trial_with_the_time_left(clock: list[float]) -> None:
    class Stream(io.StringIO):
        def flush(self) -> None:
            clock[0] += 30.0  # two workers end a trial of a minute every 30 seconds

    stream = Stream()
    experiment = make_experiment(("a", "b"), trials=1, seeds=(1,))
    new = [
        make_record("b", 2.5, lr=0.01, seconds=60.0),
        make_record("a", math.nan, phase="tuned", seconds=60.0),
        make_record("a", 3.5, phase="default", seconds=60.0),
    ]
    show(Plain(stream), experiment, [make_record("a", 2.0, seconds=60.0)], new)
    assert stream.getvalue().splitlines() == [
        "A made-up race: 6 trials of 1000 steps, 1 of them already done",
        "[2/6] b search seed 0, lr 0.01: loss 2.5 nats in 60.0 s, about 2 min 00 s left",
        "[3/6] a tuned seed 1, lr 0.001: diverged at step 501 in 60.0 s, about 1 min 30 s left",
        "[4/6] a default seed 1, defaults: loss 3.5 nats in 60.0 s, about 1 min 00 s left",
    ]


def test_before_the_first_trial_the_time_left_comes_from_the_costs() -> None:
    cost = {"optimizer": "a", "model": "m", "parameters": 1, "state_bytes": 0}
    costs = {"a": Cost(**cost, gradient_ms=8.0, optimizer_ms=2.0)}  # type: ignore[arg-type]
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    live = Live(console)
    live.on_start(make_experiment(("a",), trials=3, seeds=(1,), costs=costs), [])
    shown = draw(live, console)
    live.on_end()
    # Five trials of 1000 steps of 10 ms.
    assert "0/5 trials" in shown
    assert "about 50 s left" in shown


def draw(live: Live, console: Console) -> str:
    with console.capture() as capture:
        console.print(live.draw())
    return Text.from_ansi(capture.get()).plain


@pytest.mark.parametrize("width", [80, 120])
def test_the_live_table_shows_the_trial_the_best_and_the_time_left(width: int, clock: list[float]) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=width)
    live = Live(console)
    experiment = make_experiment(("procrustes", "adamw"), trials=2, seeds=(1, 2))
    done = [make_record("procrustes", 2.5, seconds=60.0), make_record("adamw", 3.5, lr=0.01, seconds=60.0)]
    live.on_start(experiment, done)
    live.on_trial_start(Trial("adamw", "search", 0, {"lr": 0.1}, 1000))
    live.on_step(500, 3.21)
    shown = draw(live, console)
    clock[0] = 120.0
    live.on_trial_end(make_record("adamw", 1.25, lr=0.1, seconds=60.0))
    after = draw(live, console)
    live.on_end()
    lines = shown.splitlines()
    assert max(map(len, lines)) <= width
    words = " ".join(shown.split())
    for part in ("procrustes", "2.5", "3.5", "3.210", "2/12 trials"):
        assert part in words, part
    assert "1.25" in after
    assert "3.210" not in after
    assert "3/12 trials" in after
    assert "about 18 min 00 s left" in after


def test_the_live_table_leaves_the_cursor_visible() -> None:
    stream = io.StringIO()
    live = Live(Console(file=stream, force_terminal=True, width=100))
    show(live, make_experiment(("adamw",)), [], [make_record()])
    live.on_end()  # a second end does no harm
    hidden, shown = stream.getvalue().rfind("\x1b[?25l"), stream.getvalue().rfind("\x1b[?25h")
    assert shown > hidden >= 0


def scalars(directory: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, Any] = {}
    for run in sorted(directory.iterdir()):
        events = EventAccumulator(str(run))
        events.Reload()
        found[run.name] = {
            tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
        }
    return found


def test_tensorboard_has_the_values_of_own_and_of_other_workers_trials(tmp_path: Path) -> None:
    own, final, others = (
        make_record(value=1.5),
        make_record(value=2.0, phase="tuned"),
        make_record("lion", 0.5),
    )
    board = TensorBoard(tmp_path)
    # Another worker's trial may come before the first of this one.
    board.on_trial_end(others)
    show(board, make_experiment(), [], [own, final])
    loss = [(500, 3.0), (1000, 1.5)]
    assert scalars(tmp_path) == {
        "adamw search seed 0 lr 0.001": {"training loss": loss, "validation/loss": [(0, 5.0), *loss]},
        "adamw tuned seed 1 lr 0.001": {
            "training loss": [(500, 3.0), (1000, 2.0)],
            "validation/loss": [(0, 5.0), (500, 3.0), (1000, 2.0)],
            "test/loss": [(1000, 2.0)],
        },
        "lion search seed 0 lr 0.001": {
            "training loss": [(500, 3.0), (1000, 0.5)],
            "validation/loss": [(0, 5.0), (500, 3.0), (1000, 0.5)],
        },
    }


def test_several_callbacks_get_every_event_in_order() -> None:
    events: list[tuple[int, str]] = []

    def recorder(number: int) -> Callback:
        callback = Callback()
        for name in [name for name in vars(Callback) if name.startswith("on_") or name == "message"]:
            setattr(callback, name, lambda *arguments, name=name: events.append((number, name)))
        return callback

    several = Several(recorder(1), recorder(2))
    several.message("hello")
    show(several, make_experiment(), [], [make_record(training_loss=[(1, 0.1, 2.0)])])
    names = ["message", "on_start", "on_trial_start", "on_step", "on_trial_end", "on_end"]
    assert events == [(number, name) for name in names for number in (1, 2)]
