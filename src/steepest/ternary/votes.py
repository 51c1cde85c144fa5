"""Votes: what a gradient at a ternary weight says about the direction in which to move it."""

from __future__ import annotations

import torch
from torch import Tensor

from steepest.random import Key, stochastic_floor, uniform

__all__ = ["LARGEST_VOTE", "magnitude_votes", "sign_votes", "without_outward"]

# What a single vote may be at most, by kind.
LARGEST_VOTE = {"sign": 1, "magnitude": 7}
_LEVELS = LARGEST_VOTE["magnitude"]


def sign_votes(grad: Tensor) -> Tensor:
    """v = −sign(dT), int8; an infinite or NaN gradient has no vote.

    >>> sign_votes(torch.tensor([0.3, -2.0, 0.0, float("nan"), float("inf")])).tolist()
    [-1, 1, 0, 0, 0]
    """
    return torch.nan_to_num(grad, 0.0, 0.0, 0.0).sign().to(torch.int8).neg_()


def magnitude_votes(grad: Tensor, inverse_rms: Tensor, key: Key, index: Tensor) -> Tensor:
    """v = −round_s(clip(dT/rms(dT), −7, 7)), int8.

    Args:
        grad: dT, any shape.
        inverse_rms: 0-dim; 0 where there is no rms to speak of, and then there are no votes.
        key, index: of the noise of round_s, see :mod:`steepest.random`.

    >>> grad, index = torch.tensor([-2.0, 2.0, 100.0]), torch.arange(3)
    >>> magnitude_votes(grad, torch.tensor(1.0), (1, 2), index).tolist()
    [2, -2, -7]
    """
    scaled = (torch.nan_to_num(grad, 0.0, 0.0, 0.0) * inverse_rms).clamp(-_LEVELS, _LEVELS)
    return -stochastic_floor(scaled, uniform(key, index)).to(torch.int8)


def without_outward(votes: Tensor, values: Tensor) -> Tensor:
    """The votes, but none where the weight stands at its bound and the vote points outward.

    >>> votes, values = torch.tensor([[1, 1, -1, 1], [1, 0, 1, -1]], dtype=torch.int8)
    >>> without_outward(votes, values).tolist()
    [0, 1, -1, 1]
    """
    # Outward is where the product is positive: at a weight of 0 there is no outward. (Where would take
    # ten times as long as products.)
    return votes * (votes * values <= 0).view(torch.int8)
