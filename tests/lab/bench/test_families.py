from __future__ import annotations

import pytest
import torch

from steepest.lab.bench import bench
from steepest.lab.bench.sections.families import Family, families


def test_a_row_per_family_compares_the_same_work() -> None:
    (result,) = bench(["tiny"], ["muon"], sections=["families"], rounds=2).results
    assert [row["family"] for row in result.rows] == [family.name for family in families(True, False)]
    for row in result.rows:
        assert row["status"] == "ok"
        assert row["rounds"] == 2
        assert row["quartiles_ms"][0] <= row["ms"] <= row["quartiles_ms"][1]
        assert row["times_faster"] > 0
        assert row["first_s"] > 0


def test_both_step_the_same_matrices_to_nearly_the_same_values() -> None:
    import steepest

    family = Family("one", ((24, 10),))
    (ours,), (theirs,) = (family.params(torch.device("cpu"), torch.float32) for _ in range(2))
    assert torch.equal(ours, theirs)
    steepest.Muon([ours], coefficients="jordan", weight_decay=0.1).step()
    torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", weight_decay=0.1).step()
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_other_optimizers_have_no_families() -> None:
    assert not bench(["tiny"], ["lion"], sections=["families"], rounds=1).results


def test_a_failing_step_has_a_row_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(torch.optim.Muon, "step", fail)
    (result,) = bench(["tiny"], ["muon"], sections=["families"], rounds=1).results
    assert {row["reason"] for row in result.rows} == {"RuntimeError: no memory"}


def test_products_take_less_and_less_from_family_to_family() -> None:
    """From 768 rows, where they are nearly all of a step, to 16."""
    rows = [min(min(shape) for shape in family.shapes) for family in families(False, True)]
    assert max(rows) >= 512
    assert min(rows) == 16
    assert len({family.name for family in families(False, True)}) == len(rows)
