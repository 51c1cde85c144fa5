"""The contract's fixtures: ``rule`` is every rule with its defaults, ``case`` every variant of it too."""

from __future__ import annotations

import pytest
import torch

from .cases import CASES, RULES, Case, by_id


@pytest.fixture(params=CASES, ids=by_id)
def case(request: pytest.FixtureRequest) -> Case:
    """Every rule and every variant."""
    return request.param


@pytest.fixture(params=RULES, ids=by_id)
def rule(request: pytest.FixtureRequest) -> Case:
    """Every rule with its defaults."""
    return request.param


@pytest.fixture(autouse=True, scope="package")
def _one_thread():
    """Tensors of a few elements gain nothing from threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
