from __future__ import annotations

import pytest

from steepest.lab.bench import bench
from steepest.lab.bench.sections import ON_REQUEST
from steepest.lab.bench.sections.formats import FORMATS


def test_every_format_is_timed_beside_float32_with_the_bytes_of_its_state() -> None:
    (result,) = bench(["tiny"], ["lion", "adamw"], sections=["formats"], rounds=2, compiled=False).results
    assert len(result.rows) == 2 * len(FORMATS)
    for row in result.rows:
        assert (row["status"], row["how"], row["rounds"]) == ("ok", "eager", 2)
        assert row["ns"] > 0
    for optimizer, averages in (("lion", 1), ("adamw", 2)):
        own = [row for row in result.rows if row["optimizer"] == optimizer]
        assert own[0]["times_float"] == 1
        # A step count takes 4 bytes of 4,096 elements.
        bytes_of = [averages * each for each in (4, 2, 1.0625, 4, 1.0625, 1.0625)]
        masters = [0, 0, 0, 0, 1, 2]
        expected = [one + other for one, other in zip(bytes_of, masters, strict=True)]
        assert [row["bytes"] for row in own] == pytest.approx(expected, abs=0.002)
    assert [row["master"] for row in own][3:] == ["stochastic", "split8 stochastic", "split16"]


def test_it_runs_on_request_and_has_nothing_to_say_of_other_optimizers() -> None:
    assert "formats" in ON_REQUEST
    assert not bench(["tiny"], ["muon"], sections=["formats"], rounds=1).results
