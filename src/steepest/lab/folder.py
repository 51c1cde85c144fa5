"""The folder a race lives in."""

from __future__ import annotations

from pathlib import Path

from .errors import LabError
from .records import RecordFile


class Folder:
    """Where plan, records, pictures and page lie."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.plan = path / "plan.json"
        self.page = path / "report.html"
        self.records = RecordFile(path / "records.jsonl")

    def open(self, *, fresh: bool = False) -> None:
        """Make the folder if it is not there, and make sure that it can be written to.

        Args:
            fresh: Delete what an earlier race left: its plan, records, page and pictures.

        Raises:
            LabError: it is not a folder, or cannot be written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()
            if fresh:
                for left in (self.plan, self.page, self.records.path, *self.path.glob("*.png")):
                    left.unlink(missing_ok=True)
        except OSError as error:
            raise LabError(f"cannot write to {self.path}: {error.strerror or error}") from error
        if self.records.path.exists() and not self.plan.exists():
            raise LabError(f"{self.path} holds trials without their plan; choose another folder or --fresh")
