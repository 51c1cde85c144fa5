from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from once import filled_once

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as ``make docs`` builds it: strictly, so not quietly, which would hide warnings."""
    pytest.importorskip("mkdocs", reason='the site\'s packages are not installed: pip install -e ".[docs]"')
    return filled_once(tmp_path_factory, "site", build)


def build(folder: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
