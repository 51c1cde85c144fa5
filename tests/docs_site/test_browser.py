"""The site in a real browser: every page on a phone, in both themes, and the search."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from browser import chromium, console, needs_chromium, open_page, requests

pytestmark = needs_chromium


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


def outside(browser: Any, address: str) -> list[str]:
    asked = requests(browser)
    assert asked
    return [url for url in asked if not url.startswith((address, "data:", "blob:", "chrome"))]


def test_every_page_fits_a_phone_and_asks_for_nothing_elsewhere(
    browser: Any, site: Path, address: str
) -> None:
    pages = sorted(str(page.relative_to(site)) for page in site.rglob("*.html"))
    # Those of source files look alike.
    sources = [page for page in pages if page.endswith(".py.html")]
    pages = [page for page in pages if page not in sources[1:]]
    assert len(pages) > 40
    for at, page in enumerate(pages):
        open_page(browser, address + page, 390, "dark" if at % 2 else "light")
        assert browser.execute_script("return document.documentElement.scrollWidth") == 390, page
        wide = browser.execute_script(
            "return [...document.querySelectorAll('article *')].filter(e => e.getClientRects().length &&"
            " !e.closest('pre, .equation, picture img, .md-typeset__scrollwrap, .md-typeset__table') &&"
            " !e.closest('code, math') &&"
            " e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
        )
        assert wide == [], page
        assert console(browser) == [], page
        assert outside(browser, address) == [], page


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_page_is_drawn_in_the_theme_with_its_equations(browser: Any, address: str, theme: str) -> None:
    look, page = browser.execute_script, address + "optimizers/simba.html"
    open_page(browser, page, 1280, theme)
    look("localStorage.clear();")  # of the theme that was seen last
    open_page(browser, page, 1280, theme)
    scheme = {"light": "default", "dark": "slate"}[theme]
    browser.execute_async_script(
        "const look = () => document.body.dataset.mdColorScheme === arguments[0] ? arguments[1]() :"
        " setTimeout(look, 20); look();",
        scheme,
    )
    height = look("return document.querySelector('.equation math').getBoundingClientRect().height")
    assert height > 30  # two cases, one above the other
    assert console(browser) == []


def test_the_search_finds_an_optimizer(browser: Any, address: str) -> None:
    open_page(browser, address + "index.html", 1280, "light")
    found = browser.execute_async_script(
        "const done = arguments[0], input = document.querySelector('.md-search__input');"
        "input.focus(); input.value = 'Procrustes'; input.dispatchEvent(new Event('keyup', {bubbles: true}));"
        "const look = () => {"
        "  const links = [...document.querySelectorAll('.md-search-result__link')].map(a => a.href);"
        "  links.length ? done(links) : setTimeout(look, 50); };"
        "look();"
    )
    assert any("optimizers/procrustes.html" in link for link in found)
    assert console(browser) == []
    assert outside(browser, address) == []
