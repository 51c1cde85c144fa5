"""The constructor that QUAD and Procrustes share."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from steepest.optimizer import Optimizer
from steepest.rules.psgd.options import PSGDOptions

__all__ = ["PSGD"]


class PSGD(Optimizer):
    """An optimizer by a PSGDRule; its subclasses say what the arguments mean."""

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
        **options: Unpack[PSGDOptions],
    ) -> None:
        super().__init__(
            params,
            rule=self.rule.name,
            lr=lr,
            lr_style=lr_style,
            momentum=momentum,
            weight_decay=weight_decay,
            max_size_dense=max_size_dense,
            max_skew_dense=max_skew_dense,
            preconditioner_lr=preconditioner_lr,
            preconditioner_init_scale=preconditioner_init_scale,
            noise_scale=noise_scale,
            dtype=dtype,
            **options,
        )
