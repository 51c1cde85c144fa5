"""Ternary weights, −1, 0 or 1 times a scale: 2 bits each, and moved by votes, without a float copy."""

from steepest.ternary.convert import Ternarized, densify, ternarize
from steepest.ternary.layer import TernaryLinear
from steepest.ternary.optimizer import TernaryOptimizer
from steepest.ternary.packing import from_base3, pack, to_base3, unpack
from steepest.ternary.schedule import annealed
from steepest.ternary.stats import FlipStats, LayerStats
from steepest.ternary.trainer import TernaryFlip

__all__ = [
    "FlipStats",
    "LayerStats",
    "Ternarized",
    "TernaryFlip",
    "TernaryLinear",
    "TernaryOptimizer",
    "annealed",
    "densify",
    "from_base3",
    "pack",
    "ternarize",
    "to_base3",
    "unpack",
]
