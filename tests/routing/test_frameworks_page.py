"""The page on frameworks runs, and its names exist."""

import re
from pathlib import Path

import steepest

PAGE = Path(__file__).parents[2] / "docs" / "frameworks.md"


def test_its_code_runs():
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, PAGE.name, "exec"), names)
    assert [group["name"] for group in names["optimizer"].param_groups] == [
        "muon",
        "adamw, no decay",
        "adamw",
    ]


def test_its_names_exist():
    named = set(re.findall(r"steepest\.(\w+)", PAGE.read_text(encoding="utf-8")))
    assert {"Auto", "Recipe", "param_groups", "build"} <= named
    assert all(hasattr(steepest, name) for name in named)
