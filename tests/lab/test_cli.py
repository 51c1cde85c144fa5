from __future__ import annotations

import builtins
import importlib.util
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import steepest
from steepest.lab import __main__ as entry
from steepest.lab import cli
from steepest.lab.records import RecordFile

QUICK = ["--optimizers", "adamw,signgsd", "--trials", "2", "--seeds", "2", "--steps", "20"]


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
    for word in ("--task", "--optimizers", "--budget", "--steps", "--out", "--fresh", "--text", "Ctrl-C"):
        assert word in shown


def test_a_race_writes_its_directory_and_runs_no_trial_the_second_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["race", "--task", "digits", *QUICK, "--out", str(tmp_path / "run")]
    assert run_main(*arguments) == 0
    first = capsys.readouterr().out
    assert "[6/6]" in first
    assert "test accuracy" in first
    assert max(len(line) for line in first.splitlines()) <= 200
    assert f"report: {tmp_path / 'run' / 'report.html'}" in first
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"records.jsonl", "plan.json", "report.html", "summary.png", "summary-dark.png"} <= written
    assert run_main(*arguments) == 0
    again = capsys.readouterr().out
    assert "6 of them already done" in again
    assert "[6/6]" not in again


@pytest.mark.usefixtures("without_plots")
def test_the_text_race_trains_on_the_users_file(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("all work and no play makes a dull boy\n" * 200)
    shape = ["--width", "16", "--depth", "1", "--heads", "2", "--context", "16", "--batch", "4"]
    assert run_main("race", "--text", str(text), *shape, *QUICK, "--out", str(tmp_path / "run")) == 0
    assert (tmp_path / "run" / "report.html").exists()


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    path = tmp_path / "empty.txt"
    path.touch()
    return path


BAD: list[tuple[list[str], str]] = [
    (["--text", "{tmp}/missing.txt"], "no such file or directory"),
    (["--text", "{tmp}/empty.txt"], "no text in"),
    (["--text", "{tmp}/short.txt"], "too short"),
    (["--optimizers", "adamw,loin"], "'lion'"),
    (["--optimizers", ""], "name at least one, such as 'adamw'"),
    (["--optimizers", " , "], "no optimizers"),
    (["--optimizers", "lion,lion"], "twice"),
    (["--budget", "soon"], "bad budget 'soon'"),
    (["--budget", "0"], "bad budget '0'"),
    (["--budget=-5m"], "bad budget '-5m'"),
    (["--budget", "5m", "--steps", "10"], "not both"),
    (["--steps", "0"], "steps must be at least 1"),
    (["--steps", "-3"], "steps must be at least 1"),
    (["--steps", "many"], "'--steps'"),
    (["--trials", "0"], "trials must be at least 1"),
    (["--seeds", "0"], "seeds must be at least 1"),
    (["--threads", "0"], "threads must be at least 1"),
    (["--batch", "0"], "batch must be at least 1"),
    (["--width", "30"], "not a multiple of heads"),
    (["--task", "chess"], "chess"),
    (["--task", "digits", "--text", "{tmp}/short.txt"], "--text requires --task text"),
    (["--model", "mlp"], "--model requires --task digits"),
    (["--device", "abacus"], "no device 'abacus': give auto, cpu, cuda or cuda:N"),
    (["--device", "meta"], "no device 'meta': give auto, cpu, cuda or cuda:N"),
    (["--device", "mps"], "no device 'mps'"),
    (["--device", "cuda:99"], "no device 'cuda:99'"),
    (["--text", "{tmp}/wide.txt"], "UTF-16"),
    (["--out", "{tmp}/empty.txt/run", "--steps", "5"], "cannot write to"),
    (["--out", "{tmp}/empty.txt", "--steps", "5"], "cannot write to"),
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
    assert run_main("race", *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("steepest: error: ")
    assert words in captured.err
    assert not (tmp_path / "run" / "records.jsonl").exists()


def test_an_unknown_command_suggests_a_similar_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main("rase") == 2
    assert "race" in capsys.readouterr().err


@pytest.mark.usefixtures("without_plots")
def test_another_plan_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["race", "--task", "digits", *QUICK, "--out", str(tmp_path)]
    assert run_main(*arguments) == 0
    capsys.readouterr()
    assert run_main(*arguments, "--model", "convnet") == 2
    error = capsys.readouterr().err
    assert "config.model (mlp there, convnet asked)" in error
    assert "--fresh" in error
    assert run_main(*arguments, "--model", "convnet", "--fresh") == 0


def test_an_interrupt_prints_one_line_and_returns_status_130(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("steepest.lab.racing.run_trial", interrupted)
    assert run_main("race", "--task", "digits", *QUICK, "--out", str(tmp_path)) == 130
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "interrupted" in error
    monkeypatch.undo()
    monkeypatch.setattr("steepest.lab.report.PLOTS", ())
    assert run_main("race", "--task", "digits", *QUICK, "--out", str(tmp_path)) == 0


def test_an_interrupt_at_any_other_time_does_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    arguments = ["race", "--task", "digits", *QUICK, "--out", str(tmp_path)]
    race = "cli.race"
    for place in (
        f"{race}._task",
        f"{race}.make_console",
        "report.write",
        f"{race}.table",
        "cli.run",
        "__main__.find_spec",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"steepest.lab.{place}", interrupted)
            assert run_main(*arguments) == 130, place
        error = capsys.readouterr().err
        assert error.startswith("interrupted"), place
        assert error.count("\n") == 1, place


def test_an_interrupt_during_imports_prints_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = builtins.__import__

    def interrupted(name: str, *rest: Any, **more: Any) -> Any:
        if name == "cli":
            raise KeyboardInterrupt
        return load(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", interrupted)
    assert run_main("race") == 130
    assert capsys.readouterr().err == "interrupted before the race started\n"


def test_a_real_interrupt_leaves_complete_records(tmp_path: Path) -> None:
    race = [sys.executable, "-m", "steepest.lab", "race", "--task", "digits", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [*race, "--steps", "200", "--trials", "50"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background processes ignore Ctrl-C, so restore its default handling.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("[2/"):
            process.send_signal(signal.SIGINT)
            break
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == f"interrupted: run the same command again to resume in {tmp_path}\n"
    assert len(RecordFile(tmp_path / "records.jsonl").read()) >= 2


def test_an_internal_error_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("steepest.lab.racing.run_trial", broken)
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


def test_the_python_api_does_not_need_the_lab_extra() -> None:
    code = (
        "import sys\n"
        "for name in ('typer', 'rich', 'matplotlib', 'jinja2', 'sklearn'): sys.modules[name] = None\n"
        "from steepest.lab import race, Task\n"
        "from steepest.lab.tasks import text_task\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
