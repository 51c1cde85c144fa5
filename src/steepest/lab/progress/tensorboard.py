"""TensorBoard: the training loss and the metrics of every trial."""

from __future__ import annotations

from collections.abc import Mapping
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
        self._running = ""

    def on_trial_start(self, trial: Trial) -> None:
        """Open the trial's run."""
        self._running = _name(trial.optimizer, trial.phase, trial.seed, trial.values)
        self._writer = self._open(str(self._directory / self._running))

    def on_step(self, step: int, loss: float) -> None:
        """Write the training loss."""
        self._writer.add_scalar("training loss", loss, step)

    def on_trial_end(self, record: Record) -> None:
        """Write the metrics and close the run; of another worker's trial, write the training loss too."""
        name = _name(record.optimizer, record.phase, record.seed, record.searched)
        own = name == self._running
        writer = self._writer if own else self._open(str(self._directory / name))
        for step, _, loss in [] if own else record.training_loss:
            writer.add_scalar("training loss", loss, step)
        for point in record.validation:
            for metric, value in point.metrics.items():
                writer.add_scalar(f"validation/{metric}", value, point.step)
        for metric, value in (record.test or {}).items():
            writer.add_scalar(f"test/{metric}", value, record.chosen_step)
        writer.close()


def _name(optimizer: str, phase: str, seed: int, values: Mapping[str, float]) -> str:
    return f"{optimizer} {phase} seed {seed} {settings(values)}".replace("/", "-")
