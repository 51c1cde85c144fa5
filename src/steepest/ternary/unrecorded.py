"""Warn when Transformers saves packed layers of which its config says nothing."""

from __future__ import annotations

import sys
import warnings

from torch import nn

from steepest.ternary.layer import TernaryLinear

__all__ = ["warn_when_saved"]


def warn_when_saved(model: nn.Module) -> None:
    """Let ``save_pretrained`` of a model of Transformers warn while nothing records its ternary layers.

    It calls nothing else of the model's than ``state_dict``, by which other code saves what it loads itself.
    """
    if hasattr(model, "save_pretrained") and _warn not in model._state_dict_pre_hooks.values():
        model.register_state_dict_pre_hook(_warn)  # type: ignore[no-untyped-call]


def _warn(model: nn.Module, prefix: str, keep_vars: bool) -> None:
    caller = sys._getframe(2)  # behind Module.state_dict
    module = caller.f_globals.get("__name__", "")
    if caller.f_code.co_name != "save_pretrained" or not module.startswith("transformers."):
        return
    recorded = getattr(model, "hf_quantizer", None) is not None
    if not recorded and any(isinstance(each, TernaryLinear) for each in model.modules()):
        warnings.warn(
            f"save_pretrained: the config of this {type(model).__name__} does not say which layers are "
            "ternary, so from_pretrained would make dense ones with random weights. Call "
            "steepest.integrations.transformers.record_ternary(model) before you save it",
            UserWarning,
            stacklevel=4,
        )
