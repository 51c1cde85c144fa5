"""The table of defaults in docs/learning_rates.md says what the constructors do."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import steepest
from loops import for_each

PAGE = Path(__file__).parents[2] / "docs" / "learning_rates.md"


def rows() -> dict[str, tuple[float, float, str]]:
    """Return the learning rate, weight decay and third column of the table, by rule."""
    section = PAGE.read_text().split("## Where the defaults come from")[1].split("\n## ")[0]
    found: dict[str, tuple[float, float, str]] = {}
    for line in section.splitlines():
        if not line.startswith("| `"):
            continue
        names, rates, memory, _ = (cell.strip() for cell in line.strip("|").split(" | "))
        labels = re.findall(r"`(\w+)`", names)
        pairs = [tuple(map(float, pair.split(", "))) for pair in rates.split("; ")]
        memories = memory.split("; ")
        for i, label in enumerate(labels):
            lr, decay = pairs[min(i, len(pairs) - 1)]
            found[label] = (lr, decay, memories[min(i, len(memories) - 1)])
    return found


def test_every_rule_is_in_the_table() -> None:
    missing = set(steepest.list_optimizers()) - set(rows())
    assert missing == {"orthogonalized"}, "the base class, without a matrix function, is the only one to miss"


@for_each("rule", sorted(rows()))
def test_the_row_is_what_the_constructor_takes(rule: str) -> None:
    lr, decay, memory = rows()[rule]
    defaults = steepest.create(rule, [torch.nn.Parameter(torch.ones(2, 2))]).defaults
    assert (defaults["lr"], defaults["weight_decay"]) == (lr, decay)
    if rule.startswith("simba"):
        numbers = (
            [defaults["leak"]] if rule == "simba_leaky" else [defaults["window_size"], defaults["threshold"]]
        )
    elif rule == "signgsd":
        numbers = []
    else:
        betas = defaults["betas"] if "betas" in defaults else [defaults["momentum"]]
        numbers = list(betas)
    assert [float(number) for number in re.findall(r"[\d.]+", memory)] == [float(n) for n in numbers]
