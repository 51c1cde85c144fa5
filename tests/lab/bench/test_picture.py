from __future__ import annotations

from typing import Any

from steepest.lab.bench.picture import picture
from steepest.lab.bench.results import Record, Result
from steepest.lab.theme import LIGHT

from ..conftest import MACHINE


def row(key: str, parameters: int, step_ms: float | None, state: int, **more: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "key": key,
        "label": key,
        "source": "steepest",
        "how": "compiled",
        "model": str(parameters),
        "parameters": parameters,
        "state_bytes": state,
        "status": "planned" if step_ms is None else "ok",
    }
    return {**made, **({} if step_ms is None else {"step_ms": step_ms}), **more}


def record(section: str, *rows: dict[str, Any]) -> Record:
    return Record(MACHINE, {}, [Result(section, "t", (), list(rows))])


def test_a_line_for_each_optimizer_and_a_hollow_mark_for_what_was_planned() -> None:
    drawn = picture(
        record(
            "sweep",
            row("axpy", 10, 1.0, 0),
            row("lion", 1000, 8.0, 4 << 30),
            row("lion", 10, 2.0, 1 << 30),
            row("lion", 10**6, None, 8 << 30),
            row("adamw", 10, 3.0, 2 << 30),
            {**row("gone", 10, None, 0), "status": "failed"},
        )
    )
    assert drawn is not None
    time, memory = drawn.axes
    lines = {line.get_label(): line for line in memory.get_lines() if not line.get_label().startswith("_")}
    assert set(lines) == {"lion, compiled", "adamw, compiled"}
    assert list(lines["lion, compiled"].get_xdata()) == [10, 1000, 10**6]
    assert list(lines["lion, compiled"].get_ydata()) == [1, 4, 8]
    timed = next(line for line in time.get_lines() if line.get_label() == "lion, compiled")
    assert list(timed.get_ydata()) == [2.0, 8.0]
    hollow = [
        line.get_xdata()[0]
        for line in memory.get_lines()
        if line.get_label().startswith("_") and line.get_markerfacecolor() == LIGHT.ground
    ]
    assert hollow == [10**6]


def test_without_a_sweep_whole_models_are_drawn_and_single_blocks_are_not() -> None:
    drawn = picture(
        record(
            "steps",
            row("lion", 10, 2.0, 4, scope="element"),
            row("muon", 5, 9.0, 4, scope="matrix"),
        )
    )
    assert drawn is not None
    assert [t.get_text() for t in drawn.axes[1].get_legend().get_texts()] == ["lion, compiled"]  # type: ignore[union-attr]


def test_nothing_to_draw_is_no_picture() -> None:
    assert picture(record("sweep", row("axpy", 10, 1.0, 0))) is None
    assert picture(record("machine")) is None
