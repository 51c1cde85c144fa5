"""What the page on learning rates and the optimizers say of the batch size is in the sweep's file."""

import re
from pathlib import Path

import pytest
from benchmarks.batch_size import BATCHES, FILE, SEARCHED, STEPS, task_of
from benchmarks.learning_rates import Sweeps, best, best_words, grid

from steepest.optimizer import OPTIMIZERS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "learning_rates.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("\n### Batch size\n")[2]
FOUND = Sweeps(FILE, STEPS, task_of)
# A rule that has not been swept says what it likes.
SWEPT = {
    task: [rule for rule in SEARCHED[task] if any(row["rule"] == rule for row in FOUND.rows)]
    for task in BATCHES
}


def scores(task, rule):
    return [FOUND.scores(f"{task}, {batch}", rule, "together") for batch in BATCHES[task]]


def ratio(task, rule):
    """The best learning rate with the largest batch over that with the smallest."""
    smallest, *_, largest = scores(task, rule)
    return f"{grid(best(largest)) / grid(best(smallest)):.2g}"


@pytest.mark.parametrize("task", BATCHES)
def test_the_tables_are_those_of_the_file(task):
    header = "| rule | " + " | ".join(f"{task}, batch of {batch}" for batch in BATCHES[task])
    lines = SECTION.partition(header)[2].partition("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[0].strip("`") for row in rows] == SWEPT[task]
    for row in rows:
        rule = row[0].strip("`")
        assert row[1:] == [*map(best_words, scores(task, rule)), ratio(task, rule)]


@pytest.mark.parametrize("task", BATCHES)
def test_every_best_rate_lies_between_worse_ones(task):
    for rule in SWEPT[task]:
        for found in scores(task, rule):
            k = best(found)
            seeds = len(found[k])
            assert seeds == (5 if task == "digits" else 3)
            assert len(found[k - 1]) == len(found[k + 1]) == seeds, (rule, task)


@pytest.mark.parametrize("rule", SWEPT["digits"])
def test_the_optimizers_say_what_was_measured(rule):
    advice = " ".join(OPTIMIZERS[rule].__doc__.partition("- batch size:")[2].partition("\n\n")[0].split())
    for task, words in {"digits": "16 times the batch", "text": "4 times the batch"}.items():
        if rule in SWEPT[task]:
            moved = ratio(task, rule)
            size = "the same" if moved == "1" else f"{moved} times as large"
            assert re.search(rf"{words}[^.;:]*? {re.escape(size)} on {task}", advice), (task, advice)
