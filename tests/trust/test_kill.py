"""A process that is killed while it saves leaves a checkpoint that loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the killed processes are forks")


@pytest.mark.slow
def test_it_is_killed_hundreds_of_times_and_a_whole_checkpoint_is_there_each_time(tmp_path: Path):
    """At random, where faults found in one run have their seed; and before and after every call in turn."""
    memory = Path("/dev/shm")  # a disk would spend the time on fsync, and renames there are the same
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        done = subprocess.run(
            [sys.executable, "-m", "trust.kill_saves", folder, "300"],
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
        )
    assert done.stdout, done.stderr
    results = json.loads(done.stdout)
    assert [each["faults"] for each in results.values()] == [[], []]
    assert results["random"]["killed"] == 300
    # A save passes some thirty moments, with zero, one and two checkpoints there before it.
    assert results["calls"]["killed"] > 80
