"""Turn gradients at the weights T into votes: small integers that say in which direction to move."""

from __future__ import annotations

import torch
from torch import Tensor

from steepest.random import Key, stochastic_floor, uniform

__all__ = ["LARGEST_VOTE", "magnitude_votes", "sign_votes", "without_outward"]

# The largest size of a single vote, by kind.
LARGEST_VOTE = {"sign": 1, "magnitude": 7}
_LARGEST = LARGEST_VOTE["magnitude"]


def sign_votes(grad: Tensor) -> Tensor:
    """Return v = −sign(dT), int8; 0 where the gradient is infinite or NaN.

    >>> sign_votes(torch.tensor([0.3, -2.0, 0.0, float("nan"), float("inf")])).tolist()
    [-1, 1, 0, 0, 0]
    """
    return torch.nan_to_num(grad, 0.0, 0.0, 0.0).sign().to(torch.int8).neg_()


def magnitude_votes(grad: Tensor, inverse_rms: Tensor, key: Key, index: Tensor) -> Tensor:
    """Return v = −round_s(clip(dT/rms(dT), −7, 7)), int8; round_s is stochastic.

    Args:
        grad: dT, any shape.
        inverse_rms: 0-dim; 0, for no votes at all, where there is no usable rms.
        key, index: of the noise of round_s, see :mod:`steepest.random`.

    >>> grad, index = torch.tensor([-2.0, 2.0, 100.0]), torch.arange(3)
    >>> magnitude_votes(grad, torch.tensor(1.0), (1, 2), index).tolist()
    [2, -2, -7]
    """
    scaled = (torch.nan_to_num(grad, 0.0, 0.0, 0.0) * inverse_rms).clamp(-_LARGEST, _LARGEST)
    return -stochastic_floor(scaled, uniform(key, index)).to(torch.int8)


def without_outward(votes: Tensor, values: Tensor) -> Tensor:
    """Drop the votes that point outward at a weight of ±1.

    >>> votes, values = torch.tensor([[1, 1, -1, 1], [1, 0, 1, -1]], dtype=torch.int8)
    >>> without_outward(votes, values).tolist()
    [0, 1, -1, 1]
    """
    # Outward votes have the weight's sign; at 0 there are none. (torch.where takes ten times as long.)
    return votes * (votes * values <= 0).view(torch.int8)
