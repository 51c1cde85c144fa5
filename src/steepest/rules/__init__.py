"""The rules: one optimizer a file, each its equation and its constructor side by side."""

from steepest.rule import ElementRule, Moments, Rule, TensorRule
from steepest.rules.adamw import AdamW, AdamWRule
from steepest.rules.lion import Lion, LionRule
from steepest.rules.sgd import SGD, SGDRule
from steepest.rules.sgd_sai import SGDSaI, SGDSaIRule
from steepest.rules.signgsd import SignGSD, SignGSDRule
from steepest.rules.signum import Signum, SignumRule
from steepest.rules.simba import Simba, SimbaRule
from steepest.rules.simba_leaky import SimbaLeaky, SimbaLeakyRule

__all__ = [
    "SGD",
    "AdamW",
    "AdamWRule",
    "ElementRule",
    "Lion",
    "LionRule",
    "Moments",
    "Rule",
    "SGDRule",
    "SGDSaI",
    "SGDSaIRule",
    "SignGSD",
    "SignGSDRule",
    "Signum",
    "SignumRule",
    "Simba",
    "SimbaLeaky",
    "SimbaLeakyRule",
    "SimbaRule",
    "TensorRule",
]
