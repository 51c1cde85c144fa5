"""The constructor that QUAD and Procrustes share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from steepest.constructor import constructor
from steepest.hyperparameters import CommonOptions
from steepest.optimizer import Optimizer
from steepest.views import View

__all__ = ["PSGD"]


class PSGD(Optimizer):
    """An optimizer by a PSGDRule; its subclasses say what the arguments mean."""

    @constructor
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        lr_style: Literal["adam"] | None = "adam",
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        max_size_dense: float = 16384,
        max_skew_dense: float = 1.0,
        preconditioner_lr: float = 0.7,
        preconditioner_init_scale: float | None = None,
        noise_scale: float = 1e-9,
        dtype: torch.dtype | None = None,
        *,
        preconditioner_min_lr: float = 0.3,
        whiten: Literal["momentum", "gradient"] = "momentum",
        update_probability: float = 1.0,
        update_flat_steps: int = 1000,
        update_decay_steps: int = 1000,
        norm: Literal["bound", "exact"] = "bound",
        literal: bool = False,
        views: Mapping[str, View] | None = None,
        bucket_bytes: int = 1 << 28,
        **common: Unpack[CommonOptions],
    ) -> None: ...
