"""Hugging Face Transformers: a ``Trainer`` callback, and checkpoints of models with ternary layers."""

from __future__ import annotations

from typing import Any

from steepest.integrations.failed_import import failed_import

try:
    from transformers import PreTrainedModel, Trainer, TrainerCallback
except ImportError as error:
    raise failed_import(__name__, ["transformers>=5.0", "accelerate"], error) from error

from steepest.integrations.hf_ternary import TernaryConfig, record_ternary
from steepest.integrations.measurements import Measures, measure, rates
from steepest.ternary import TernaryLinear

__all__ = ["SteepestCallback", "TernaryConfig", "record_ternary"]


class SteepestCallback(Measures, TrainerCallback):  # type: ignore[misc]
    """Explain the optimizer once, and add its measurements to the ``Trainer``'s logs.

    With every logged loss: the learning rate of each group in that step (``lr/muon``), ``skipped_steps``,
    ``state_bytes``, and for ternary layers ``ternary/flips`` and their kin. A model with ternary layers is
    prepared for saving by :func:`record_ternary`.

    ``Trainer(callbacks=[SteepestCallback()])`` puts them into ``trainer.state.log_history`` and on the
    screen. Reporters (TensorBoard, W&B) run before such callbacks; :meth:`add_to` places this one first.

    Args:
        show: called on the main process, when training begins, with ``explain()``'s table at the schedule's
            initial or peak rates; None: nothing is.

    Raises:
        TypeError: when training begins with an optimizer of another library.
    """

    def add_to(self, trainer: Trainer) -> None:
        """Add this callback to a trainer before its reporters, so that they report the numbers too."""
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Show the table, and prepare ternary layers for saving."""
        self._rates: dict[str, float] = {}
        self._explain(given["optimizer"], state.is_world_process_zero)
        model = given["model"]
        ternary = any(isinstance(module, TernaryLinear) for module in model.modules())
        if ternary and isinstance(model, PreTrainedModel) and getattr(model, "hf_quantizer", None) is None:
            record_ternary(model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Keep the rates of the step to come: the Trainer logs after its scheduler has moved."""
        self._rates = rates(self._unwrap(given["optimizer"]))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any) -> None:
        """Add the measurements to logs of the training loss."""
        if logs is None or "loss" not in logs:
            return
        numbers = self._rates | measure(self._unwrap(given["optimizer"]))
        logs |= numbers
        state.log_history[-1] |= numbers
