"""Small models on one thread, and tables of one width."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _one_width(monkeypatch: pytest.MonkeyPatch):
    """What a table says must not depend on the terminal, or on a worker process without one."""
    monkeypatch.setenv("COLUMNS", "110")
