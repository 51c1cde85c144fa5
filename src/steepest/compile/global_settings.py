"""torch's global settings that Dynamo guards on."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["global_settings"]


def global_settings() -> tuple[Any, ...]:
    """Return the settings that torch.compile specializes code on, besides the code's arguments.

    They belong in the key of all cached code: otherwise Dynamo would recompile it when one of them changes,
    in the middle of a step and on the user's tensors.
    """
    return (
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.is_autocast_cache_enabled(),
        *[(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")],
    )
