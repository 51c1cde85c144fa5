"""What torch's global settings are: torch.compile makes another graph where they differ."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["surroundings"]


def surroundings() -> tuple[Any, ...]:
    """What else torch compiles for: with it in a graph's key, none is compiled anew on a user's tensors."""
    return (
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.is_autocast_cache_enabled(),
        *[(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")],
    )
