"""An experiment's files after damage or on a full disk: it goes on, or one line says what to do."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError
from torch import Tensor

from steepest.lab import LabError, Task
from steepest.lab.files import replace_file
from steepest.lab.progress import Callback
from steepest.lab.records import read_records
from steepest.lab.report import load, section_table

from .test_resume import fails, run_sweep

FILES = ("experiment.json", "records.jsonl", "study.db")


@pytest.fixture(scope="module")
def whole(plane: Task[Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "run"
    run_sweep(plane, directory)
    return directory


def change_a_value(text: str, chance: random.Random) -> str:
    """Return JSON in which one value, at any depth, has another type or is gone."""
    data = json.loads(text)
    node, key = data, chance.choice([*data])
    while isinstance(node[key], dict | list) and node[key] and chance.random() < 0.7:
        node = node[key]
        key = chance.choice([*node]) if isinstance(node, dict) else chance.randrange(len(node))
    node[key] = chance.choice([None, "x", 1, -1, 0, [], {}, True, 1e300, "NaN", [1], {"a": 1}, "gone"])
    if node[key] == "gone":
        del node[key]
    return json.dumps(data)


def damage(path: Path, chance: random.Random) -> str:
    content = path.read_bytes()
    kinds = ["cut", "flip", "delete", "empty", "directory", "garbage"] + ["value"] * 4 * (
        path.suffix != ".db"
    )
    kind = chance.choice(kinds)
    if kind in ("delete", "directory"):
        path.unlink()
    if kind == "directory":
        path.mkdir()
    if kind == "flip":
        changed = bytearray(content)
        for _ in range(chance.choice([1, 8, 64])):
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
    if kind in ("cut", "empty"):
        path.write_bytes(content[: chance.randrange(len(content)) if kind == "cut" else 0])
    if kind == "garbage":
        path.write_bytes(chance.randbytes(chance.randrange(1, 3000)))
    if kind == "value":
        lines = content.decode().split("\n") if path.suffix == ".jsonl" else [content.decode()]
        at = chance.randrange(max(1, len(lines) - 1))
        path.write_text("\n".join([*lines[:at], change_a_value(lines[at], chance), *lines[at + 1 :]]))
    return kind


def said(action: Callable[[], object]) -> str:
    """Do it, and return the line with which it ends; an empty one if it succeeds."""
    try:
        action()
    except LabError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("seed", range(36))
def test_a_damaged_file_costs_no_record(seed: int, plane: Task[Tensor], whole: Path, tmp_path: Path) -> None:
    chance, directory = random.Random(seed), tmp_path / "run"
    shutil.copytree(whole, directory)
    database = seed % 3 > 0
    if not database:
        (directory / "study.db").unlink()
    name = FILES[seed // 3 % (3 if database else 2)]
    kind = damage(directory / name, chance)
    kept = {p: p.read_bytes() for p in directory.glob("*.json*") if p.is_file()}
    line = said(lambda: [section_table(section) for section in load([directory])])
    assert str(directory) in line or not line
    assert name != "study.db" or not line
    line = said(lambda: run_sweep(plane, directory))
    if line:
        assert str(directory) in line
        assert all(path.read_bytes() == content for path, content in kept.items())
    else:
        assert {r.key for r in read_records(directory)} >= {r.key for r in read_records(whole)}, kind


def test_a_database_that_lost_its_trials_gets_them_back(
    plane: Task[Tensor], whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "study.db").write_bytes(b"")
    assert run_sweep(replace(plane, loss=fails), tmp_path / "run").records == read_records(whole)


def test_records_of_no_known_experiment_are_not_replaced(
    plane: Task[Tensor], whole: Path, tmp_path: Path
) -> None:
    shutil.copy(whole / "records.jsonl", tmp_path)
    for fresh in (False, True):
        with pytest.raises(LabError, match=r"records\.jsonl, but no experiment\.json"):
            run_sweep(plane, tmp_path, fresh=fresh)
    assert (tmp_path / "records.jsonl").read_bytes() == (whole / "records.jsonl").read_bytes()


def test_fresh_deletes_only_what_the_experiment_wrote(
    plane: Task[Tensor], whole: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(whole, directory)
    (directory / "tensorboard").mkdir()
    foreign = ["plot.png", "report.html", "plan.json", "records.jsonl.bak", "tensorboard/mine"]
    for name in foreign:
        (directory / name).write_text("mine")
    assert {r.steps for r in run_sweep(plane, directory, fresh=True, steps=7).records} == {7}
    assert {(directory / name).read_text() for name in foreign} == {"mine"}
    for name in ("experiment.json", "records.jsonl"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("mine")
        with pytest.raises(LabError, match=name.replace(".", r"\.")):
            run_sweep(plane, tmp_path / name, fresh=True)
        assert (tmp_path / name / name).read_text() == "mine"


def test_a_full_disk_is_one_line_and_the_command_goes_on_later(
    plane: Task[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        write(path, content[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    class Fills(Callback):
        def on_trial_start(self, trial: Any) -> None:
            if trial.phase == "tuned":
                monkeypatch.setattr(Path, "write_bytes", full)

    with pytest.raises(LabError, match=r"cannot write .*records\.jsonl: No space left .*; make room"):
        run_sweep(plane, tmp_path, callback=Fills())
    monkeypatch.undo()
    kept = read_records(tmp_path)
    assert [record.phase for record in kept] == ["search", "search"]
    assert not [*tmp_path.glob("*.draft")]
    result = run_sweep(plane, tmp_path)
    assert result.records[:2] == kept
    assert len(result.records) == 4


def test_a_full_disk_under_the_database_is_one_line(
    plane: Task[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **others: Any) -> None:
        raise OperationalError("INSERT", {}, Exception("database or disk is full"))

    monkeypatch.setattr("optuna.storages.RDBStorage.set_trial_user_attr", full)
    with pytest.raises(LabError, match=r"cannot use the storage .*disk is full: make room") as error:
        run_sweep(plane, tmp_path)
    assert "\n" not in str(error.value)


def test_a_file_in_the_place_of_the_directory_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(LabError, match=r"cannot write .*experiment\.json"):
        replace_file(tmp_path / "runs" / "experiment.json", "{}")
