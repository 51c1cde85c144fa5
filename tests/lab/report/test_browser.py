"""The page in a real browser: at the widths of a laptop and a phone, in both themes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from browser import chromium, console, needs_chromium, open_page, requests
from steepest.lab.records import write_records
from steepest.lab.report import write_report
from steepest.lab.report.theme import PAGE, styles

from ..conftest import make_experiment
from .conftest import ALL, make_section

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("report")
    section = make_section(not_run={"soap": "it did not fit"})
    section.experiment.save(directory)
    write_records(directory, section.records)
    other = make_experiment(["an.unusually.long.module.name:Optimizer"], steps=300)
    other.save(directory / "other")
    return write_report(directory, directory / "other")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


def wait_until_drawn(browser: Any) -> int:
    return int(
        browser.execute_async_script(
            "const done = arguments[0];"
            "const look = () => {"
            "  const drawn = document.body.dataset.drawn; drawn ? done(drawn) : setTimeout(look, 20); };"
            "look();"
        )
    )


def open_report(browser: Any, report: Path, width: int, theme: str) -> None:
    open_page(browser, report.as_uri(), width, theme)
    wait_until_drawn(browser)


@pytest.mark.parametrize(("width", "theme"), [(1280, "light"), (390, "dark"), (1280, "dark"), (390, "light")])
def test_the_page_is_whole(browser: Any, report: Path, width: int, theme: str) -> None:
    open_report(browser, report, width, theme)
    look = browser.execute_script
    # Nothing is wider than the window, not even a single element.
    assert look("return document.documentElement.scrollWidth") == width
    cut = look(
        "return [...document.querySelectorAll('main *')].filter(e => !e.closest('.bar, details, svg') &&"
        " e.getClientRects().length && e.getBoundingClientRect().right > innerWidth + 1)"
        ".map(e => e.tagName + ' ' + e.textContent.slice(0, 30))"
    )
    assert cut == []
    assert look("return getComputedStyle(document.body).backgroundColor") == rgb(PAGE[theme]["background"])  # type: ignore[index]
    # Every chart has marks, in the colours of this theme, and text large enough to read.
    charts = look(
        "return [...document.querySelectorAll('.chart')]"
        ".map(c => c.querySelectorAll('svg .mark-symbol path, svg .mark-rect path').length)"
    )
    assert len(charts) == int(look("return document.body.dataset.drawn"))
    assert min(charts) > 0
    colour = getattr(styles([*ALL, "an.unusually.long.module.name:Optimizer"])["lion"], theme)
    assert look(f"return document.querySelectorAll('.chart svg path[fill=\"{colour}\"]').length") > 9
    smallest = look(
        "return Math.min(...[...document.querySelectorAll('.chart svg text, td, figcaption, li')]"
        ".filter(e => e.getClientRects().length).map(e => parseFloat(getComputedStyle(e).fontSize)"
        " * (e.ownerSVGElement ? Math.hypot(e.getScreenCTM().a, e.getScreenCTM().b) : 1)))"
    )
    assert smallest >= 11
    assert console(browser) == []
    asked = requests(browser)
    assert asked
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:", "chrome"))] == []


def test_a_table_of_many_columns_fits(browser: Any, tmp_path: Path) -> None:
    study = Path(__file__).parents[3] / "benchmarks" / "evidence" / "sasrec" / "comparison"
    open_report(browser, write_report(study, out=tmp_path / "report.html"), 1280, "light")
    look = browser.execute_script
    assert look("return document.querySelectorAll('table.wide thead th').length") == 14
    assert look("return document.documentElement.scrollWidth") == 1280
    assert (
        float(look("return parseFloat(getComputedStyle(document.querySelector('thead th')).fontSize)")) >= 11
    )


def test_the_table_sorts_and_a_click_singles_out_in_table_and_charts(browser: Any, report: Path) -> None:
    open_report(browser, report, 1280, "light")
    look = browser.execute_script
    names = "return [...document.querySelectorAll('tr[data-optimizer]')].map(r => r.dataset.optimizer)"
    assert look(names) == ["muon", "lion", "adamw", "signgsd"]
    header = (
        "[...document.querySelectorAll('thead th')].find(h => h.textContent === 'state B/param').click();"
    )
    assert look(header + names) == ["signgsd", "lion", "muon", "adamw"]
    assert look(header + names) == ["adamw", "muon", "lion", "signgsd"]
    faded = (
        "return [...document.querySelectorAll('#s0-frontier-0 path')]"
        ".filter(p => p.getAttribute('opacity') === '0.07').length"
    )
    assert look(faded) == 0
    browser.execute_async_script(
        "document.querySelector('tr[data-optimizer=lion]').click(); setTimeout(arguments[0], 300);"
    )
    assert look(faded) > 0
    assert (
        look("return document.querySelector('button[data-optimizer=lion]').getAttribute('aria-pressed')")
        == "true"
    )
    assert (
        look("return document.querySelectorAll('.chart.other').length") == 6
    )  # lion has two panels of its own


def test_the_button_changes_the_theme(browser: Any, report: Path) -> None:
    open_report(browser, report, 1280, "light")
    browser.execute_script("delete document.body.dataset.drawn; document.getElementById('theme').click();")
    wait_until_drawn(browser)
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert background == rgb(PAGE["dark"]["background"])
    colour = styles(ALL)["muon"].dark
    assert (
        browser.execute_script(f"return document.querySelectorAll('.chart path[fill=\"{colour}\"]').length")
        > 9
    )


def rgb(color: str) -> str:
    return f"rgb({', '.join(str(int(color[at : at + 2], 16)) for at in (1, 3, 5))})"
