"""Whatever is wrong with one of several real processes ends in an error on all, and never in waiting."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .gloo_job import FAULTS

DIFFER = "RuntimeError: the processes have different parameters or options; nothing was changed"
SAID: dict[str, Any] = {
    "missing": ["RuntimeError: parameter 'b' has a gradient on 1 of 2 processes; nothing was changed"] * 2,
    "none": ["no error"] * 2,
    **dict.fromkeys(("order", "number", "lr", "option", "rule"), [DIFFER] * 2),
    "skip": ["no error"] * 2,
    "raise": [
        "FloatingPointError: a gradient has infinite or NaN elements on another process",
        "FloatingPointError: the gradient of parameter 'b' has 1 infinite or NaN of 4 elements",
    ],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_all_processes_say_what_is_wrong_with_one(fault: str, processes: list[Any]):
    for done, said in zip(processes, SAID[fault], strict=True):
        found = done["failures"][fault]
        assert found["said"].startswith(said)
        assert (found["untouched"], found["states"]) == (True, 0)
        assert found["skipped"] == (fault == "skip")


def test_parameters_put_in_place_of_others_are_stepped_and_their_states_layout_is_checked(
    processes: list[Any],
):
    for done in processes:
        stepped, refused, new, again = done["failures"]["replaced"]
        assert stepped == "no error"
        assert new.eq(0.5).all()
        assert refused.startswith("ValueError: a parameter of shape (4, 2) was resharded after a step")
        assert "load a checkpoint" in refused
        assert again.eq(1).all()


def test_groups_that_are_gone_are_named_and_new_ones_are_found(processes: list[Any]):
    for done in processes:
        first, gone, anew, *_ = done["lost"]["said"]
        assert (first, anew) == ("no error", "no error")
        assert gone.startswith(
            "RuntimeError: parameter 'w' lies on a mesh whose process group is gone (Could"
        )
        assert torch.equal(done["lost"]["param"], torch.full((2, 2), 1 - 2 * 0.125))


def test_a_process_that_has_ended_is_torchs_error(processes: list[Any]):
    assert len(processes[1]["lost"]["said"]) == 3
    assert processes[0]["lost"]["said"][3].startswith("RuntimeError: ")
