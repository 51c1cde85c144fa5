"""The examples run in two processes, learn, and resume exactly."""

from __future__ import annotations

from typing import Any

import pytest

from processes import run_processes


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_processes("distributed.examples_job", 2, tmp_path_factory.mktemp("examples"))


def test_both_ranks_see_the_same_losses(done: list[dict[str, Any]]):
    assert done[0] == done[1]


def test_fsdp2_resumes_exactly(done: list[dict[str, Any]]):
    losses = done[0]["unbroken"]
    assert done[0]["begun"] + done[0]["resumed"] == losses
    assert losses[0] > 5.4  # of 256 bytes, log 256 = 5.5
    assert losses[-1] < 4.5


def test_tensor_parallelism_learns(done: list[dict[str, Any]]):
    losses = done[0]["tensor parallel"]
    assert losses[0] > 0.6
    assert losses[-1] < 0.45
