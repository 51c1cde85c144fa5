"""The noise that keeps a preconditioner's factors within bounds where there is no gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from steepest.random import Key, normal

__all__ = ["damping_noise"]

_STREAM = 3  # apart from the probes' 0 and 1


def damping_noise(key: Key, index: Callable[[], Tensor], shape: torch.Size) -> Tensor:
    """N(0, 1) for each element of a stack [batch, m, n] or [batch, n], float32.

    A matrix is Hankel, N_ij = z_(i+j) of m+n−1 draws: what damping needs of noise are its second moments,
    and E[N Nᵀ] = nI, E[Nᵀ N] = mI hold as for mn draws, whose making would take a quarter of the step.

    >>> key = torch.zeros(1, 1, 1, dtype=torch.int64), torch.ones(1, 1, 1, dtype=torch.int64)
    >>> damping_noise(key, lambda: torch.arange(6).view(1, 2, 3), torch.Size((1, 2, 3))).round(decimals=1)
    tensor([[[-0.4000, -1.2000,  1.5000],
             [-1.2000,  1.5000,  0.4000]]])
    """
    places = index()
    if len(shape) == 2:
        return normal(key, places, _STREAM)
    rows, columns = shape[-2:]
    # The draws of the first column's and the last row's elements, which all blocks have apart.
    border = torch.cat([places[:, :, 0], places[:, -1, 1:]], 1)
    words = [word.flatten(1) if isinstance(word, Tensor) else word for word in key]
    draws = normal((words[0], words[1]), border, _STREAM).contiguous()
    return draws.as_strided((len(draws), rows, columns), (draws.stride(0), 1, 1))
