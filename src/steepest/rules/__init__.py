"""The rules: one optimizer a file, each its equation and its constructor side by side."""

from steepest.rule import Moments, Rule, StateSpec
from steepest.rules.adam_mini import AdamMini, AdamMiniRule
from steepest.rules.adamw import AdamW, AdamWRule
from steepest.rules.ademamix import AdEMAMix, AdEMAMixRule
from steepest.rules.hyperball import Hyperball, HyperballRule
from steepest.rules.lion import Lion, LionRule
from steepest.rules.muon import Muon, MuonOptions, MuonRule
from steepest.rules.normuon import NorMuon, NorMuonRule
from steepest.rules.orthogonalized import OrthogonalizedOptimizer, OrthogonalizedRule
from steepest.rules.polargrad import PolarGrad, PolarGradRule
from steepest.rules.procrustes import Procrustes, ProcrustesRule
from steepest.rules.quad import QUAD, QUADRule
from steepest.rules.scion import Scion, ScionRule
from steepest.rules.sgd import SGD, SGDRule
from steepest.rules.sgd_sai import SGDSaI, SGDSaIRule
from steepest.rules.signgsd import SignGSD, SignGSDRule
from steepest.rules.signum import Signum, SignumRule
from steepest.rules.simba import Simba, SimbaRule
from steepest.rules.simba_leaky import SimbaLeaky, SimbaLeakyRule
from steepest.rules.soap import SOAP, SOAPRule

__all__ = [
    "QUAD",
    "SGD",
    "SOAP",
    "AdEMAMix",
    "AdEMAMixRule",
    "AdamMini",
    "AdamMiniRule",
    "AdamW",
    "AdamWRule",
    "Hyperball",
    "HyperballRule",
    "Lion",
    "LionRule",
    "Moments",
    "Muon",
    "MuonOptions",
    "MuonRule",
    "NorMuon",
    "NorMuonRule",
    "OrthogonalizedOptimizer",
    "OrthogonalizedRule",
    "PolarGrad",
    "PolarGradRule",
    "Procrustes",
    "ProcrustesRule",
    "QUADRule",
    "Rule",
    "SGDRule",
    "SGDSaI",
    "SGDSaIRule",
    "SOAPRule",
    "Scion",
    "ScionRule",
    "SignGSD",
    "SignGSDRule",
    "Signum",
    "SignumRule",
    "Simba",
    "SimbaLeaky",
    "SimbaLeakyRule",
    "SimbaRule",
    "StateSpec",
]
