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
from steepest.lab.experiments.studies import sasrec
from steepest.lab.records import read_records
from steepest.lab.training.optimizers import resolve_optimizers

ROOT = Path(__file__).parents[2]
EVIDENCE = ROOT / "benchmarks" / "evidence"
PAGE = (ROOT / "docs" / "which-optimizer.md").read_text(encoding="utf-8")
HORIZONS = (500, 2000, 8000)


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
    by = {steps: {row.optimizer: row for row in rows[steps]} for steps in (500, 2000)}
    leads = {
        name: [f"{by[steps]['adamw'].test.mean - by[steps][name].test.mean:.2f}" for steps in by]
        for name in ("muon", "quad")
    }
    assert leads == {"muon": ["0.36", "0.21"], "quad": ["0.41", "0.25"]}
    for name in ("muon", "quad"):
        short, long = (by[steps][name] for steps in by)
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
    tuned, defaults = (scores(folder(2000), phase) for phase in ("tuned", "default"))
    assert welch(defaults["signum"], tuned["adamw"]) > 0.01
    assert welch(tuned["quad"], tuned["muon"]) < 0.01
    adamw = by[2000]["adamw"]
    assert f"{adamw.untuned.mean - adamw.test.mean:.2f}" == "0.06"
    assert all(each["signum"].untuned.mean < each["adamw"].untuned.mean + 0.04 for each in by.values())
    beaten = [name for name, row in by[2000].items() if row.untuned.mean < row.test.mean]
    assert beaten == ["signum", "sgd_sai"]


def scores(directory: Path, phase: str, metric: str = "bits per byte") -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for record in read_records(directory):
        if record.phase == phase and record.test is not None:
            found.setdefault(record.optimizer, []).append(record.test[metric])
    return found


def test_what_the_text_says_of_8000_steps_holds(rows: dict[int, list[Row]]) -> None:
    by = {steps: {row.optimizer: row for row in each} for steps, each in rows.items()}
    muon, adamw = (by[8000][name] for name in ("muon", "adamw"))
    assert f"{adamw.test.mean - muon.test.mean:.2f}" == "0.08"
    assert muon.wins
    tuned, untuned = (scores(folder(8000), phase) for phase in ("tuned", "default"))
    assert welch(tuned["lion"], tuned["adamw"]) > 0.1
    assert muon.untuned.mean < adamw.test.mean
    assert welch(untuned["muon"], tuned["adamw"]) < 0.01
    assert muon.seconds_to_target >= adamw.seconds_to_target
    for steps in (500, 2000):
        assert f"{by[steps]['lion'].test.mean - by[steps]['adamw'].test.mean:.1f}" == "0.3"
    best = {name: [by[steps][name].best["lr"] for steps in HORIZONS] for name in ("muon", "adamw", "lion")}
    assert [f"{lr:.2g}" for lr in best["muon"]] == ["0.013", "0.01", "0.0081"]
    assert [by[steps]["muon"].edges.get("lr") for steps in HORIZONS] == [None, "lowest", "lowest"]
    assert max(best["lion"]) / min(best["lion"]) < 1.05
    assert max(best["adamw"]) / min(best["adamw"]) < 1.3


def test_the_table_of_sasrec_has_the_records_figures() -> None:
    directory = EVIDENCE / "sasrec" / "comparison"
    by = {row.optimizer: row for row in ranking(directory)}
    defaults = Experiment.load(directory).optimizers
    table = rows_of("Evidence: recommendation")
    assert [cells[0] for cells in table] == [f"`{name}`" for name in by]
    for cells, row in zip(table, by.values(), strict=True):
        assert float(cells[1]) == pytest.approx(row.state_bytes, abs=0.06)
        assert cells[2] == f"{row.test.mean:.3f} ± {row.test.std:.3f}"
        assert cells[3] == f"{row.untuned.mean:.3f}"
        hits = row.others["HR@10"]
        assert cells[4] == f"{hits.mean:.3f} ± {hits.std:.3f}"
        best, default = map(float, re.findall(r"[\d.]+", cells[5]))
        assert best == pytest.approx(row.best["lr"], rel=0.05)
        assert default == defaults[row.optimizer].hyperparameters["lr"]
    assert [name for name, row in by.items() if row.tie] == ["muon", "sgd_sai", "adamw", "simba_leaky"]
    untuned = {name: row.untuned.mean for name, row in by.items()}
    assert max(untuned, key=lambda name: untuned[name]) == "signgsd"
    assert [f"{untuned['signgsd'] - untuned[name]:.2f}" for name in ("adamw", "muon")] == ["0.03", "0.03"]
    assert round(by["sgd_sai"].best["lr"] / defaults["sgd_sai"].hyperparameters["lr"]) == 60
    edges = {name: row.edges.get("weight_decay") for name, row in by.items()}
    assert [name for name, edge in edges.items() if edge == "lowest"] == ["muon", "adamw"]
    assert "lion" in [name for name, edge in edges.items() if edge == "highest"]
    below = [
        by[name].best["lr"] / defaults[name].hyperparameters["lr"]
        for name in by
        if name.startswith(("lion", "simba"))
    ]
    assert (round(min(below)), round(max(below))) == (7, 23)


def test_what_the_text_says_of_the_simba_study_holds() -> None:
    directory = EVIDENCE / "sasrec" / "comparison"
    records = read_records(directory)
    notes = " ".join(sasrec.compare_with_original(records))
    assert "Of 12 pairs" in notes
    assert "12 come out in its order" in notes
    ndcg = scores(directory, "tuned", "NDCG@10")
    gains = {
        "0.050": ("simba", "simba_sign_m"),
        "0.033": ("simba", "simba_lions_choice"),
        "0.053": ("simba", "simba_leaky"),
    }
    for text, (a, b) in gains.items():
        change, p = sasrec.difference(ndcg, a, b)
        assert (f"{change:.3f}", p < 0.01) == (text, True)
    assert abs(sasrec.difference(ndcg, "simba_sign_m", "simba_always_m")[0]) < 0.001
    reversal = EVIDENCE / "sasrec" / "reversal"
    (note,) = sasrec.compare_recoveries(Experiment.load(reversal), read_records(reversal))
    for words in ("simba 0.442 → 0.349, 2 of 5 seeds not within 600", "simba_leaky 0.465 → 0.310, 95 ± 25"):
        assert words in note
    for words in (", 100 ± 11;", ", 70 ± 14;", ", 56 ± 9;", ", 43 ± 13;"):
        assert words in note


def test_the_table_of_the_larger_model_has_the_records_figures(rows: dict[int, list[Row]]) -> None:
    small = {row.optimizer: row for row in rows[500]}
    large = ranking(EVIDENCE / "text-1m")
    table = rows_of("A larger model: 1.3 M parameters, 500 steps")
    assert [cells[0] for cells in table] == [f"`{row.optimizer}`" for row in large]
    for cells, row in zip(table, large, strict=True):
        assert float(cells[1]) == pytest.approx(row.state_bytes, abs=0.06)
        assert cells[2] == f"{row.test.mean:.2f} ± {row.test.std:.2f}"
        assert cells[3] == f"{small[row.optimizer].test.mean:.2f}"
        assert cells[4] == f"{row.untuned.mean:.2f}"
        assert cells[5] == f"{small[row.optimizer].untuned.mean:.2f}"
    muon, adamw, signum = large
    assert table[0][6:] == [
        f"{100 * own / its:.0f} %"
        for own, its in (
            (muon.steps_to_target, adamw.steps_to_target),
            (muon.seconds_to_target, adamw.seconds_to_target),
        )
    ]
    assert f"{muon.decayed.mean:.2f}" == "2.71"
    assert welch(adamw.untuned.values, adamw.test.values) > 0.01
    assert f"{muon.untuned.mean - adamw.untuned.mean:.1f}" == "0.2"
    assert f"{signum.untuned.mean - signum.test.mean:.1f}" == "0.2"
    means = {row.optimizer: row.test.mean for row in large}
    assert f"{means['adamw'] - means['muon']:.2f}" == "0.43"
    assert means["signum"] > small["signum"].test.mean - 0.05


@pytest.fixture(scope="module")
def fine_tuning() -> dict[str, Row]:
    return {row.optimizer: row for row in ranking(EVIDENCE / "fine-tuning")}


def test_the_table_of_fine_tuning_has_the_records_figures(fine_tuning: dict[str, Row]) -> None:
    defaults = Experiment.load(EVIDENCE / "fine-tuning").optimizers
    table = rows_of("Evidence: fine-tuning")
    assert [cells[0] for cells in table] == [f"`{name}`" for name in fine_tuning]
    for (_, state, tuned, untuned, lr), row in zip(table, fine_tuning.values(), strict=True):
        assert float(state) == pytest.approx(row.state_bytes, abs=0.06)
        assert tuned == f"{row.test.mean:.3f} ± {row.test.std:.3f}"
        assert untuned == f"{row.untuned.mean:.3f}"
        assert (len(row.test.values), len(row.untuned.values)) == (5, 5)
        best, default = map(float, re.findall(r"[\d.]+", lr))
        assert best == pytest.approx(row.best["lr"], rel=0.05)
        assert default == defaults[row.optimizer].hyperparameters["lr"]


def test_what_the_text_says_of_fine_tuning_holds(fine_tuning: dict[str, Row]) -> None:
    directory = EVIDENCE / "fine-tuning"
    notes = " ".join(Experiment.load(directory).notes)
    before = float(re.findall(r"it has ([\d.]+) before the first step", notes)[0])
    adamw = fine_tuning["adamw"].test
    assert (f"{before:.2f}", f"{before - adamw.mean:.2f}") == ("2.72", "0.64")
    assert fine_tuning["adamw"].best["lr"] == pytest.approx(fine_tuning["adamw_int8"].best["lr"], rel=0.02)
    behind = {name: row.test.mean - adamw.mean for name, row in fine_tuning.items()}
    written = {name: f"{behind[name]:.2f}" for name in ("adamw_int8", "lion", "signgsd")}
    assert written == {"adamw_int8": "0.00", "lion": "0.03", "signgsd": "0.06"}
    apart = [name for name, row in fine_tuning.items() if welch(row.test.values, adamw.values) < 0.01]
    assert apart == ["lion", "signgsd", "simba_leaky"]
    assert welch(fine_tuning["simba_leaky"].test.values, fine_tuning["signgsd"].test.values) < 0.01
    assert max(fine_tuning["sgd_sai"].test.values) > sorted(fine_tuning["sgd_sai"].test.values)[-2] + 0.05
    tried = sorted(
        record.searched["lr"]
        for record in read_records(directory)
        if record.optimizer == "simba_leaky" and record.phase == "search"
    )
    costs = {name: row.untuned.mean - row.test.mean for name, row in fine_tuning.items()}
    cheap = ("adamw", "adamw_int8", "signum", "adam_mini")
    assert {f"{costs[name]:.2f}" for name in cheap} == {"0.02", "0.03"}
    ends = [f"{fine_tuning[name].untuned.mean:.3f}" for name in ("lion", "simba_leaky")]
    assert ends == ["2.251", "2.255"]
    assert f"{costs['signgsd']:.2f}" == "0.25"
    assert f"{max(fine_tuning['sgd_sai'].untuned.values):.2f}" == "3.22"
    position = tried.index(fine_tuning["simba_leaky"].best["lr"])
    assert [f"{lr:.2g}" for lr in tried[position : position + 2]] == ["0.00019", "0.00071"]


def test_the_peaks_of_fine_tuning_are_those_of_the_page_on_memory() -> None:
    memory = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in memory.splitlines()]
    peaks = {cells[0]: cells[6] for cells in table if len(cells) == 9 and cells[1] == "float32"}
    assert [peaks[name] for name in ("AdamW", "Lion", "SGDSaI", "SignGSD")] == ["609", "457", "457", "305"]
    section = PAGE.split("## Evidence: fine-tuning")[1].split("## ")[0]
    assert all(f"{peaks[name]} MB" in section for name in ("AdamW", "Lion", "SignGSD"))
    least = next(cells[6] for cells in table if cells[1:2] == ["least"])
    assert f"{least} MB" in " ".join(section.split())


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
    check_table("Lion: a long memory seems to need a long run", by, labels)
    gaps = [value - by["signum"].test.mean for value in by["lion"].test.values]
    assert (f"{min(gaps):.1f}", f"{max(gaps):.1f}") == ("0.2", "0.7")
    assert f"{welch(by['lion'].test.values, by['signum'].test.values):.2f}" == "0.07"


def test_the_table_of_schedules_and_batches_has_the_records_figures() -> None:
    page = (ROOT / "docs" / "learning_rates.md").read_text(encoding="utf-8")
    section = page.split("\n## Longer runs")[1].split("\n## ")[0]
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    folders = ("lion-momentum", "no-warmup", "constant-lr", "batch-32")
    by = {name: variants(name) for name in folders}
    labels = ("adamw", "signum", "lion", "lion β 0.9, 0.9", "signgsd")
    for label, (_, *cells) in zip(labels, lines, strict=True):
        for name, cell in zip(folders, cells, strict=True):
            if (row := by[name].get(label)) is None:
                assert cell.strip() == "–"
                continue
            lr, result = cell.strip().split(": ")
            assert float(lr) == pytest.approx(row.best["lr"], rel=0.025)
            assert result == f"{row.test.mean:.2f} ± {row.test.std:.2f}"
    usual, batch = by["lion-momentum"], by["batch-32"]
    rise = {name: batch[name].best["lr"] / usual[name].best["lr"] for name in batch}
    assert {name: f"{factor:.1f}" for name, factor in rise.items()} == {
        "adamw": "3.1",
        "signum": "1.6",
        "lion": "0.6",
    }
    assert welch(batch["lion"].test.values, batch["adamw"].test.values) < 0.01
    for name in ("no-warmup", "constant-lr"):
        for label, row in by[name].items():
            if label in usual:
                assert welch(row.test.values, usual[label].test.values) > 0.01
                if label != "adamw":
                    assert row.best["lr"] == pytest.approx(usual[label].best["lr"], rel=0.2)
    rates = [by[name]["adamw"].best["lr"] for name in ("constant-lr", "lion-momentum")]
    assert f"{rates[0] / rates[1]:.1f}" == "1.7"
    untuned = [by[name]["lion"].untuned for name in ("constant-lr", "lion-momentum")]
    assert [f"{each.mean:.2f}" for each in untuned] == ["3.20", "3.82"]
    assert welch(*(each.values for each in untuned)) < 0.01
    gaps = [by[name]["lion"].test.mean - by[name]["adamw"].test.mean for name in folders[1:3]]
    assert [f"{gap:.2f}" for gap in gaps] == ["0.19", "0.15"]


def test_the_table_of_sgd_sai_has_the_records_figures() -> None:
    by = variants("sgd-layers", "sgd-sai-scales")
    labels = {
        "`adamw`": "adamw",
        "`sgd_sai`, scales from 10 batches": "sgd_sai, G of 10 batches",
        "`sgd_sai`, scales √d": "sgd_sai, G = √d",
        "`sgd_sai`": "sgd_sai",
        "`sgd_sai` without scales, which is SGD with momentum": "sgd_sai, G = 1",
        "`sgd`; AdamW for embedding and output layers": "sgd, bytes by adamw",
        "`sgd_sai`; AdamW for embedding and output layers": "sgd_sai, bytes by adamw",
        "`sgd`": "sgd",
    }
    check_table("SGD-SaI on text: tuned momentum without scales does as well", by, labels)
    own = by["sgd_sai"].test.mean
    assert by["sgd"].edges["lr"] == "highest"
    assert by["sgd_sai, G = 1"].edges["lr"] == "highest"
    assert f"{by['sgd_sai, G = 1'].best['lr']:.3g}" == "1"
    untuned = [by[name].untuned.mean for name in ("sgd_sai", "sgd_sai, G = 1")]
    assert [f"{mean:.2f}" for mean in untuned] == ["2.93", "3.95"]
    for other in ("sgd_sai, G = √d", "sgd_sai, G of 10 batches", "sgd_sai, G = 1"):
        assert welch(by["sgd_sai"].test.values, by[other].test.values) > 0.01
    assert by["sgd_sai, bytes by adamw"].test.mean > own
    assert welch(by["sgd"].test.values, by["sgd, bytes by adamw"].test.values) < 0.01


def test_the_table_of_sgd_sais_grid_has_the_records_figures() -> None:
    resnet, vit = (
        {row.optimizer: row for row in ranking(EVIDENCE / "sgd-sai-grid" / model)}
        for model in ("resnet18", "vit_s16")
    )
    table = rows_of("SGD-SaI's grid on small images")
    names = [cells[0].split("`")[1] for cells in table]
    assert names == [*resnet]
    for name, (_, *cells) in zip(names, table, strict=True):
        for row, (tuned, untuned, good) in ((resnet[name], cells[:3]), (vit[name], cells[3:])):
            assert tuned == f"{row.test.mean:.1f} ± {row.test.std:.1f}"
            assert untuned == f"{row.untuned.mean:.1f}"
            assert good == f"{row.good_cells} of {row.cells}"
    assert [name for name, row in resnet.items() if not row.tie] == ["lion"]
    assert all(
        welch(resnet["sgd_sai"].untuned.values, row.test.values) > 0.01 for row in resnet.values() if row.tie
    )
    assert all(welch(vit["sgd"].test.values, vit[name].test.values) < 0.01 for name in ("lion", "adam_mini"))
    assert vit["sgd_sai"].tie


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


def test_what_the_text_says_of_local_gain_holds() -> None:
    gains: dict[str, dict[str, float]] = {}
    for record in read_records(EVIDENCE / "local-gain"):
        series = {name.removeprefix("local gain/"): points for name, points in record.series.items()}
        gains[record.optimizer] = {name: points[-1][1] for name, points in series.items()}
    width, names = 64, gains["sgd_sai"]
    sizes = {"embedding": 256, "inputs": 3 * width, "output": width, "up": 4 * width, "down": 4 * width}
    for name, gain in names.items():
        kind = name.split(".")[-2]
        numel = width if "norm" in kind else width * sizes.get(kind, 256)
        assert gain == pytest.approx(math.sqrt(numel), rel=0.04)
    adamw = gains["adamw"]
    assert (round(min(adamw.values())), round(max(adamw.values()))) == (73, 871)
    assert "norm" in max(adamw, key=lambda name: adamw[name])


def test_what_the_page_on_bench_says_of_growth_holds() -> None:
    costs = Experiment.load(EVIDENCE / "growth").costs
    largest = {cost.optimizer: cost.peak_bytes for cost in costs.values() if cost.model == "GPT-2 1.5B"}
    words = {name: f"{(largest[name] or 0) / 1e9:.1f}" for name in ("adamw", "muon", "lion")}
    assert words == {"adamw": "12.5", "muon": "6.8", "lion": "6.2"}
    assert largest["signgsd"] == 2**20


@pytest.mark.parametrize("steps", HORIZONS)
def test_the_records_can_be_resumed(steps: int) -> None:
    saved = Experiment.load(folder(steps)).optimizers
    specs = resolve_optimizers([entry.entry for entry in saved.values()], nn.Linear(3, 2))
    assert {spec.label: spec.hyperparameters for spec in specs} == {
        label: entry.hyperparameters for label, entry in saved.items()
    }
