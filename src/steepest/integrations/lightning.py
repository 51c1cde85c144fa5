"""Lightning: a callback that explains the optimizer and logs its measurements."""

from __future__ import annotations

from typing import Any

from steepest.integrations.failed_import import failed_import

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise failed_import(__name__, ["lightning>=2.4"], error) from error

from steepest.integrations.measurements import Measures, measure, rates

__all__ = ["SteepestCallback"]


class SteepestCallback(Measures, Callback):  # type: ignore[misc]
    """Explain the optimizer once, and log its measurements every ``log_every_n_steps`` steps.

    The loggers get the learning rate of each group in that step (``lr/muon``), ``skipped_steps``,
    ``state_bytes``, and for ternary layers ``ternary/flips`` and their kin; so does
    ``trainer.callback_metrics``. Lightning's own ``LearningRateMonitor`` shows the same groups under the same
    names.

    Args:
        show: called on the main process, when training begins, with ``explain()``'s table at the schedule's
            initial or peak rates; None: nothing is.

    Raises:
        TypeError: when training begins with an optimizer of another library.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the table of each optimizer."""
        self._last: int = trainer.global_step
        self._rates: dict[int, dict[str, float]] = {}
        for each in trainer.optimizers:
            self._explain(each, trainer.is_global_zero)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Keep the rates of the step to come: schedules move before the batch ends."""
        own = self._unwrap(optimizer)
        self._rates[id(own)] = rates(own)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        """Log, if a step was taken that is to be logged."""
        step = trainer.global_step
        if step == self._last or step % trainer.log_every_n_steps:
            return
        self._last = step
        numbers: dict[str, float] = {}
        for index, each in enumerate(trainer.optimizers):
            prefix = f"{index}/" if len(trainer.optimizers) > 1 else ""
            optimizer = self._unwrap(each)
            found = self._rates.get(id(optimizer), {}) | measure(optimizer)
            numbers |= {f"{prefix}{name}": value for name, value in found.items()}
        trainer.callback_metrics.update(numbers)
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=step)
