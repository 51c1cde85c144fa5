from __future__ import annotations

import base64
import math
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from steepest.lab.folder import Folder
from steepest.lab.plan import Plan
from steepest.lab.plots import PICTURES, Picture, lr_search, training, validation
from steepest.lab.records import Record
from steepest.lab.report import write
from steepest.lab.theme import DARK, LIGHT, Theme, mark

from .conftest import make_plan, make_record
from .test_standings import records_of


class Page(HTMLParser):
    """Everything a page refers to, and its text."""

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


def report(folder: Path, plan: Plan, records: Sequence[Record]) -> Page:
    return Page(write(Folder(folder), plan, records).read_text(encoding="utf-8"))


def test_the_page_stands_alone(tmp_path: Path) -> None:
    records = [*records_of("a", (2.0, 2.1, 2.2)), *records_of("b", (2.5, 2.5, 2.6))]
    page = report(tmp_path, make_plan(), records)
    html = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?://|url\(|@import", html)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert len(page.references) == 2 * len(PICTURES)
    embedded = set()
    for reference in page.references:
        kind, _, data = reference.partition(",")
        assert kind == "data:image/png;base64"
        embedded.add(base64.b64decode(data, validate=True))
    assert embedded == {path.read_bytes() for path in tmp_path.glob("*.png")}
    assert len(embedded) == 2 * len(PICTURES)


def test_the_table_says_what_the_records_say(tmp_path: Path) -> None:
    records = [*records_of("a", (2.0, 2.3, 2.6)), *records_of("b", (2.5, 2.5, 2.5))]
    text = " ".join(" ".join(report(tmp_path, make_plan(), records).words).split())
    assert "a 2.300 ± 0.300 3 0.01 3.000 at 0.001 4.00 1.00 ms 1.00 11.0 ms" in text
    assert text.index("2.300 ± 0.300") < text.index("2.500 ± 0.000")
    assert "Untrained: 5.000" in text
    assert "an abacus" in text


def test_labels_are_text_not_markup(tmp_path: Path) -> None:
    name = "<b>&'mine'"
    page = report(tmp_path, make_plan((name,)), records_of(name, (2.0, 2.0, 2.0)))
    assert "b" not in page.tags
    assert name in page.words


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.name)
@pytest.mark.parametrize(
    "case", ["all diverged", "one diverged", "one record", "one seed", "no finite start"]
)
def test_pictures_survive_divergence_and_unfinished_races(
    picture: Picture, case: str, tmp_path: Path
) -> None:
    good = records_of("a", (2.0, 2.1, 2.2))
    lost = [make_record("b", 10.0**-power, math.nan, number=power) for power in range(3)]
    wild = [make_record("b", 1.0, 1e30)]
    records = {
        "all diverged": lost,
        "one diverged": good + lost,
        "one record": good[:1],
        "one seed": good[:3] + wild,
        "no finite start": [
            Record(**{**vars(record), "validation": [(0, 0.0, math.nan), *record.validation[1:]]})
            for record in good
        ],
    }[case]
    figure = picture.draw(make_plan(), records, LIGHT)
    figure.savefig(tmp_path / "picture.png")
    for axes in figure.axes:
        assert all(
            math.isfinite(limit) and abs(limit) < 1e3 for limit in (*axes.get_ylim(), *axes.get_xlim())
        )


def limits(figure: Figure) -> tuple[float, float]:
    return figure.axes[0].get_ylim()


@pytest.mark.parametrize("bad", [math.nan, 1e30, 400.0])
def test_a_lost_trial_does_not_squash_the_others(bad: float) -> None:
    plan = make_plan()
    good = records_of("a", (2.0, 2.1, 2.2))
    lost = [make_record("b", 10.0**-power, bad, number=power) for power in range(3)]
    for draw in (validation, training, lr_search):
        low, high = limits(draw(plan, good, LIGHT))
        with_lost = limits(draw(plan, good + lost, LIGHT))
        assert with_lost[1] - with_lost[0] <= 1.5 * max(high - low, 3.0)


def test_the_untrained_level_is_in_the_picture() -> None:
    low, high = limits(validation(make_plan(), records_of("a", (2.0, 2.1, 2.2)), LIGHT))
    assert low < 2.0
    assert 5.0 < high < 6.0


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.mode)
def test_many_optimizers_all_look_different(theme: Theme) -> None:
    marks = [mark(theme, index) for index in range(25)]
    assert len(set(marks)) == 25


def luminance(color: str) -> float:
    channels = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.mode)
def test_text_and_lines_can_be_read_on_their_ground(theme: Theme) -> None:
    assert contrast(theme.ink, theme.ground) > 7
    assert contrast(theme.faint, theme.ground) > 4.5
    assert all(contrast(color, theme.ground) > 2 for color in theme.series)
