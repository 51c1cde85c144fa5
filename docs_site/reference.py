"""A hook of MkDocs: each optimizer's page, with its row of docs/optimizers/index.md, and those of the API."""

import posixpath
import re
from pathlib import Path
from typing import Any

from documented import FOR_RULES, MODULES, OptimizerPage, optimizer_pages, public_names
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the pages that are made here to the navigation."""
    pages = {
        "Optimizers": [{page.title: _uri(page)} for page in optimizer_pages()],
        "API": [{name: f"api/{name}.md"} for name in (*MODULES, "steepest.rule")],
    }
    for entry in config.nav or []:
        for title in pages.keys() & entry.keys():
            entry[title] = [entry[title], *pages[title]]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Make the pages."""
    optimizers = optimizer_pages()
    texts = {_uri(page): _optimizer(page) for page in optimizers}
    texts["api/index.md"] = _modules()
    texts["api/steepest.rule.md"] = _for_rules()
    own_page = {page.identifier for page in optimizers}
    texts |= {f"api/{module}.md": _module(module, own_page) for module in MODULES}
    for uri, text in texts.items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Link the names in the table of optimizers, whose pages a checkout does not have."""
    if page.file.src_uri == "optimizers/index.md":
        for each in optimizer_pages():
            address = posixpath.basename(_uri(each))
            markdown = markdown.replace(f"| `{each.name}` |", f"| [`{each.name}`]({address}) |")
    return markdown


def _uri(page: OptimizerPage) -> str:
    return f"optimizers/{(page.name or page.title).lower()}.md"


def _rows() -> dict[str, list[str]]:
    """Return the cells of the table of optimizers by name."""
    text = (ROOT / "docs" / "optimizers" / "index.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| (`\w+`.*) \|$", text, re.MULTILINE)
    split = [[cell.strip() for cell in line.split(" | ")] for line in lines]
    return {cells[0].strip("`"): cells[1:] for cells in split if len(cells) == 4}


def _optimizer(page: OptimizerPage) -> str:
    lines = [f"# {page.title}", ""]
    if page.name:
        state, purpose, lr = _rows()[page.name]
        lines += [
            "| name | state, bytes per float32 parameter | what it is for | default lr |",
            "| --- | --- | --- | --- |",
            f"| `{page.name}` | {state} | {purpose} | {lr} |",
            "",
        ]
    lines += [f"The code: [`{page.source}`](../../{page.source}).", "", f"::: {page.identifier}", ""]
    return "\n".join(lines)


def _modules() -> str:
    lines = ["# API", "", "Every public name, by module.", ""]
    for module in MODULES:
        names = ", ".join(f"[`{name}`][{_entry(module, name)}]" for name in _sorted(public_names(module)))
        lines += [f"## [{module}]({module}.md)", "", names, ""]
    names = ", ".join(f"[`{each.removeprefix('steepest.')}`][{each}]" for each in FOR_RULES)
    lines += ["## [steepest.rule](steepest.rule.md)", "", f"To add a rule: {names}", ""]
    return "\n".join(lines)


def _entry(module: str, name: str) -> str:
    """Return the identifier under which a name is described: that of ``steepest`` if it exports it, too."""
    return f"steepest.{name}" if name in public_names("steepest") else f"{module}.{name}"


def _sorted(names: list[str]) -> list[str]:
    """Functions and modules first, then classes and constants."""
    return sorted(names, key=lambda name: (name[0].isupper(), name.casefold()))


def _module(module: str, own_page: set[str]) -> str:
    """Document what has no page of its own; link what has one, and what ``steepest`` exports, too."""
    lines = [f"::: {module}", "    options:", "      heading_level: 1", "      members: false", ""]
    names = _sorted(public_names(module))
    elsewhere = [each for name in names if (each := f"{module}.{name}") in own_page or each in MODULES]
    if elsewhere:
        lines += ["With pages of their own: " + ", ".join(f"[{each}][]" for each in elsewhere) + ".", ""]
    shared = set(public_names("steepest")) if module != "steepest" else set()
    for name in names:
        identifier = f"{module}.{name}"
        if name in shared:
            lines += [
                f"## {identifier} {{ #{identifier} }}",
                "",
                f"The same as [steepest.{name}][].",
                "",
            ]
        elif identifier not in elsewhere:
            lines += [f"::: {identifier}", ""]
    return "\n".join(lines)


def _for_rules() -> str:
    lines = ["# steepest.rule", "", "What a [rule of your own](../adding-a-rule.md) is made of, "]
    lines += ["besides [`steepest.Rule`][].", ""]
    for identifier in FOR_RULES:
        lines += [f"::: {identifier}", ""]
    return "\n".join(lines)
