"""The noise for Simba-leaky, from steepest.random with the documented key."""

import math

import torch

from steepest.random import derive_key, uniform


def leaky_noise(shape, *, seed=0, ordinal=0):
    """Return noise(t, stream) for the parameter at index ``ordinal`` in its optimizer."""
    index = torch.arange(math.prod(shape))
    return lambda t, stream: uniform(derive_key(seed, ordinal, t), index, stream).tolist()
