from __future__ import annotations

from typing import Any

import pytest
import torch

from steepest.lab.bench import bench
from steepest.lab.bench.momenta import momenta, random_matrices
from steepest.lab.bench.results import Result
from steepest.lab.bench.sections import polar as module


@pytest.fixture(scope="module")
def results() -> list[Result]:
    return bench(["tiny"], ["lion"], sections=["polar"], rounds=1).results


def test_every_set_and_norm_has_its_errors(results: list[Result]) -> None:
    rows = results[0].rows
    norms = ("frobenius", "schatten4", "schatten8", "aol")
    expected = {(module.TORCH, "frobenius")} | {(name, norm) for name in module.SETS for norm in norms}
    assert {(row["set"], row["norm"]) for row in rows} == expected
    found = {(row["set"], row["norm"]): row for row in rows}
    for row in rows:
        for kind in module.KINDS:
            assert 0 < row[f"{kind}, mean"] <= row[f"{kind}, worst"] < 1.5
        assert 0.9 < row["top"] < 1.5
    # The same polynomials, in another order of products.
    torchs, ours = found[module.TORCH, "frobenius"], found["jordan", "frobenius"]
    assert ours["gaussian, mean"] == pytest.approx(torchs["gaussian, mean"], abs=0.02)
    assert found["polar_express", "frobenius"]["gaussian, mean"] < torchs["gaussian, mean"]


def test_every_set_is_timed_beside_torchs_function(results: list[Result]) -> None:
    rows = results[1].rows
    assert [row["set"] for row in rows].count(module.TORCH) == 1
    assert {row["set"] for row in rows} == {module.TORCH, *module.SETS}
    assert {row["norm"] for row in rows if row["set"] == "jordan"} == {"frobenius", "schatten8", "aol"}
    assert {row["norm"] for row in rows if row["set"] == "minimax_17_17"} == {"schatten8"}
    assert all(row["status"] == "ok" and row["ms"] > 0 and row["times_faster"] > 0 for row in rows)
    assert rows[0]["times_faster"] == 1


def test_errors_are_those_of_the_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function that returns twice the polar factor is off by 1 in every direction."""

    def twice(x: torch.Tensor) -> torch.Tensor:
        u, _, vt = torch.linalg.svd(x.double(), full_matrices=False)
        return 2 * u @ vt

    monkeypatch.setattr(module, "_functions", lambda norms: [("twice", "frobenius", twice)])
    config: Any = type("Config", (), {"toy": True, "full": False, "device": torch.device("cpu")})
    (row,) = module.errors(config).rows
    assert row["top"] == pytest.approx(2)
    assert all(row[f"{kind}, worst"] == pytest.approx(1, abs=1e-6) for kind in module.KINDS)


def test_matrices_are_the_same_every_time() -> None:
    before = torch.get_rng_state()
    first, second = (momenta(32, 4) for _ in range(2))
    assert len(first) == 3 * 8  # at three steps, four matrices of two blocks
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert all(x.isfinite().all() and x.norm() > 0 for x in first)
    for kind, matrices in random_matrices(16).items():
        assert [x.shape for x in matrices] == [(16, 16), (16, 48)]
        assert torch.equal(matrices[0], random_matrices(16)[kind][0])
    assert torch.equal(torch.get_rng_state(), before)
