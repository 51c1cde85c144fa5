"""The figures of docs/which-optimizer.md are those of the records beside the benchmarks."""

from __future__ import annotations

import math
import re
from pathlib import Path
from statistics import fmean, median

import pytest
from torch import nn

from steepest.lab import Experiment, ranking
from steepest.lab.analysis.ranking import Row
from steepest.lab.analysis.welch import welch
from steepest.lab.records import read_records
from steepest.lab.training.optimizers import resolve_optimizers

ROOT = Path(__file__).parents[2]
EVIDENCE = ROOT / "benchmarks" / "evidence"
PAGE = (ROOT / "docs" / "which-optimizer.md").read_text(encoding="utf-8")
HORIZONS = (500, 2000)


@pytest.fixture(scope="module")
def rows() -> dict[int, list[Row]]:
    return {steps: ranking(folder(steps)) for steps in HORIZONS}


def folder(steps: int) -> Path:
    return EVIDENCE / "text" / f"{steps}-steps"


def rows_of(heading: str) -> list[list[str]]:
    """Return the cells of the rows about optimizers in a section of the page."""
    section = re.split(rf"\n##+ {re.escape(heading)}\n", PAGE)[1].split("\n#")[0]
    lines = [line for line in section.splitlines() if re.match(r"\| `\w+`", line)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("steps", HORIZONS)
def test_the_table_has_the_records_figures(rows: dict[int, list[Row]], steps: int) -> None:
    by = {row.optimizer: row for row in rows[steps]}
    table = rows_of(f"{steps:,} steps")
    assert [cells[0] for cells in table] == [f"`{name}`" for name in by]
    defaults = Experiment.load(folder(steps)).optimizers
    for cells, row in zip(table, rows[steps], strict=True):
        _, state, tuned, untuned, lr, to_target, time = cells
        assert float(state) == pytest.approx(row.state_bytes, abs=0.5 if row.state_bytes > 10 else 0.06)
        assert tuned == f"{row.test.mean:.2f} ± {row.test.std:.2f}"
        assert untuned == f"{row.untuned.mean:.2f}"
        best, default = map(float, re.findall(r"[\d.]+", lr))
        assert best == pytest.approx(row.best["lr"], rel=0.05)
        assert default == defaults[row.optimizer].hyperparameters["lr"]
        reached = row.steps_to_target > 0
        assert to_target == (f"{100 * row.steps_to_target / steps:.0f} %" if reached else "–")
        ratio = row.seconds_to_target / by["adamw"].seconds_to_target
        assert time == (f"{100 * ratio:.0f} %" if reached else "–")


def test_what_the_text_says_of_500_steps_holds(rows: dict[int, list[Row]]) -> None:
    by = {row.optimizer: row for row in rows[500]}
    adamw = by["adamw"]
    assert [r.optimizer for r in rows[500] if r.untuned.mean < adamw.untuned.mean] == ["soap"]
    assert f"{adamw.untuned.mean - adamw.test.mean:.1f}" == "0.1"
    assert [row.optimizer for row in rows[500][:3] if row.tie] == ["procrustes", "quad", "soap"]
    assert not by["muon"].tie
    reached = [row for row in rows[500] if row.optimizer != "adamw" and row.steps_to_target > 0]
    assert [f"{row.decayed.mean:.2f}" for row in reached] == ["2.89", "2.84", "2.85", "2.89"]
    assert min(reached, key=lambda row: row.seconds_to_target).optimizer == "muon"
    costs = {row.optimizer: row.cost.optimizer_ms for row in rows[500] if row.cost}
    ratios = {name: round(costs[name] / costs["adamw"]) for name in ("muon", "procrustes", "quad", "soap")}
    assert ratios == {"muon": 4, "procrustes": 8, "quad": 7, "soap": 7}


def test_what_the_text_says_of_2000_steps_holds(rows: dict[int, list[Row]]) -> None:
    by = {steps: {row.optimizer: row for row in each} for steps, each in rows.items()}
    leads = {
        name: [f"{by[steps]['adamw'].test.mean - by[steps][name].test.mean:.2f}" for steps in HORIZONS]
        for name in ("muon", "quad")
    }
    assert leads == {"muon": ["0.36", "0.21"], "quad": ["0.41", "0.25"]}
    for name in ("muon", "quad"):
        short, long = (by[steps][name] for steps in HORIZONS)
        assert long.untuned.mean - long.test.mean < (short.untuned.mean - short.test.mean) / 2
    untuned = {name: row.untuned.mean - by[2000]["adamw"].untuned.mean for name, row in by[2000].items()}
    assert max(untuned[name] for name in ("muon", "quad", "signum")) < 0.005  # what the spread cannot tell
    assert min(untuned[name] for name in ("lion", "sgd_sai")) > 0.2
    edges = {name: row.edges.get("lr") for name, row in by[2000].items()}
    assert [edges[name] for name in ("muon", "quad", "adamw")] == ["lowest", "lowest", "highest"]
    tried = [
        record.searched["lr"] / by[500][record.optimizer].best["lr"]
        for record in read_records(folder(2000))
        if record.phase == "search"
    ]
    assert (f"{min(tried):.1f}", f"{max(tried):.2f}") == ("0.8", "1.15")
    behind = [f"{each['lion'].test.mean - each['signum'].test.mean:.1f}" for each in by.values()]
    assert behind == ["0.2", "0.3"]
    scores: dict[tuple[str, str], list[float]] = {}
    for record in read_records(folder(2000)):
        if record.test is not None:
            scores.setdefault((record.optimizer, record.phase), []).append(record.test["bits per byte"])
    assert welch(scores["signum", "default"], scores["adamw", "tuned"]) > 0.01
    assert welch(scores["quad", "tuned"], scores["muon", "tuned"]) < 0.01
    adamw = by[2000]["adamw"]
    assert f"{adamw.untuned.mean - adamw.test.mean:.2f}" == "0.06"
    assert all(each["signum"].untuned.mean < each["adamw"].untuned.mean + 0.04 for each in by.values())
    beaten = [name for name, row in by[2000].items() if row.untuned.mean < row.test.mean]
    assert beaten == ["signum", "sgd_sai"]


def test_the_table_of_the_larger_model_has_the_records_figures(rows: dict[int, list[Row]]) -> None:
    small = {row.optimizer: row for row in rows[500]}
    large = ranking(EVIDENCE / "text-1m")
    table = rows_of("A larger model: 1.3 M parameters, 500 steps")
    assert [cells[0] for cells in table] == [f"`{row.optimizer}`" for row in large]
    for cells, row in zip(table, large, strict=True):
        assert float(cells[1]) == pytest.approx(row.state_bytes, abs=0.06)
        assert cells[2] == f"{row.test.mean:.2f} ± {row.test.std:.2f}"
        assert cells[3] == f"{small[row.optimizer].test.mean:.2f}"
    means = {row.optimizer: row.test.mean for row in large}
    assert f"{means['adamw'] - means['muon']:.2f}" == "0.43"
    assert means["signum"] > small["signum"].test.mean - 0.05


@pytest.fixture(scope="module")
def digits() -> dict[str, dict[str, Row]]:
    models = ("convnet", "mlp")
    return {model: {row.optimizer: row for row in ranking(EVIDENCE / f"digits-{model}")} for model in models}


def test_the_table_of_digits_has_the_records_figures(digits: dict[str, dict[str, Row]]) -> None:
    table = rows_of("Evidence: digits")
    assert [cells[0] for cells in table] == [f"`{name}`" for name in digits["convnet"]]
    for cells in table:
        convnet, mlp = (digits[model][cells[0].strip("`")] for model in ("convnet", "mlp"))
        assert float(cells[1]) == pytest.approx(
            convnet.state_bytes, abs=0.5 if convnet.state_bytes > 10 else 0.06
        )
        for (tuned, untuned), row in zip((cells[2:4], cells[4:6]), (convnet, mlp), strict=True):
            assert tuned == f"{row.test.mean:.3f} ± {row.test.std:.3f}"
            assert untuned == f"{row.untuned.mean:.2f}"


def test_what_the_text_says_of_digits_holds(digits: dict[str, dict[str, Row]]) -> None:
    for by in digits.values():
        assert next(iter(by.values())).wins
        assert next(iter(by)) == "soap"
        adamw, sai = by["adamw"], by["sgd_sai"]
        assert sai.untuned.mean < adamw.untuned.mean
        assert welch(sai.untuned.values, adamw.untuned.values) < 0.01
        assert welch(sai.untuned.values, adamw.test.values) > 0.01
        assert all(by[name].untuned.mean > 0.5 for name in ("muon", "quad", "procrustes", "lion", "simba"))
        assert by["sgd"].best["lr"] < 0.017
    soap = digits["convnet"]["soap"]
    assert welch(soap.untuned.values, soap.test.values) > 0.01


def variants(*names: str) -> dict[str, Row]:
    return {row.optimizer: row for name in names for row in ranking(EVIDENCE / "explanations" / name)}


def check_table(heading: str, by: dict[str, Row], labels: dict[str, str]) -> None:
    table = dict(rows_of(heading))
    assert list(table) == list(labels)
    for text, label in labels.items():
        assert table[text] == f"{by[label].test.mean:.2f} ± {by[label].test.std:.2f}"


def test_the_table_of_lions_momentum_has_the_records_figures() -> None:
    by = variants("lion-momentum")
    labels = {
        "`signum`": "signum",
        "`adamw`": "adamw",
        "`lion`, betas (0.9, 0.9)": "lion β 0.9, 0.9",
        "`lion`; AdamW for embedding and output layers": "lion, bytes by adamw",
        "`lion`, betas (0.95, 0.98)": "lion β 0.95, 0.98",
        "`lion`, betas (0.9, 0.99), the default": "lion",
    }
    check_table("Lion: its momentum seems to remember too long", by, labels)
    gaps = [value - by["signum"].test.mean for value in by["lion"].test.values]
    assert (f"{min(gaps):.1f}", f"{max(gaps):.1f}") == ("0.2", "0.7")
    assert f"{welch(by['lion'].test.values, by['signum'].test.values):.2f}" == "0.07"


def test_the_table_of_sgd_sai_has_the_records_figures() -> None:
    by = variants("sgd-layers", "sgd-sai-scales")
    labels = {
        "`adamw`": "adamw",
        "`sgd_sai`, scales from 10 batches": "sgd_sai, G of 10 batches",
        "`sgd_sai`, scales √d": "sgd_sai, G = √d",
        "`sgd_sai`": "sgd_sai",
        "`sgd`; AdamW for embedding and output layers": "sgd, bytes by adamw",
        "`sgd_sai`; AdamW for embedding and output layers": "sgd_sai, bytes by adamw",
        "`sgd`": "sgd",
    }
    check_table("SGD-SaI on text: measured scales gain nothing over √d", by, labels)
    own = by["sgd_sai"].test.mean
    assert by["sgd"].edges["lr"] == "highest"
    for other in ("sgd_sai, G = √d", "sgd_sai, G of 10 batches"):
        assert welch(by["sgd_sai"].test.values, by[other].test.values) > 0.01
    assert by["sgd_sai, bytes by adamw"].test.mean > own
    assert welch(by["sgd"].test.values, by["sgd, bytes by adamw"].test.values) < 0.01


def test_what_the_text_says_of_update_spectra_holds() -> None:
    ranks: dict[str, dict[str, list[float]]] = {}
    for record in read_records(EVIDENCE / "spectra"):
        for name, points in record.series.items():
            kind, _, matrix = name.partition("/")
            if kind == "stable rank":
                found = ranks.setdefault(record.optimizer, {}).setdefault(matrix, [])
                found.append(fmean(value for step, value in points if step >= 100))
    means = {name: [fmean(each) for each in by.values()] for name, by in ranks.items()}
    spread = {name: (round(min(each)), round(max(each))) for name, each in means.items()}
    assert spread["adamw"] == (3, 6)
    assert spread["muon"] == (67, 88)
    assert spread["quad"] == (11, 28)
    for name, factor in (("muon", "4.4"), ("quad", "2.2")):
        ratios = [math.sqrt(own / adamw) for own, adamw in zip(means[name], means["adamw"], strict=True)]
        assert len(ratios) == 8
        assert f"{median(ratios):.1f}" == factor
    best = {row.optimizer: row.best["lr"] for row in ranking(folder(500))}
    assert [round(best[name] / best["adamw"]) for name in ("muon", "quad")] == [7, 8]


@pytest.mark.parametrize("steps", HORIZONS)
def test_the_records_can_be_resumed(steps: int) -> None:
    saved = Experiment.load(folder(steps)).optimizers
    specs = resolve_optimizers([entry.entry for entry in saved.values()], nn.Linear(3, 2))
    assert {spec.label: spec.hyperparameters for spec in specs} == {
        label: entry.hyperparameters for label, entry in saved.items()
    }
