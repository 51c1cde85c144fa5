"""Proof that a run does what it says: that it resumes to the bit, and steps by its rule."""

from steepest.trust.certify import certify, certify_function
from steepest.trust.checkpoint import load_checkpoint, save_checkpoint
from steepest.trust.flat import flatten_state_dict, unflatten_state_dict
from steepest.trust.verdict import Certificate, Difference

__all__ = [
    "Certificate",
    "Difference",
    "certify",
    "certify_function",
    "flatten_state_dict",
    "load_checkpoint",
    "save_checkpoint",
    "unflatten_state_dict",
]
