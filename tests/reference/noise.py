"""The noise that Simba-leaky is given: that of steepest.random, by the key the library documents."""

import math

import torch

from steepest.random import derive_key, uniform


def leaky_noise(shape, *, seed=0, ordinal=0):
    """noise(t, stream) for the parameter at place ``ordinal`` of its optimizer."""
    index = torch.arange(math.prod(shape))
    return lambda t, stream: uniform(derive_key(seed, ordinal, t), index, stream).tolist()
