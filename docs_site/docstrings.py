"""An extension of Griffe: the docstrings' reStructuredText becomes Markdown.

Directives and roles are Sphinx's (``.. math::``, ``:class:`Muon```), sections are Google's, examples are
doctests.
"""

import re
import textwrap
from typing import Any

import griffe
from documented import FOR_RULES, MODULES, ROOT, optimizer_pages, public_names
from equations import mathml

_log = griffe.get_logger("docstrings")
_MATH = re.compile(r"^( *)\.\. math::(?: (.+))?\n((?:\n*\1 {4}.*\n?)*)", re.MULTILINE)
_ROLE = re.compile(r":(class|func|meth|attr|mod|data|exc|math):`(~?)([^`]+)`")
_TABLE = re.compile(r"^( *)=[= ]+\n(?:.*\n)*?\1=[= ]+\n(?: *\n|(?!.*=)(?:.*\n)*?\1=[= ]+\n)?", re.MULTILINE)
_EXAMPLE = re.compile(r"^( *)>>> .*\n?(?:\1.*\S.*\n?)*(?:\n\1>>> .*\n?(?:\1.*\S.*\n?)*)*", re.MULTILINE)


class Markdown(griffe.Extension):
    """Rewrites every docstring of the package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Rewrite the docstrings in place."""
        documented = _documented(pkg)
        for each in list(_walk(pkg)):
            if each.is_class:
                _show_methods_of_modules(each)
        for each in _walk(pkg):
            if each.docstring is not None:
                each.docstring.value = _markdown(each.docstring.value, each, documented)
        _show_functions_for_modules(pkg)


def _walk(each: griffe.Object) -> Any:
    yield each
    for member in each.members.values():
        if not member.is_alias:
            yield from _walk(member)


def _show_functions_for_modules(pkg: griffe.Module) -> None:
    """Let public names lead to the functions where Griffe's lead to the modules of these names."""
    names = [(module, name) for module in MODULES for name in public_names(module)]
    found = [
        (_within(pkg, module), name, _within(pkg, _definition(pkg, f"{module}.{name}")))
        for module, name in names
    ]
    for module, name, thing in found:
        if module.members[name].is_alias:
            module.members[name].target = thing
    for module, name, thing in found:  # last, since it hides what else the module defines
        if thing.is_function and module.members[name].is_module:
            module.members[name] = _copy_of(thing, module)


def _within(pkg: griffe.Module, path: str) -> Any:
    _, _, rest = path.partition(".")
    return pkg[rest] if rest else pkg


def _show_methods_of_modules(cls: griffe.Class) -> None:
    """Show ``name = module.function`` in a class as the method that it is."""
    for name, member in list(cls.members.items()):
        if member.is_attribute and isinstance(member.value, griffe.ExprAttribute) and not member.docstring:
            try:
                function = cls.modules_collection[member.value.canonical_path]
            except KeyError:
                continue
            if function.is_function:
                cls.set_member(name, _copy_of(function, cls))


def _copy_of(function: griffe.Function, parent: griffe.Class | griffe.Module) -> griffe.Function:
    copied = griffe.Function(
        function.name,
        lineno=function.lineno,
        endlineno=function.endlineno,
        parameters=function.parameters,
        returns=function.returns,
        parent=parent,
    )
    if function.docstring is not None:
        copied.docstring = griffe.Docstring(
            function.docstring.value,
            lineno=function.docstring.lineno,
            endlineno=function.docstring.endlineno,
            parser=function.docstring.parser,
            parser_options=function.docstring.parser_options,
            parent=copied,
        )
    return copied


def _documented(pkg: griffe.Module) -> dict[str, str]:
    """Return the identifier under which the site has an object, by the path where it is defined."""
    names = [f"{module}.{name}" for module in reversed(MODULES) for name in public_names(module)]
    names += [*MODULES[1:], *FOR_RULES, *(page.identifier for page in optimizer_pages())]
    return {_definition(pkg, name): name for name in names}


def _definition(pkg: griffe.Module, path: str) -> str:
    """Follow imports to where a name is defined."""
    each: Any = pkg
    parts = path.split(".")[1:]
    for at, part in enumerate(parts):
        each = each.members[part]
        if each.is_alias:
            return _definition(pkg, ".".join([each.target_path, *parts[at + 1 :]]))
    if each.is_module and each.parent is not None and each.name in each.parent.imports:
        # A package's import hides the module of the same name, but Griffe keeps the module.
        return str(each.parent.imports[each.name])
    return str(each.path)


def _markdown(text: str, each: griffe.Object, documented: dict[str, str]) -> str:
    text = re.sub(r"^( *)(State|Source): ", r"\1**\2**: ", text, flags=re.MULTILINE)
    # Docstrings stand on pages one level below the pages that they name.
    text = re.sub(r"`?docs/(\w+)\.md`?", lambda match: f"[{_title(match[1])}](../{match[1]}.md)", text)
    text = _nested_lists(text)
    text = _TABLE.sub(lambda match: _fenced("text", match[0], match[1]), text)
    text = _EXAMPLE.sub(lambda match: _fenced("pycon", match[0], match[1]), text)
    text = _MATH.sub(lambda m: _fenced("math", (m[2] or "") + textwrap.dedent(m[3]), m[1]), text)
    return _ROLE.sub(lambda match: _reference(match, each, documented), text)


def _title(page: str) -> str:
    first = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("# ")


def _nested_lists(text: str) -> str:
    """Indent lists within lists by four spaces, and end them with an empty line, as Python-Markdown needs."""
    text = re.sub(r"^ {2}(?=- )", "    ", text, flags=re.MULTILINE)
    return re.sub(r"^( {4,}\S.*\n)(?=- )", r"\1\n", text, flags=re.MULTILINE)


def _fenced(language: str, body: str, indent: str) -> str:
    lines = textwrap.dedent(body).strip("\n")
    return textwrap.indent(f"\n```{language}\n{lines}\n```\n\n", indent)


def _reference(match: re.Match[str], each: griffe.Object, documented: dict[str, str]) -> str:
    role, short, target = match.groups()
    if role == "math":
        return mathml(target, display=False)
    text = target.rpartition(".")[2] if short else target
    path = _find(target, each)
    if path is None:
        _log.warning("%s: no %s", each.path, match[0])
        return f"`{text}`"
    owner, _, member = path.rpartition(".")
    for known, rest in ((path, ""), (owner, f".{member}")):
        if known in documented and not member.startswith("_"):
            return f"[`{text}`][{documented[known]}{rest}]"
    return f"`{text}`"


def _find(target: str, each: griffe.Object) -> str | None:
    """Return where an object is defined that a docstring names: absolutely, or from within its scope."""
    absolute = target.startswith("steepest.")
    for path in [target] if absolute else [f"{scope}.{target}" for scope in _scopes(each)]:
        try:
            return _definition(each.package, path)
        except KeyError:
            continue
    return None


def _scopes(each: griffe.Object) -> list[str]:
    """Return the paths in which a name is looked for: a class and its bases, the module, the package."""
    scopes, at = [], each
    while at is not None:
        scopes.append(at.path)
        if at.is_class:
            scopes += [base.canonical_path for base in at.bases if isinstance(base, griffe.Expr)]
        at = at.parent
    return scopes
