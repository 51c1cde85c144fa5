"""Laws: what must hold of an applied step, whatever code took it. Each family of rules has a file.

A law takes an :class:`~steepest.trust.applied.AppliedStep` and returns what is wrong with it, or None. No law
runs the rule: they are properties of its result, so that they also find faults of the rule's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from steepest.trust.applied import AppliedStep
from steepest.trust.laws.orthogonal import (
    holds_the_norm,
    is_scaled_by_its_dual_norm,
    keeps_the_polar_norm,
    singular_values_in_band,
)
from steepest.trust.laws.psgd import is_clipped_and_whitens
from steepest.trust.laws.sgd_sai import is_momentum_times_a_constant
from steepest.trust.laws.sign import is_a_sign

__all__ = ["LAWS", "Law"]

Law = Callable[[AppliedStep], "str | None"]

LAWS: Mapping[str, Law] = MappingProxyType(
    {
        **dict.fromkeys(("signgsd", "signum", "lion", "simba", "simba_leaky"), is_a_sign),
        **dict.fromkeys(("muon", "scion"), singular_values_in_band),
        "polargrad": is_scaled_by_its_dual_norm,
        "normuon": keeps_the_polar_norm,
        "hyperball": holds_the_norm,
        **dict.fromkeys(("quad", "procrustes"), is_clipped_and_whitens),
        "sgd_sai": is_momentum_times_a_constant,
    }
)
"""The laws of rules by name; a rule without one is compared with its own step on a copy alone."""
