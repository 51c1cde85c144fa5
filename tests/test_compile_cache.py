"""The cache of compiled code: built once, whoever asks; failures remembered, what may pass is not."""

import itertools
import threading
import time
import warnings

import pytest
import torch

from steepest.compile import cache
from steepest.compile.cache import CapturedTooSoon, NotCompiled, compiled_once, give_up


@pytest.fixture(autouse=True)
def _empty(monkeypatch):
    monkeypatch.setattr(cache, "_made", {})
    monkeypatch.setattr(cache, "_broken", set())


def failing(error, tried):
    def build():
        tried.append(error)
        raise error

    return build


def test_threads_that_ask_at_once_get_one_build():
    numbers = itertools.count()
    got, start = [], threading.Barrier(4)

    def build():
        time.sleep(0.05)
        return f"code {next(numbers)}"

    def ask():
        start.wait()
        got.append(compiled_once("key", build, "works"))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == ["code 0"] * 4
    assert compiled_once("another", build, "works") == "code 1"


def test_each_setting_of_torch_has_code_of_its_own():
    numbers = itertools.count()

    def ask():
        return compiled_once("key", lambda: f"code {next(numbers)}", "works")

    assert ask() == "code 0"
    with torch.autocast("cpu", torch.bfloat16):
        assert ask() == "code 1"
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert ask() == "code 2"
    finally:
        torch.set_default_dtype(before)
    assert ask() == "code 0"


def test_a_failure_is_final_and_said_once():
    tried = []
    with pytest.warns(RuntimeWarning) as said:
        assert compiled_once("key", failing(RuntimeError("\nno disk\nand more"), tried), "works") is None
    assert [str(each.message) for each in said] == ["steepest works without compilation: no disk"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled_once("key", lambda: "code", "works") is None
        assert compiled_once("another", lambda: "code", "works") == "code"
    assert len(tried) == 1


def test_an_error_without_words_is_named():
    with pytest.warns(RuntimeWarning, match=r"works without compilation: KeyError\(\)"):
        compiled_once("key", failing(KeyError(), []), "works")


def test_compilation_that_is_switched_off_is_asked_for_again():
    tried = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert compiled_once("key", failing(NotCompiled("off"), tried), "works") is None
        assert compiled_once("key", lambda: "code", "works") == "code"
    assert len(tried) == 2


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, CapturedTooSoon, KeyboardInterrupt])
def test_what_is_not_about_compiling_comes_through_and_is_forgotten(kind):
    with pytest.raises(kind, match="not now"):
        compiled_once("key", failing(kind("not now"), []), "works")
    assert compiled_once("key", lambda: "code", "works") == "code"


def test_code_that_fails_when_called_can_be_given_up():
    assert compiled_once("key", lambda: "code", "works") == "code"
    with pytest.warns(RuntimeWarning, match="works without compilation: too late$"):
        give_up("key", RuntimeError("too late"), "works")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        give_up("key", RuntimeError("again"), "works")
        assert compiled_once("key", lambda: "code", "works") is None
