"""The figures of docs/ternary.md are those of the study's records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

import pytest

from steepest.lab.analysis.welch import welch
from steepest.lab.records import Record, read_records

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "ternary.md").read_text(encoding="utf-8")
LABELS = {
    "float32, AdamW": "float32",
    "latent float32 + STE, AdamW": "latent float32",
    "frozen random ternary weights": "frozen random",
}
BEGINNINGS = {"mlp": "MLP 64-256", "convnet": "Convolutional net (", "text": "GPT on text, "}


def final(task: str) -> dict[str, list[Record]]:
    """Return the tuned trials of the final seeds, by method."""
    found: dict[str, list[Record]] = {}
    for record in read_records(ROOT / "benchmarks" / "evidence" / "ternary" / task):
        if record.phase == "tuned":
            found.setdefault(record.optimizer, []).append(record)
    return found


def spread(values: Sequence[float], places: int) -> str:
    return f"{fmean(values):.{places}f} ± {stdev(values):.{places}f}"


def percent(fraction: float) -> str:
    return f"{float(f'{100 * fraction:.2g}'):g} %" if fraction else "0"


def expected(records: Sequence[Record], metric: str) -> list[str]:
    """Return the cells of a method's row after its name."""

    def series(name: str) -> list[list[float]]:
        return [[value for _, value in record.series[name]] for record in records]

    cells = [spread([record.test[metric] for record in records], 3)]
    if "accuracy" in records[0].test:
        cells.append(spread([record.test["accuracy"] for record in records], 1))
    bytes_per_weight = fmean(values[-1] for values in series("bytes per hidden weight"))
    cells += [f"{bytes_per_weight:.2f}", f"{records[0].searched['lr']:g}"]
    if "fraction of the weights that are 0" not in records[0].series:
        return [*cells, "", ""]
    flips = series("fraction of the weights flipped in a step")
    mean, last = fmean(map(fmean, flips)), fmean(values[-1] for values in flips)
    zeros = fmean(values[-1] for values in series("fraction of the weights that are 0"))
    return [*cells, f"{percent(mean)} → {percent(last)}" if mean else "0", f"{100 * zeros:.0f} %"]


@pytest.mark.parametrize("task", BEGINNINGS)
def test_the_tables_have_the_records_figures(task: str) -> None:
    section = PAGE.split(f"\n{BEGINNINGS[task]}")[1]
    lines = section.split("\n\n")[1].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    metric = "bits per byte" if task == "text" else "cross-entropy"
    by = final(task)
    assert [row[1:] for row in rows] == [expected(by[LABELS.get(row[0], row[0])], metric) for row in rows]
    means = [fmean(record.test[metric] for record in by[LABELS.get(row[0], row[0])]) for row in rows]
    assert len(rows) == 6
    assert means == sorted(means)


def test_what_the_text_says_of_the_votes_holds() -> None:
    for task in BEGINNINGS:
        metric = "bits per byte" if task == "text" else "cross-entropy"
        by = {name: [record.test[metric] for record in records] for name, records in final(task).items()}
        for votes in ("votes by sign", "votes by magnitude"):
            assert fmean(by[votes]) < fmean(by["latent float32"])
            if task != "convnet":
                assert welch(by[votes], by["frozen random"]) < 0.01
