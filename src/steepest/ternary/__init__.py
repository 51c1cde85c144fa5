"""Ternary and binary weights, 2 bits or 1 bit each, trained by votes without a float copy."""

from steepest.ternary.convert import Ternarized, densify, ternarize
from steepest.ternary.layer import BinaryLinear, TernaryLinear
from steepest.ternary.packing import from_base3, pack, to_base3, unpack
from steepest.ternary.schedule import annealed
from steepest.ternary.stats import FlipStats, LayerStats
from steepest.ternary.trainer import TernaryFlip, flip_stats

__all__ = [
    "BinaryLinear",
    "FlipStats",
    "LayerStats",
    "Ternarized",
    "TernaryFlip",
    "TernaryLinear",
    "annealed",
    "densify",
    "flip_stats",
    "from_base3",
    "pack",
    "ternarize",
    "to_base3",
    "unpack",
]
