"""The commands that the pages name exist, with the options that they are given, and the lab's page runs."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from loops import for_each
from pages import run_python
from steepest.lab.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
STEEPEST = typer.main.get_command(app)
# Typer brings its own click, or depends on it, by its version.
UsageError = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "UsageError")


def commands(text: str, program: str) -> list[str]:
    """Return the command lines of a page that start with a program, in blocks and within sentences."""
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    stripped = (re.sub(r"^(\$ |([A-Z_]+=\S+ ))+", "", line) for line in lines)
    return [line for line in stripped if re.match(rf"{program}(\s|$)", line)]


def check(line: str) -> None:
    """Raise ``UsageError`` if there is no such command, or it has no such option."""
    words = shlex.split(line.replace("\\|", "|"), comments=True)[1:]
    words = [word for word in words if word != "--help"]
    for name in words[1].split("|") if words[:1] == ["study"] and len(words) > 1 else [""]:
        rest = [words[0], name, *words[2:]] if name else [*words]
        command, context = STEEPEST, typer.Context(STEEPEST)
        while rest and hasattr(command, "commands") and not rest[0].startswith("-"):
            label, command, _ = command.resolve_command(context, rest)
            rest, context = rest[1:], typer.Context(command, parent=context, info_name=label)
        if any(word.startswith("[") for word in rest):  # optional words: their options alone are looked at
            known = {each for option in command.params for each in (*option.opts, *option.secondary_opts)}
            for word in rest:
                if (bare := word.strip("[]")).startswith("--") and bare not in known:
                    raise UsageError(f"no such option: {bare}")
        elif not hasattr(command, "commands"):
            # A page may name a command without the arguments that it needs.
            command.make_context(context.info_name, rest, resilient_parsing=not rest)


@for_each("page", PAGES)
def test_its_commands_exist(page: Path) -> None:
    for line in commands(page.read_text(encoding="utf-8"), "steepest"):
        try:
            check(line)
        except UsageError as error:
            pytest.fail(f"{line}: {error.format_message()}")


def test_the_pages_name_every_command() -> None:
    lines = [line for page in PAGES for line in commands(page.read_text(encoding="utf-8"), "steepest")]
    named = {line.split()[1] for line in lines if " " in line}
    assert named >= set(STEEPEST.commands)


@pytest.mark.parametrize(
    "line",
    [
        "steepest walk",
        "steepest race --fast",
        "steepest race --steps many",
        "steepest study sasrec|rnn",
        "steepest study horizon [--size 3]",
    ],
)
def test_a_command_that_does_not_exist_is_seen(line: str) -> None:
    assert commands(f"As `{line}` shows.", "steepest") == [line]
    with pytest.raises(UsageError):
        check(line)


def test_the_benchmarks_that_the_pages_name_exist_with_their_options() -> None:
    seen = 0
    for page in (*PAGES, ROOT / "benchmarks" / "RESULTS.md"):
        text = page.read_text(encoding="utf-8")
        for line in commands(text, "python"):
            words = shlex.split(line, comments=True)[1:]
            steps = words[:2] == ["-m", "benchmarks.steps"]
            file = ROOT / ("benchmarks/steps/__main__.py" if steps else words[0])
            if not steps and not words[0].startswith(("benchmarks/", "examples/")):
                continue
            source, seen = file.read_text(encoding="utf-8"), seen + 1
            for word in words:
                # Switches such as --no-peers are made in a loop.
                forms = (f'"{word}"', f'"{word.removeprefix("--no-")}"')
                if word.startswith("--"):
                    assert any(form in source for form in forms), f"{page.name}: {line}"
    assert seen > 10


def test_the_python_of_the_labs_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_python("docs/lab.md", shorter={"steps=500": "steps=2", "trials=8": "trials=1"})
    assert (tmp_path / "runs" / "sine" / "report.html").exists()
    assert {row.optimizer for row in names["rows"]} == {"adamw", "lion"}
