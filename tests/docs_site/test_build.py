"""The site is whole, loads nothing from elsewhere, and its build refuses what leads nowhere."""

from __future__ import annotations

import io
import logging
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from .conftest import ROOT


class Loads(HTMLParser):
    """What a page loads by itself: scripts, styles, pictures, fonts."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "link" and given.get("rel") in {"canonical", "next", "prev"}:
            return
        if tag in {"script", "link", "img", "iframe", "source"}:
            self.addresses += [given[name] or "" for name in ("src", "href") if name in given]


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    seen = 0
    for page in site.rglob("*.html"):
        loads = Loads()
        loads.feed(page.read_text(encoding="utf-8"))
        seen += len(loads.addresses)
        assert [each for each in loads.addresses if "//" in each and not each.startswith("data:")] == [], page
    assert seen > 100
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(\s*[\"']?(https?:)?//", style.read_text(encoding="utf-8")), style


def test_every_page_of_docs_is_in_the_navigation(site: Path) -> None:
    start = (site / "index.html").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        address = "." if page.stem == "index" else f"{page.stem}.html"
        assert f'href="{address}"' in start or f'href="{page.stem}.html"' in start, page.name


def test_no_markup_of_the_sources_is_left(site: Path) -> None:
    for page in [*(site / "api").glob("*.html"), *(site / "optimizers").glob("*.html")]:
        text = re.sub(r"<pre>.*?</pre>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        article = text[text.index("<article") : text.index("</article>")]
        for rest in (
            ".. math",
            ":class:",
            ":func:",
            ":meth:",
            ":mod:",
            ":math:",
            "&gt;&gt;&gt;",
            "```",
            "][",
            ">docs/",
        ):
            assert rest not in article, (page.name, rest)


def test_a_page_of_docs_must_be_in_the_navigation() -> None:
    pytest.importorskip("mkdocs")
    from mkdocs.config import load_config

    assert load_config(str(ROOT / "mkdocs.yml")).validation.nav.omitted_files == logging.WARNING


class Links(HTMLParser):
    """A page's links, and the anchors that others may link."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = {""}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors.add(given.get("id") or given.get("name") or "")
        if tag == "a" and given.get("href"):
            self.links.append(str(given["href"]))


def test_every_link_within_the_site_leads_somewhere(site: Path) -> None:
    pages: dict[Path, Links] = {}
    for page in site.rglob("*.html"):
        pages[page.resolve()] = Links()
        pages[page.resolve()].feed(page.read_text(encoding="utf-8"))
    seen = 0
    for page, read in pages.items():
        if page.name == "404.html":  # its links start from the root of a server
            continue
        for link in read.links:
            if "://" in link or link.startswith("mailto:"):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / unquote(path)).resolve() if path else page
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), (page.name, link)
            if target in pages and not anchor.startswith("__"):
                assert unquote(anchor) in pages[target].anchors, (page.name, link)
            seen += 1
    assert seen > 2000


def test_links_to_files_of_the_repository_lead_to_their_pages(site: Path) -> None:
    page = (site / "bench.html").read_text(encoding="utf-8")
    assert 'href="repository/benchmarks/RESULTS.html"' in page
    assert 'href="repository/benchmarks/steps/sections.html"' in page
    text = (site / "repository" / "benchmarks" / "steps" / "sections.html").read_text(encoding="utf-8")
    assert "<code>host_overhead.py</code>" in text or ".py</code>" in text
    code = (site / "repository" / "examples" / "fsdp2.py.html").read_text(encoding="utf-8")
    assert "fully_shard" in re.sub("<[^>]+>", "", code)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("[a](missing.md)", "'missing.md'"),
        ("[a](../tests/no_such_test.py)", "no_such_test.py"),
        ("[a](#no-such-heading)", "'#no-such-heading'"),
        ("[a](other.md#no-such-heading)", "'other.md#no-such-heading'"),
        ("[a][steepest.nothing]", "steepest.nothing"),
    ],
)
def test_what_leads_nowhere_fails(
    line: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mkdocs")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    from mkdocs.exceptions import Abort

    monkeypatch.chdir(ROOT)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "site.css").write_text("")
    (tmp_path / "docs" / "other.md").write_text("# Other\n\n## A heading\n")
    good = "# Start\n\n[Other](other.md#a-heading), [a test](../tests/docs_site/test_build.py)\n\n"

    def run(text: str) -> None:
        (tmp_path / "docs" / "index.md").write_text(text)
        given: dict[str, Any] = {
            "docs_dir": str(tmp_path / "docs"),
            "site_dir": str(tmp_path / "site"),
            "hooks": ["docs_site/fences.py", "docs_site/repository.py"],
            "nav": [{"Start": "index.md"}, {"Other": "other.md"}],
            "plugins": ["autorefs"],
        }
        build(load_config(str(ROOT / "mkdocs.yml"), **given))

    run(good)
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger("mkdocs").addHandler(handler)
    try:
        with pytest.raises(Abort):
            run(good + line)
    finally:
        logging.getLogger("mkdocs").removeHandler(handler)
    assert told in said.getvalue()
