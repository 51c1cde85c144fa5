from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import pytest
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from rich.console import Console

from steepest.lab import DEFAULT_OPTIMIZERS
from steepest.lab.plan import Plan
from steepest.lab.plots import PLOTS, Plot, lr_search, summary, training, validation
from steepest.lab.records import Record
from steepest.lab.report import write
from steepest.lab.run_dir import RunDir
from steepest.lab.table import table
from steepest.lab.theme import DARK, LIGHT, Theme, series_style

from .conftest import make_plan, make_record
from .test_ranking import records_of


class Page(HTMLParser):
    """The references, tags and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attributes if name in ("src", "srcset", "href")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def report(directory: Path, plan: Plan, records: Sequence[Record]) -> Page:
    return Page(write(RunDir(directory), plan, records).read_text(encoding="utf-8"))


def test_the_page_is_self_contained(tmp_path: Path) -> None:
    records = [*records_of("a", (2.0, 2.1, 2.2)), *records_of("b", (2.5, 2.5, 2.6))]
    page = report(tmp_path, make_plan(), records)
    html = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?://|url\(|@import", html)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert len(page.references) == 2 * len(PLOTS)
    embedded = set()
    for reference in page.references:
        kind, _, data = reference.partition(",")
        assert kind == "data:image/png;base64"
        embedded.add(base64.b64decode(data, validate=True))
    assert embedded == {path.read_bytes() for path in tmp_path.glob("*.png")}
    assert len(embedded) == 2 * len(PLOTS)


@pytest.mark.usefixtures("without_plots")
def test_the_table_matches_the_records(tmp_path: Path) -> None:
    records = [*records_of("a", (2.0, 2.3, 2.6)), *records_of("b", (2.5, 2.5, 2.5))]
    text = " ".join(" ".join(report(tmp_path, make_plan(), records).words).split())
    assert "a 2.300 ± 0.300 3 0.01 3.000 at 0.001 4.00 1.00 ms 1.00 11.0 ms" in text
    assert text.index("2.300 ± 0.300") < text.index("2.500 ± 0.000")
    assert "Untrained: 5.000" in text
    assert "an abacus" in text


@pytest.mark.usefixtures("without_plots")
def test_labels_are_escaped(tmp_path: Path) -> None:
    name = "<b>&'mine'"
    page = report(tmp_path, make_plan((name,)), records_of(name, (2.0, 2.0, 2.0)))
    assert "b" not in page.tags
    assert name in page.words


@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.name)
@pytest.mark.parametrize(
    "case", ["all diverged", "one diverged", "one record", "one seed", "no finite start"]
)
def test_plots_handle_divergence_and_unfinished_races(plot: Plot, case: str, tmp_path: Path) -> None:
    good = records_of("a", (2.0, 2.1, 2.2))
    diverged = [make_record("b", 10.0**-power, math.nan, number=power) for power in range(3)]
    outlier = [make_record("b", 1.0, 1e30)]
    records = {
        "all diverged": diverged,
        "one diverged": good + diverged,
        "one record": good[:1],
        "one seed": good[:3] + outlier,
        "no finite start": [
            Record(**{**vars(record), "validation": [(0, 0.0, math.nan), *record.validation[1:]]})
            for record in good
        ],
    }[case]
    figure = plot.draw(make_plan(), records, LIGHT)
    figure.savefig(tmp_path / "plot.png")
    for axes in figure.axes:
        assert all(
            math.isfinite(limit) and abs(limit) < 1e3 for limit in (*axes.get_ylim(), *axes.get_xlim())
        )


def limits(figure: Figure) -> tuple[float, float]:
    return figure.axes[0].get_ylim()


@pytest.mark.parametrize("bad", [math.nan, 1e30, 400.0])
def test_a_failed_trial_does_not_change_the_axis_much(bad: float) -> None:
    plan = make_plan()
    good = records_of("a", (2.0, 2.1, 2.2))
    failed = [make_record("b", 10.0**-power, bad, number=power) for power in range(3)]
    for draw in (validation, training, lr_search):
        low, high = limits(draw(plan, good, LIGHT))
        with_failed = limits(draw(plan, good + failed, LIGHT))
        assert with_failed[1] - with_failed[0] <= 1.5 * max(high - low, 3.0)


def test_the_y_axis_includes_the_untrained_level() -> None:
    low, high = limits(validation(make_plan(), records_of("a", (2.0, 2.1, 2.2)), LIGHT))
    assert low < 2.0
    assert 5.0 < high < 6.0


def test_a_distant_untrained_level_is_annotated_and_not_in_the_range() -> None:
    plan = make_plan(lower_is_better=False)
    records = [
        replace(record, validation=[(0, 0.0, 11.7), (5, 0.5, 95.0), *record.validation[2:]])
        for record in records_of("a", (97.0, 97.5, 98.0))
    ]
    figure = validation(plan, records, LIGHT)
    low, high = limits(figure)
    assert 94 < low < 95
    assert 99 < high < 99.5
    assert [text.get_text() for text in figure.axes[0].texts] == ["↓ untrained: 11.70"]


def test_widely_different_durations_get_a_logarithmic_axis() -> None:
    plan = make_plan()
    records = [*records_of("a", (2.0, 2.1, 2.2)), *records_of("b", (2.0, 2.1, 2.2))]
    assert validation(plan, records, LIGHT).axes[1].get_xscale() == "linear"
    slow = replace(plan, times=replace(plan.times, optimizer_ms={"a": 1.0, "b": 90.0}))
    axes = validation(slow, records, LIGHT).axes[1]
    assert axes.get_xscale() == "log"
    left, right = axes.get_xlim()
    assert 0 < left < 0.11
    assert 1.0 < right < 1.5


def test_failed_trials_of_different_optimizers_have_separate_rows() -> None:
    failed = [make_record(label, 1.0, math.nan, number=3) for label in "ab"]
    good = [*records_of("a", (2.0, 2.1, 2.2)), *records_of("b", (2.1, 2.1, 2.2))]
    assert len(lr_search(make_plan(), good[:2], LIGHT).axes) == 1
    _, strip = lr_search(make_plan(trials=4), good + failed, LIGHT).axes
    assert [label.get_text() for label in strip.get_yticklabels()] == ["a", "b"]
    rows = [{float(y) for y in line.get_ydata()} for line in strip.lines]  # type: ignore[union-attr]
    assert rows == [{0}, {1}]


def test_the_error_bar_has_the_width_of_the_standard_deviation() -> None:
    axes = summary(make_plan(("a",)), records_of("a", (2.0, 2.3, 2.6)), LIGHT).axes[0]
    (bar,) = [collection for collection in axes.collections if isinstance(collection, LineCollection)]
    ((left, _), (right, _)) = bar.get_segments()[0]
    assert (left, right) == pytest.approx((2.0, 2.6))


@pytest.mark.usefixtures("without_plots")
def test_the_table_has_the_steps_to_adamws_final_metric(tmp_path: Path) -> None:
    # The curves go from 5 to 3 in the first 5 steps and to the final metric in the next 5.
    records = [*records_of("adamw", (2.0, 2.0, 2.0)), *records_of("b", (1.0, 1.0, 1.0))]
    records += records_of("c", (2.5, 2.5, 2.5))
    plan = make_plan(("adamw", "b", "c"))
    text = " ".join(" ".join(report(tmp_path, plan, records).words).split())
    assert "steps to adamw's final metric" in text
    for words in ("8 (75%)", "10 (100%)", "not reached"):
        assert words in text
    assert "timed steps are eager" in text
    other = " ".join(report(tmp_path, make_plan(("b",)), records_of("b", (1.0, 1.0, 1.0))).words)
    assert "final metric" not in other


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_table_fits_the_terminal(width: int) -> None:
    labels = ("adamw", "procrustes", "signgsd")
    plan = make_plan(labels, trials=2, default_lr=3.2e-5)
    plan = replace(plan, request=replace(plan.request, metric="validation bits per byte"), steps=12_000)
    records = [make_record(label, 3.2e-5, 97.5, seed=seed) for label in labels for seed in range(3)]
    records += [make_record(label, 3.2e-6, 99.5, number=1) for label in labels]
    console = Console(file=io.StringIO(), width=width)
    console.print(table(plan, records, width))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    rows = [line for line in shown.splitlines() if line.startswith("│")]
    assert len(rows) == 3
    assert max(len(line) for line in rows) <= width
    assert "…" not in shown
    assert "3.2e-05 ↑" in shown
    assert ("untuned," in shown) == (width >= 100)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.mode)
def test_all_styles_are_different(theme: Theme) -> None:
    marks = [series_style(theme, index) for index in range(25)]
    assert len(set(marks)) == 25


def luminance(color: str) -> float:
    channels = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.mode)
def test_text_and_lines_have_enough_contrast(theme: Theme) -> None:
    assert contrast(theme.text, theme.background) > 7
    assert contrast(theme.muted, theme.background) > 4.5
    assert all(contrast(color, theme.background) > 2 for color in theme.palette)


# Simulation of dichromatic vision on linear RGB (Machado, Oliveira and Fernandes 2009).
SIGHT = {
    "all": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "no red": ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),
    "no green": ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),
    "no blue": ((1.256, -0.077, -0.179), (-0.078, 0.931, 0.148), (0.005, 0.691, 0.304)),
}


def cielab(color: str, sight: str) -> tuple[float, float, float]:
    channels = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    seen = [min(1.0, max(0.0, sum(a * b for a, b in zip(row, linear, strict=True)))) for row in SIGHT[sight]]
    to_xyz = ((0.4339, 0.3762, 0.1899), (0.2126, 0.7152, 0.0722), (0.0177, 0.1095, 0.8728))
    x, y, z = (sum(a * b for a, b in zip(row, seen, strict=True)) for row in to_xyz)
    x, y, z = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z))
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.mode)
def test_ten_colours_are_distinguishable_with_any_colour_vision(theme: Theme, sight: str) -> None:
    seen = [cielab(color, sight) for color in theme.palette]
    assert len(seen) >= 10
    # About ten just noticeable differences; the minimum among Okabe and Ito's own colours is 16 on white.
    assert min(math.dist(a, b) for a, b in combinations(seen, 2)) > 10


def test_the_default_race_has_distinct_colours_and_markers() -> None:
    marks = [series_style(LIGHT, index) for index in range(len(DEFAULT_OPTIMIZERS))]
    assert len({one.color for one in marks}) == len({one.marker for one in marks}) == len(marks)
