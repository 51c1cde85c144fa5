from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from steepest.lab.cli import run, study
from steepest.lab.experiments.studies import sasrec
from steepest.lab.experiments.sweep import Result

from ..conftest import make_experiment


def test_the_options_reach_the_study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: dict[str, Any] = {}

    def pretend(out: Path, data: Path, **options: Any) -> list[Result]:
        given.update(options, out=out, data=data)
        return [Result(out / "comparison", make_experiment(), [])]

    monkeypatch.setattr(sasrec, "run", pretend)
    monkeypatch.setattr(study, "finish", lambda out, directories: given.update(shown=directories) or 0)
    command = [
        "study",
        "sasrec",
        "--data",
        "shop.csv",
        "--format",
        "amazon-2018",
        "--core",
        "3",
        "--trials",
        "4",
    ]
    command += ["--optimizers", "lion, simba", "--no-reversal", "--out", str(tmp_path), "--workers", "1"]
    assert run(command) == 0
    assert (given["out"], given["data"], given["format"]) == (tmp_path, Path("shop.csv"), "amazon-2018")
    assert (given["core"], given["trials"], given["seeds"], given["reversal"]) == (3, 4, 5, False)
    assert given["optimizers"] == ["lion", "simba"]
    assert given["shown"] == [tmp_path / "comparison"]
    assert run(["study", "sasrec", "--format", "parquet"]) == 2
