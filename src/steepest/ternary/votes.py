"""Turn gradients at the weights T into votes: small integers that say in which direction to move."""

from __future__ import annotations

import torch
from torch import Tensor

from steepest.random import Key, stochastic_floor, uniform

__all__ = ["LARGEST_VOTE", "magnitude_votes", "sign_votes", "without_outward"]

# The largest size of a single vote, by kind.
LARGEST_VOTE = {"sign": 1, "magnitude": 7}


def sign_votes(grad: Tensor) -> Tensor:
    """Return v = −sign(dT), int8; 0 where the gradient is infinite or NaN."""
    return torch.nan_to_num(grad, 0.0, 0.0, 0.0).sign().to(torch.int8).neg_()


def magnitude_votes(grad: Tensor, inverse_rms: Tensor, key: Key, index: Tensor) -> Tensor:
    """Return v = −round_s(clip(dT/rms(dT), −7, 7)), int8; round_s is stochastic.

    ``inverse_rms``, 0-dim, is 0, for no votes at all, where there is no usable rms.
    """
    scaled = (torch.nan_to_num(grad, 0.0, 0.0, 0.0) * inverse_rms).clamp(-7, 7)
    return -stochastic_floor(scaled, uniform(key, index)).to(torch.int8)


def without_outward(votes: Tensor, values: Tensor) -> Tensor:
    """Drop the votes that point outward at a weight of ±1."""
    # Outward votes have the weight's sign; at 0 there are none. (torch.where takes ten times as long.)
    return votes * (votes * values <= 0).view(torch.int8)
