from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from steepest.lab.errors import LabError
from steepest.lab.experiments.studies import sasrec
from steepest.lab.experiments.studies.sasrec import (
    ORIGINAL,
    compare_recoveries,
    compare_with_original,
    compare_with_popularity,
    recovery,
)
from steepest.lab.records import Evaluation, Experiment, Record
from steepest.lab.tasks.sasrec.model import SASRecConfig
from steepest.lab.tasks.sasrec.synthetic import SyntheticConfig
from steepest.lab.tasks.sasrec.task import reversal_task

from ..conftest import make_experiment, make_record


def tuned(label: str, mean: float, spread: float = 0.001) -> list[Record]:
    """Five records of a tuned optimizer with this mean and standard deviation."""
    return [
        make_record(
            label, phase="tuned", seed=seed, test={"NDCG@10": value, "HR@10": value + 0.1, "loss": 1.0}
        )
        for seed, value in enumerate((mean + k * spread / 2.5**0.5 for k in (-2, -1, 0, 1, 2)), start=1)
    ]


def findings(means: dict[str, float]) -> str:
    records = [record for label, mean in means.items() for record in tuned(label, mean)]
    return "\n".join(compare_with_original(records))


def test_the_original_order_is_found_where_it_is() -> None:
    text = findings({label: row.ndcg for label, row in ORIGINAL.items()})
    # Of 15 pairs, those among lion, sign(m) and c = m differ by less than the noise.
    assert "Of 12 pairs" in text
    assert "12 come out in its order" in text
    assert "0 in the opposite order, and 0 cannot be told apart" in text
    assert "opposite here" not in text
    assert "; +0.0284 in the original study." in text
    assert "both matter, the momentum more" in text


def test_what_differs_is_reported() -> None:
    means = dict.fromkeys(ORIGINAL, 0.3) | {"simba": 0.5, "simba_leaky": 0.4}
    text = findings(means)
    assert "0 come out in its order by NDCG@10 (p < 0.01), 5 in the opposite order, and 7" in text
    assert "opposite here: simba_sign_m above simba; lion above simba; simba_always_m above simba;" in text
    assert "not told apart here: simba_sign_m above signgsd;" in text
    assert "Taking the momentum's sign instead of the counts', with the same threshold" in text
    assert "changes NDCG@10 by -0.2000" in text
    assert "Simba-leaky instead of Simba changes NDCG@10 by -0.1000" in text


@pytest.mark.parametrize(
    ("sign_m", "choice", "verdict"),
    [
        (0.4, 0.3, "the momentum's sign matters, not the choice"),
        (0.3, 0.4, "the choice matters, not the momentum's sign"),
        (0.3, 0.3, "neither can be seen to matter"),
        (0.35, 0.4, "both matter, the choice more"),
    ],
)
def test_momentum_or_choice(sign_m: float, choice: float, verdict: str) -> None:
    means = {"simba": 0.3, "simba_sign_m": sign_m, "simba_always_m": sign_m, "simba_lions_choice": choice}
    assert f"So here {verdict};" in findings(means)


def test_rows_that_were_not_run_are_left_out() -> None:
    text = findings({"lion": 0.4, "signgsd": 0.3, "adamw": 0.5})
    assert text.startswith("Of 1 pairs")
    assert "So here" not in text
    assert not findings({"adamw": 0.5})


def test_popularity_is_beaten_by_three_standard_errors_or_not() -> None:
    # With 400 users and shares of about a half, a standard error of a difference is 0.035.
    records = [*tuned("adamw", 0.52), *tuned("simba", 0.49)]
    (text,) = compare_with_popularity(records, 0.5, users=400)
    assert text.endswith(": simba.")
    (text,) = compare_with_popularity(records[:5], 0.5, users=400)
    assert "Every tuned optimizer" in text


def reversal(label: str, after: list[float], seed: int = 1) -> Record:
    """NDCG@10 is 0.5 until the reversal at step 400, and on the reversed data 0.2, and then as given."""
    curves = [(0, 0.0, 0.0), (390, 0.5, 0.2), *((400 + 100 * n, 0.1, v) for n, v in enumerate(after, 1))]
    validation = [
        Evaluation(step=step, seconds=0, metrics={"NDCG@10 before": old, "NDCG@10": new})
        for step, old, new in curves
    ]
    return make_record(
        label, phase="default", seed=seed, steps=800, validation=validation, chosen_step=curves[-1][0]
    )


def test_recovery_is_counted_from_the_reversal() -> None:
    # 90 % of 0.5 lies in the middle between 0.4 at step 600 and 0.5 at step 700.
    assert recovery(reversal("adamw", [0.3, 0.4, 0.5]), 400) == pytest.approx(250)
    assert recovery(reversal("adamw", [0.3, 0.4, 0.44]), 400) is None
    experiment = make_experiment(("adamw", "simba", "lion"), steps=800, config={"reversed_after": 400})
    records = [reversal("adamw", [0.3, 0.4, 0.5]), reversal("adamw", [0.45], seed=2)]
    records += [reversal("simba", [0.3, 0.4]), reversal("simba", [0.5], seed=2)]
    (text,) = compare_recoveries(experiment, records)
    assert "adamw 0.500 → 0.200, 175 ± 106;" in text
    assert "simba 0.500 → 0.200, 1 of 2 seeds not within 400;" in text
    assert text.endswith("lion diverged.")


def test_the_study_compares_and_reverses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = SASRecConfig(width=8, blocks=1)
    data = SyntheticConfig(users=60, items=40, max_length=10)
    monkeypatch.setattr(
        sasrec, "reversal_task", lambda **options: reversal_task(data, small, evaluations=4, **options)
    )
    monkeypatch.setattr(sasrec, "next_item_task", partial(sasrec.next_item_task, model=small, batch=8))
    monkeypatch.setattr(sasrec, "sweep", partial(sasrec.sweep, timing_seconds=0))
    path = tmp_path / "shop.txt"
    path.write_text(
        "".join(f"{user} {(user * 3 + place) % 11}\n" for user in range(20) for place in range(8))
    )
    out = tmp_path / "study"
    comparison, second = sasrec.run(
        out, path, trials=1, seeds=1, steps=6, optimizers=["simba", "simba_always_m"]
    )
    for experiment in (comparison.experiment, second.experiment):
        assert experiment.optimizers["simba_always_m"].hyperparameters["choice"] == "memory"
        assert experiment.optimizers["simba"].hyperparameters["choice"] == "threshold"
    kept = Experiment.load(out / "comparison")
    assert kept == comparison.experiment
    assert any(note.startswith("NDCG@10 and HR@10 of rankings without training") for note in kept.notes)
    assert any(note.startswith("Reversal after step 3") for note in kept.notes)
    assert not any("synthetic" in note for note in kept.notes[:2])
    # The reversal trains with the values that the search found, on another schedule.
    chosen = {r.optimizer: r.searched for r in comparison.records if r.phase == "tuned"}
    for record in second.records:
        assert record.hyperparameters["lr"] == chosen[record.optimizer]["lr"]
        assert record.hyperparameters["weight_decay"] == chosen[record.optimizer]["weight_decay"]
        assert "constant" in record.schedule
    assert [(r.phase, r.seed) for r in second.records] == [("tuned", 1)] * 2
    assert second.experiment.trials == 0
    with pytest.raises(LabError, match="the study has no adam: it has adamw,"):
        sasrec.run(out, path, optimizers=["adam"])
