"""TensorBoard: the training loss and the metrics of every trial."""

from __future__ import annotations

from pathlib import Path

from ..records import Record
from ..training.trial import Trial
from .callback import Callback
from .state import settings


class TensorBoard(Callback):
    """Writes a run per trial under `directory`; needs the package tensorboard."""

    def __init__(self, directory: Path) -> None:
        # Imported here, because it is optional and slow to import.
        from torch.utils.tensorboard import SummaryWriter

        self._open = SummaryWriter
        self._directory = directory

    def on_trial_start(self, trial: Trial) -> None:
        """Open the trial's run."""
        name = f"{trial.optimizer} {trial.phase} seed {trial.seed} {settings(dict(trial.values))}"
        self._writer = self._open(str(self._directory / name.replace("/", "-")))  # type: ignore[no-untyped-call]

    def on_step(self, step: int, loss: float) -> None:
        """Write the training loss."""
        self._writer.add_scalar("training loss", loss, step)  # type: ignore[no-untyped-call]

    def on_trial_end(self, record: Record) -> None:
        """Write the metrics and close the run."""
        for point in record.validation:
            for name, value in point.metrics.items():
                self._writer.add_scalar(f"validation/{name}", value, point.step)  # type: ignore[no-untyped-call]
        for name, value in (record.test or {}).items():
            self._writer.add_scalar(f"test/{name}", value, record.chosen_step)  # type: ignore[no-untyped-call]
        self._writer.close()  # type: ignore[no-untyped-call]
