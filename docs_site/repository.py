"""A hook of MkDocs: links to files outside of docs/ lead to pages made from these files.

The pages read the same in a checkout, where such a link leads to the file itself, and no address of a
repository is needed. A linked Markdown file becomes a page, and what it links as well; source code a page
with the code; a directory a list of its modules.
"""

import ast
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
_FENCE = re.compile(r"(^ *```.*?^ *```\s*?$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
_LANGUAGES = {".py": "python", ".toml": "toml", "": "text", ".txt": "text"}
_made: dict[str, str] = {}  # path in the repository -> path in the site


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Make the pages of all linked files, and of those that the navigation names.

    A file that does not exist gets none: MkDocs then reports the link.
    """
    _made.clear()
    waiting = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    waiting += re.findall(r"repository/([\w./-]+)", str(config.nav))
    seen: set[str] = set()
    while waiting:
        path = waiting.pop()
        if path in seen or not (path.startswith("docs/") or (ROOT / path).exists()):
            continue
        seen.add(path)
        if not path.startswith("docs/"):
            files.append(_page(path, config))
        if path.endswith(".md"):
            linked = targets(_text(path, files), path)
            waiting += [target for target in linked if not target.startswith("docs/")]
    return files


def _text(path: str, files: Files) -> str:
    """Return a page's Markdown: a file's, or what another hook has generated."""
    if path.startswith("docs/") and (file := files.get_file_from_path(path.removeprefix("docs/"))):
        return file.content_string
    return (ROOT / path).read_text(encoding="utf-8")


def targets(text: str, path: str) -> list[str]:
    """Return what a page links, as paths in the repository."""
    parts = _FENCE.split(text)[::2]
    links = [match[2] for part in parts for match in _LINK.finditer(part)]
    return [_resolve(path, link) for link in links if "://" not in link]


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point a page's links at the pages of the files."""
    here = page.file.src_uri
    own = next((path for path, uri in _made.items() if uri == here), f"docs/{here}")

    def new(target: str) -> str:
        path = _resolve(own, target)
        uri = path.removeprefix("docs/") if path.startswith("docs/") else _made.get(path)
        if uri is None:
            return target
        return posixpath.relpath(uri, posixpath.dirname(here) or ".")

    return _relink(markdown, new)


def _relink(text: str, new: Callable[[str], str]) -> str:
    def replace(match: re.Match[str]) -> str:
        return match[0] if "://" in match[2] else f"{match[1]}{new(match[2])}{match[3]}"

    parts = _FENCE.split(text)
    return "".join(part if at % 2 else _LINK.sub(replace, part) for at, part in enumerate(parts))


def _resolve(path: str, target: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), target))


def _page(path: str, config: MkDocsConfig) -> File:
    source = ROOT / path
    if path.endswith(".md"):
        uri, content = f"repository/{path}", source.read_text(encoding="utf-8")
    elif source.is_dir():
        uri, content = f"repository/{path}.md", f"# `{path}/`\n\n{_modules(source)}"
    elif source.suffix in _LANGUAGES:
        language, text = _LANGUAGES[source.suffix], source.read_text(encoding="utf-8")
        uri = f"repository/{path}.md"
        content = f"---\nsearch:\n  exclude: true\n---\n# `{path}`\n\n`````{language}\n{text}`````\n"
    else:
        _made[path] = f"repository/{path}"
        return File.generated(config, _made[path], abs_src_path=str(source))
    _made[path] = uri
    return File.generated(config, uri, content=content)


def _modules(directory: Path) -> str:
    """List the modules of a directory with the first line of each docstring."""
    rows = ["| file | |", "| --- | --- |"]
    for file in sorted(directory.glob("*.py")):
        doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        rows.append(f"| `{file.name}` | {doc.partition(chr(10))[0]} |")
    return "\n".join(rows) + "\n"
