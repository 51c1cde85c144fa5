"""A loop in one test runs every case and names those that fail."""

from __future__ import annotations

import pytest

from loops import for_each


def test_all_cases_run_and_the_failing_ones_are_named():
    seen = []

    @for_each("low", [0, 5])
    @for_each(("name", "number"), [("one", 1), ("six", 6)])
    def larger(fixture: str, name: str, number: int, low: int) -> None:
        seen.append((fixture, name, number, low))
        assert number > low
        if name == "six":
            with pytest.raises(ValueError, match="never"):
                pass

    with pytest.raises(AssertionError) as error:
        larger(fixture="given")
    assert seen == [("given", *each, low) for low in (0, 5) for each in (("one", 1), ("six", 6))]
    words = str(error.value)
    assert words.startswith("2 of 2 fail\nwith {'low': 0}: AssertionError: 1 of 2 fail")
    assert words.count("'six'") == 2
    assert words.count("'one'") == 1
    assert words.count("DID NOT RAISE") == 2


def test_a_case_that_skips_does_not_hide_those_after_it():
    seen = []

    @for_each("number", [1, 2])
    def skipping(number: int) -> None:
        seen.append(number)
        if number == 1:
            pytest.skip("the first")

    with pytest.raises(AssertionError) as error:
        skipping()
    assert str(error.value) == "1 of 2 fail\nwith {'number': 1}: Skipped: the first"
    assert seen == [1, 2]


def test_a_loop_without_cases_is_refused():
    with pytest.raises(AssertionError):
        for_each("x", [])
