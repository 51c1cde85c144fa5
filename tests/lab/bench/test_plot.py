from __future__ import annotations

from typing import Any

from steepest.lab.bench.plot import plot
from steepest.lab.bench.results import Record, Result
from steepest.lab.theme import LIGHT

from ..conftest import MACHINE


def row(key: str, parameters: int, step_ms: float | None, state: int, **more: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "key": key,
        "label": key,
        "source": "steepest",
        "how": "compiled",
        "model": str(parameters),
        "parameters": parameters,
        "state_bytes": state,
        "status": "planned" if step_ms is None else "ok",
    }
    return {**base, **({} if step_ms is None else {"step_ms": step_ms}), **more}


def record(section: str, *rows: dict[str, Any]) -> Record:
    return Record(MACHINE, {}, [Result(section, "t", (), list(rows))])


def test_every_optimizer_has_a_line_and_planned_models_have_hollow_marks() -> None:
    figure = plot(
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
    assert figure is not None
    time, memory = figure.axes
    lines = {line.get_label(): line for line in memory.get_lines() if not line.get_label().startswith("_")}
    assert set(lines) == {"lion, compiled", "adamw, compiled"}
    assert list(lines["lion, compiled"].get_xdata()) == [10, 1000, 10**6]
    assert list(lines["lion, compiled"].get_ydata()) == [1, 4, 8]
    timed = next(line for line in time.get_lines() if line.get_label() == "lion, compiled")
    assert list(timed.get_ydata()) == [2.0, 8.0]
    hollow = [
        line.get_xdata()[0]
        for line in memory.get_lines()
        if line.get_label().startswith("_") and line.get_markerfacecolor() == LIGHT.background
    ]
    assert hollow == [10**6]


def test_without_a_sweep_only_whole_models_are_drawn() -> None:
    figure = plot(
        record(
            "steps",
            row("lion", 10, 2.0, 4, scope="element"),
            row("muon", 5, 9.0, 4, scope="matrix"),
        )
    )
    assert figure is not None
    assert [t.get_text() for t in figure.axes[1].get_legend().get_texts()] == ["lion, compiled"]  # type: ignore[union-attr]


def test_without_data_there_is_no_plot() -> None:
    assert plot(record("sweep", row("axpy", 10, 1.0, 0))) is None
    assert plot(record("machine")) is None
