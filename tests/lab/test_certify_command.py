from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from .test_cli import run_main

module = import_module("steepest.trust.certify")  # its package has the function under this name

TESTS = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _in_the_folder_of_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(TESTS)


@pytest.mark.parametrize(
    ("function", "status", "first_words"),
    [
        (
            "job",
            0,
            "identical: 2 steps, save (torch.save), new process, load, 2 steps = 4 steps, in every bit",
        ),
        ("broken_job", 1, "NOT IDENTICAL: 2 steps, save (torch.save), new process"),
    ],
)
def test_the_verdict_is_printed_and_is_the_status(
    function: str,
    status: int,
    first_words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if status:  # one new process is enough to see that there is one
        monkeypatch.setattr(module, "in_new_process", lambda resume, folder: resume())
    assert run_main("certify", f"trust.trainings:{function}", "--steps", "4") == status
    printed = capsys.readouterr()
    assert printed.out.startswith(first_words)
    assert printed.err == ""
    if status:
        assert "from step 2 on, as it is loaded:\n  state momentum of 0.weight: missing\n" in printed.out
        assert "usual causes:\n  - the optimizer drops state" in printed.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trust.trainings:nothing"], "has no function 'nothing'"),
        (["trust.trainings"], "package.module:function"),
        (["trust.trainings:job", "--steps", "0"], "steps must be at least 1, got 0"),
        (["trust.trainings:job", "--via", "disk"], "via must be one of torch.save, dcp, dcp_flat"),
        (["trust.trainings:job", "--steps", "few"], "'--steps'"),
    ],
)
def test_bad_requests_are_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main("certify", *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("steepest: error: ")
    assert words in captured.err


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("raises", "ZeroDivisionError: the user's own"),
        ("loss_that_raises", "raise ValueError(\"the loss's own\")\nValueError: the loss's own"),
    ],
)
def test_an_error_of_the_users_own_has_its_traceback(
    function: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main("certify", f"trust.trainings:{function}") == 2
    assert words in capsys.readouterr().err
