"""The output directory of a race."""

from __future__ import annotations

from pathlib import Path

from .errors import LabError
from .records import RecordFile


class RunDir:
    """The directory that holds plan, records, plots and report."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.plan = path / "plan.json"
        self.report = path / "report.html"
        self.records = RecordFile(path / "records.jsonl")

    def open(self, *, fresh: bool = False) -> None:
        """Create the directory if necessary and check that it is writable.

        Args:
            fresh: Delete the plan, records, report and plots of an earlier race.

        Raises:
            LabError: the path is not a directory or not writable, or its records have no plan.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()
            if fresh:
                for old in (self.plan, self.report, self.records.path, *self.path.glob("*.png")):
                    old.unlink(missing_ok=True)
        except OSError as error:
            raise LabError(f"cannot write to {self.path}: {error.strerror or error}") from error
        if self.records.path.exists() and not self.plan.exists():
            raise LabError(f"{self.path} holds trials without a plan; choose another directory or --fresh")
