"""The translations are what the sweep's file and the page say, and other rules take what they return."""

import json
import math
import warnings
from pathlib import Path
from statistics import fmean

import pytest
from torch import nn

import steepest
from loops import for_each
from pages import run_python
from steepest.learning_rates import TRANSLATIONS

ROOT = Path(__file__).parents[2]
ROWS = [json.loads(line) for line in (ROOT / "benchmarks" / "learning_rates.jsonl").read_text().splitlines()]
PAGE = (ROOT / "docs" / "learning_rates.md").read_text(encoding="utf-8")
# A rule that has not been swept may have a paper's translation, or none, which is no fault.
RULES = sorted({each.to for each in TRANSLATIONS if each.source.startswith("sweep: ")})
MATRIX_RULES = ("hyperball", "muon", "normuon", "polargrad", "scion")


def best(task, rule, kind):
    """The learning rate of the lowest mean among those with the most seeds, and its neighbours' too."""
    scores = {}
    for row in ROWS:
        if (row["task"], row["rule"], row["kind"]) == (task, rule, kind):
            scores.setdefault(row["lr"], []).append(math.inf if row["metric"] is None else row["metric"])
    most = max(map(len, scores.values()))
    means = {lr: fmean(each) for lr, each in sorted(scores.items()) if len(each) == most}
    return min(means, key=means.get), means


def swept(rule, task):
    return best(task, rule, "alone" if rule in MATRIX_RULES else "together")[0]


@for_each("task", ["text", "digits"])
@for_each("rule", RULES)
def test_the_table_is_what_was_swept(rule, task):
    (row,) = [each for each in TRANSLATIONS if (each.to, each.source) == (rule, f"sweep: {task}")]
    adamw = swept("adamw", task)
    assert row.lr == float(f"{swept(rule, task) / adamw:.2g}")
    assert row.valid == pytest.approx((adamw / 10**0.5, adamw * 10**0.5), rel=0.02)
    if row.weight_decay is not None:
        assert row.lr * row.weight_decay == pytest.approx(1)


@for_each("task", ["text", "digits"])
@for_each("rule", RULES)
def test_the_best_learning_rate_lies_between_worse_ones(rule, task):
    lr, means = best(task, rule, "alone" if rule in MATRIX_RULES else "together")
    assert min(means) < lr < max(means)


def test_the_page_has_the_same_table():
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE[: PAGE.index("\nSources:\n")].splitlines()
        if line.startswith("| `") and "](#" not in line
    ]
    assert [[*cell[:3], cell[4]] for cell in cells] == [
        [
            f"`{each.to}`",
            f"{each.lr:g}",
            "its own" if each.weight_decay is None else f"{each.weight_decay:.2g}",
            f"{each.valid[0]:g} to {each.valid[1]:g}",
        ]
        for each in TRANSLATIONS
        if each.to != "adamw"
    ]
    for each in TRANSLATIONS:
        assert each.source in PAGE


def test_the_page_says_what_was_suggested_and_what_was_missed():
    hits = []
    for rule in RULES:
        expected = []
        for task in ("text", "digits"):
            optimum = best(task, rule, "together")[0]
            rows = [r for r in ROWS if (r["kind"], r["task"], r["rule"]) == ("suggest", task, rule)]
            lrs = [row["lr"] for row in sorted(rows, key=lambda row: row["seed"])]
            ratios = [lr / optimum for lr in lrs]
            hits += [1 / 3 <= ratio <= 3 for ratio in ratios]
            shown = [f"{ratio:.2f}" if 1 / 3 <= ratio <= 3 else f"**{ratio:.2f}**" for ratio in ratios]
            expected += [f"{optimum:g}", ", ".join(f"{lr:.2g}" for lr in lrs), ", ".join(shown)]
        assert f"| `{rule}` | {' | '.join(expected)} |" in PAGE
    assert f"{sum(hits)} of {len(hits)} are" in PAGE


def test_the_pages_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_python("docs/learning_rates.md")
    printed = capsys.readouterr().out
    assert "sgd momentum=0.9" in printed
    assert "learning rate" in printed
    assert (tmp_path / "lr.png").exists()


@for_each("rule", RULES)
def test_create_and_build_take_the_options(rule):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        options = steepest.from_adamw(1.8e-3, 0.1, to=rule)
    (row,) = [each for each in TRANSLATIONS if (each.to, each.source) == (rule, "sweep: text")]
    created = steepest.create(rule, [model[1].weight], **options).param_groups[0]
    assert (created["rule"], created["lr"]) == (rule, pytest.approx(1.8e-3 * row.lr))
    if row.weight_decay is None:
        assert created["weight_decay"] == {"hyperball": 0.0, "scion": 1.0}[rule]
    else:
        assert created["lr"] * created["weight_decay"] == pytest.approx(1.8e-4)
        assert created["weight_decay_method"] == "decoupled"
    fallback = {"rule": "adamw", "lr": 1.8e-3, "weight_decay": 0.1}
    groups = {
        group["rule"]: group
        for group in steepest.build(model, rule, fallback=fallback, **options).param_groups
    }
    assert groups[rule]["lr"] == created["lr"]
    assert rule not in MATRIX_RULES or groups["adamw"]["lr"] == 1.8e-3


def test_adamw_is_translated_to_itself():
    options = steepest.from_adamw(2e-3, 0.3, to="AdamW")
    assert options == {"lr": 2e-3, "weight_decay": pytest.approx(0.3), "betas": (0.9, 0.999)}


def test_papers_speak_below_the_sweep():
    lion = steepest.from_adamw(3e-4, 0.1, to="lion")
    assert (lion["lr"], lion["weight_decay"]) == (pytest.approx(6e-5), pytest.approx(0.5))
    muon = steepest.from_adamw(3e-4, 0.1, to="muon")
    assert (muon["lr"], muon["weight_decay"], muon["scale"]) == (3e-4, 0.1, "match_rms_adamw")


def test_adam_mini_takes_adamw_s_values():
    options = steepest.from_adamw(3e-4, 0.1, to="Adam-mini")
    assert options == {"lr": 3e-4, "weight_decay": 0.1}
    (weight,) = nn.Linear(4, 4, bias=False).parameters()
    group = steepest.create("adam_mini", [weight], **options).param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (3e-4, 0.1)
    assert group["weight_decay_method"] == steepest.AdamW([weight]).param_groups[0]["weight_decay_method"]


@pytest.mark.parametrize("rule", [*steepest.list_optimizers(), "ternary_flip"])
def test_a_rule_has_a_translation_or_a_reason_why_it_has_none(rule):
    reasons = {
        "orthogonalized": r"your orthogonalize\(\) or scaled_orthogonalize_fn",
        "ternary_flip": "no learning rate; its threshold",
    }
    if rule in reasons:
        with pytest.raises(ValueError, match=f"no translation to '{rule}': .*{reasons[rule]}"):
            steepest.from_adamw(1e-3, to=rule)
    elif rule in {each.to for each in TRANSLATIONS}:
        weight = nn.Parameter(nn.Linear(4, 4).weight.detach())
        steepest.create(rule, [weight], **steepest.from_adamw(1e-3, to=rule))
    else:
        with pytest.raises(ValueError, match=f"no translation to '{rule}': nobody has measured one"):
            steepest.from_adamw(1e-3, to=rule)


@pytest.mark.parametrize(
    ("lr", "source"), [(1e-4, "text"), (9e-3, "text"), (1.2e-2, "digits"), (0.5, "digits")]
)
def test_beyond_the_sweep_there_is_a_warning_and_the_nearest_row(lr, source):
    (row,) = [each for each in TRANSLATIONS if (each.to, each.source) == ("soap", f"sweep: {source}")]
    with pytest.warns(UserWarning, match=f"no source covers 'soap' at AdamW's lr={lr:g}.*sweep: {source}"):
        assert steepest.from_adamw(lr, to="soap")["lr"] == pytest.approx(lr * row.lr)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"lr": 1e-3, "to": "loin"}, "did you mean 'lion'"),
        ({"lr": 0.0, "to": "lion"}, "lr must be a finite number > 0"),
        ({"lr": 1e-3, "weight_decay": -1.0, "to": "lion"}, "weight_decay must be a finite number ≥ 0"),
    ],
)
def test_errors(given, words):
    with pytest.raises(ValueError, match=words):
        steepest.from_adamw(**given)
