"""Frameworks that pin other releases than the tests': `make stacks` makes an environment for each."""

import sys
from pathlib import Path

import pytest


def needs_own_environment(stack: str) -> pytest.MarkDecorator:
    """Skip a test in every environment but ``.venv-NAME``, where nothing that is missing skips it."""
    reason = "needs an environment of its own: make stacks"
    return pytest.mark.skipif(Path(sys.prefix).name != f".venv-{stack}", reason=reason)
