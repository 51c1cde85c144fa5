from __future__ import annotations

import builtins
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import steepest
from steepest import __main__ as entry
from steepest.lab import LabError, cli
from steepest.lab.cli.options import make_console
from steepest.lab.cli.workers import INTERRUPTED, Workers
from steepest.lab.records import read_records
from steepest.lab.tasks.load import load_task

from .conftest import make_experiment

QUICK = ["--optimizers", "adamw,lion", "--trials", "2", "--seeds", "1", "--steps", "20", "--workers", "1"]


@pytest.fixture(autouse=True)
def no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steepest.lab.experiments.sweep.training_costs", lambda *arguments: {})


def run_main(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_info:
        entry.main(list(arguments))
    assert isinstance(exit_info.value.code, int)
    return exit_info.value.code


def test_without_a_command_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    run_main()
    captured = capsys.readouterr()
    assert "race" in captured.out + captured.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main("--version") == 0
    assert capsys.readouterr().out.startswith(f"steepest {steepest.__version__}, torch ")


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main("race", "--help") == 0
    shown = capsys.readouterr().out
    for word in ("--task", "--optimizers", "--budget", "--steps", "--out", "--fresh", "--workers", "Ctrl-C"):
        assert word in shown


def test_a_race_writes_its_directory_and_runs_no_trial_the_second_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    arguments = ["race", "--task", "digits", *QUICK, "--out", str(out)]
    assert cli.run(arguments) == 0
    first = capsys.readouterr().out
    assert "adamw" in first
    assert max(len(line) for line in first.splitlines() if str(tmp_path) not in line) <= 200
    assert {"records.jsonl", "experiment.json", "study.db", "report.html"} <= {p.name for p in out.iterdir()}
    records = read_records(out)
    counts = Counter((r.optimizer, r.phase) for r in records if r.phase != "decayed")
    assert counts == {
        (label, phase): number
        for label in ("adamw", "lion")
        for phase, number in (("search", 2), ("tuned", 1), ("default", 1))
    }
    monkeypatch.setattr("steepest.lab.cli.race.finish", lambda directory: 0)  # the page takes seconds
    assert cli.run(arguments) == 0
    assert f"{len(records)} of them already done" in capsys.readouterr().out
    assert read_records(out) == records


@pytest.mark.parametrize("command", [["race", "--task", "digits", *QUICK], ["report"]], ids=lambda c: c[0])
def test_a_page_that_the_lab_did_not_write_stays(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_experiment(["lion"]).save(tmp_path)
    saved = (tmp_path / "experiment.json").read_bytes()
    (tmp_path / "report.html").write_text("<p>mine")
    option = ["--out"] if command[0] == "race" else []
    assert cli.run([*command, *option, str(tmp_path)]) == 2
    assert "report.html was not written by steepest: move it away" in capsys.readouterr().err
    assert (tmp_path / "report.html").read_text() == "<p>mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["experiment.json", "report.html"]
    assert (tmp_path / "experiment.json").read_bytes() == saved


def test_a_sweep_of_a_grid_on_the_users_text(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("all work and no play makes a dull boy\n" * 200)
    shape = [f"--with={setting}" for setting in ("width=16", "depth=1", "heads=2", "context=16", "batch=4")]
    space = ["--space", "lr=0.001,0.01", "--space", "weight_decay=0,0.1", "--optimizers", "lion"]
    quick = ["--seeds", "1", "--steps", "5", "--workers", "1", "--out", str(tmp_path / "run")]
    assert cli.run(["sweep", "--task", "text", "--text", str(text), *shape, *space, *quick]) == 0
    cells = [r.searched for r in read_records(tmp_path / "run") if r.phase == "search"]
    assert cells == [{"lr": lr, "weight_decay": d} for lr in (0.001, 0.01) for d in (0.0, 0.1)]


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    path = tmp_path / "empty.txt"
    path.touch()
    return path


BAD: list[tuple[list[str], str]] = [
    (["--task", "text", "--text", "{tmp}/missing.txt"], "no such file or directory"),
    (["--task", "text", "--text", "{tmp}/empty.txt"], "no text in"),
    (["--task", "text", "--text", "{tmp}/short.txt"], "too short"),
    (["--task", "text", "--text", "{tmp}/wide.txt"], "UTF-16"),
    (["--text", "{tmp}/short.txt"], "--text requires --task text"),
    (["--task", "text", "--with", "width=30"], "heads"),
    (["--task", "chess"], "chess"),
    (["--with", "modell=mlp"], "no setting 'modell'"),
    (["--with", "model"], "bad --with 'model'"),
    (["--optimizers", "adamw,loin"], "'lion'"),
    (["--optimizers", " , "], "no optimizers: name at least one, such as 'adamw'"),
    (["--optimizers", "lion,lion"], "twice"),
    (["--set", "lion.bata=1"], "bata"),
    (["--baseline", "muon"], "the baseline 'muon' is not among the optimizers adamw, lion"),
    (["--trials", "2", "--budget", "5m"], "not both"),
    (["--steps", "0"], "steps and trials must be at least 1"),
    (["--steps", "many"], "'--steps'"),
    (["--trials", "0"], "trials must be at least 1"),
    (["--seeds", "0"], "seeds must be at least 1"),
    (["--threads", "0"], "--threads and --workers must be at least 1"),
    (["--threads", "1" + "0" * 400], "--threads at most 4096"),
    (["--set", "lion.lr=1" + "0" * 400], "lion: build(): lr must be a finite number"),
    (["--workers", "0"], "--threads and --workers must be at least 1"),
    (["--schedule", "zigzag"], "'zigzag' is not one of 'cosine', 'linear', 'constant'"),
    (["--warmup", "1.1"], "Invalid value for '--warmup'"),
    (["--storage", "nonsense"], "cannot open the storage nonsense"),
    (
        ["--storage", "postgresql+psycopg://ann:secret@127.0.0.1:1/db"],
        "cannot open the storage postgresql+psycopg://ann:…@127.0.0.1:1/db",
    ),
    (["--device", "abacus"], "unknown device 'abacus': choose auto, cpu, cuda or cuda:N"),
    (["--device", "mps"], "unknown device 'mps'"),
    (["--device", "cuda:99"], "this machine has no device 'cuda:99'"),
    (["--out", "{tmp}/empty.txt/run"], "cannot write to"),
    (["--nonsense"], "--nonsense"),
]


@pytest.mark.usefixtures("empty")
@pytest.mark.parametrize(
    ("arguments", "words"), BAD, ids=lambda value: value if isinstance(value, str) else None
)
def test_bad_input_prints_one_line_and_returns_status_two(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("too short a text")
    (tmp_path / "wide.txt").write_text("wide text", encoding="utf-16")
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    if "--out" not in arguments:
        arguments += ["--out", str(tmp_path / "run")]
    quick = [] if "--budget" in arguments else QUICK
    assert run_main("race", "--task", "digits", *quick, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("steepest: error: ")
    assert words in captured.err
    assert not (tmp_path / "run" / "records.jsonl").exists()


@pytest.mark.parametrize("command", [["bench"], ["profile", "growth"]], ids=" ".join)
def test_a_file_in_the_place_of_the_directory_is_refused_before_measuring(
    command: list[str], empty: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steepest.lab.bench.run.bench", pytest.fail)
    assert cli.run([*command, "--out", str(empty)]) == 2
    assert f"{empty} is a file: choose another directory" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "line",
    [
        *("race --out", "sweep --out", "profile growth --out", "bench --out", "study sasrec --out"),
        *(
            "study ternary --out",
            "study sgd-sai-grid --out",
            "study horizon --out",
            "report",
            "report . --out",
        ),
        *("report . --markdown", "race --text", "study sasrec --data", "study sgd-sai-grid --data"),
        *("bench --model", "plan --shapes", "plan-sharded --mesh 8 --shapes", "race --storage"),
    ],
)
@pytest.mark.parametrize("blank", ["", " \t"])
def test_a_blank_path_is_refused_before_anything_is_done(
    line: str,
    blank: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run([*line.split(), blank]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("steepest: error: ")
    assert captured.err.count("\n") == 1
    assert "blank: is a variable not set?" in captured.err
    assert not [*tmp_path.iterdir()]


def test_a_tasks_path_is_not_blank_either() -> None:
    with pytest.raises(LabError, match="path '' is blank"):
        load_task("text", {"path": ""})


def test_an_unknown_command_suggests_a_similar_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main("rase") == 2
    assert "race" in capsys.readouterr().err


@pytest.mark.parametrize("budget", ["soon", "0", "-5m"])
def test_a_bad_budget_is_one_line(budget: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main("race", "--task", "digits", f"--budget={budget}", "--out", str(tmp_path)) == 2
    assert f"bad budget {budget!r}" in capsys.readouterr().err


def test_an_interrupt_prints_one_line_and_returns_status_130(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    arguments = ["race", "--task", "digits", *QUICK, "--out", str(tmp_path)]
    for place in (
        "lab.experiments.run.run_trial",
        "lab.tasks.load.load_task",
        "lab.cli.race.finish",
        "__main__.find_spec",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"steepest.{place}", interrupted)
            assert run_main(*arguments) == 130, place
        error = capsys.readouterr().err
        # After ^C, click prints the end of the line.
        assert error.lstrip("\n").startswith("interrupted"), place
        assert len(error.split("\n")) <= 3, place


def test_an_interrupt_during_imports_prints_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = builtins.__import__

    def interrupted(name: str, *rest: Any, **more: Any) -> Any:
        if name == "steepest.lab.cli":
            raise KeyboardInterrupt
        return load(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", interrupted)
    assert run_main("race") == 130
    assert capsys.readouterr().err == "interrupted before the race started\n"


def test_ctrl_c_ends_all_workers_and_the_same_command_finishes(tmp_path: Path) -> None:
    quick = ["--optimizers", "signgsd", "--trials", "2", "--seeds", "1", "--steps", "40", "--workers", "2"]
    (tmp_path / "slow.py").write_text(SLOW)
    arguments = ["race", "--task", "slow:task", *quick, "--out", "run"]
    process = subprocess.Popen(
        [sys.executable, "-c", WITHOUT_TIMING, *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background processes ignore Ctrl-C, so restore its default handling.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    begun = tmp_path / "begun"
    deadline = time.monotonic() + 90
    while len(begun.read_text().split()) < 2 if begun.exists() else True:
        assert time.monotonic() < deadline, "there are no two workers"
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.strip() == "interrupted"
    for pid in begun.read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
    assert read_records(tmp_path / "run") == []
    begun.with_name("go").touch()
    # At once: the interrupted trials do not look as if somebody ran them.
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr(sys, "path", [path for path in sys.path if path])
        patch.setattr("steepest.lab.cli.race.finish", lambda directory: 0)
        assert cli.run([*arguments, "--workers", "1"]) == 0
    assert Counter(r.phase for r in read_records(tmp_path / "run")) == {"search": 2, "tuned": 1, "default": 1}


WITHOUT_TIMING = """
from steepest.__main__ import main
from steepest.lab.experiments import sweep

sweep.training_costs = lambda *arguments: {}
main()
"""
SLOW = """
import os, time
from pathlib import Path
import torch
from steepest.lab import Metric, Task

def loss(model, batch):
    if not Path("go").exists():
        with open("begun", "a") as file:
            file.write(f"{os.getpid()} ")
        time.sleep(300)
    return model(batch).square().mean()

task = Task(
    name="slow",
    make=lambda seed: torch.nn.Linear(2, 1),
    batches=lambda seed: [torch.ones(4, 2)],
    loss=loss,
    evaluate=lambda model, split: {"m": model(torch.ones(1, 2)).square().item()},
    metrics=(Metric(name="m"),),
)
"""


def test_an_internal_error_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("steepest.lab.experiments.run.run_trial", broken)
    with pytest.raises(ZeroDivisionError):
        cli.run(["race", "--task", "digits", *QUICK, "--out", str(tmp_path)])


def test_without_the_lab_extra_one_line_says_how_to_install_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find, load = importlib.util.find_spec, builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        return None if name == "typer" else find(name, *rest)

    def refuse(name: str, *rest: Any, **more: Any) -> Any:
        if name == "typer":
            raise ModuleNotFoundError(name)
        return load(name, *rest, **more)

    monkeypatch.setattr(entry, "find_spec", missing)
    monkeypatch.setattr(builtins, "__import__", refuse)
    assert run_main("race") == 2
    error = capsys.readouterr().err
    assert error == 'steepest: the lab needs typer: pip install "steepest[lab]"\n'
    assert run_main("--version") == 0
    assert capsys.readouterr().out.startswith(f"steepest {steepest.__version__}, torch ")


def test_names_of_factories_are_no_emoji(capsys: pytest.CaptureFixture[str]) -> None:
    make_console().print("a step on mine:factory: 9 parameters")
    assert "mine:factory: 9" in capsys.readouterr().out


@pytest.mark.parametrize("failing", [False, True])
def test_a_worker_fails_only_if_nobody_stopped_it(failing: bool, capfd: pytest.CaptureFixture[str]) -> None:
    workers = Workers(["no such command" if failing else "race"], 2)
    workers.on_start(make_experiment(), [])
    if failing:
        workers._others[0].wait()
    else:
        time.sleep(0.02)  # the interpreter starts
    workers.on_end()
    assert ("a worker failed with status 2" in capfd.readouterr().err) == failing


def test_a_worker_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    endless = ["race", "--task", "digits", "--trials", "1", "--steps", "10000000", "--out", str(tmp_path)]
    workers = Workers(endless, 2)
    workers.on_start(make_experiment(), [])
    (worker,) = workers._others
    assert worker.stdin is not None
    worker.stdin.close()  # as the system does when a process is killed
    assert worker.wait(120) == INTERRUPTED


def test_a_profile_keeps_the_earlier_ones_on_the_page(tmp_path: Path) -> None:
    common = ["--task", "digits", "--steps", "3", "--points", "1", "--workers", "1", "--out", str(tmp_path)]
    for what in ("local-gain", "spectra"):
        assert run_main("profile", what, "--optimizers", "sgd", *common) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "local gain: digits" in page
    assert "update spectra: digits" in page
