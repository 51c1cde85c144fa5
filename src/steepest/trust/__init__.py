"""Proof that a run does what it says: that it resumes to the bit, and steps by its rule."""

from steepest.trust.applied import AppliedStep
from steepest.trust.certify import certify, certify_function
from steepest.trust.checkpoint import load_checkpoint, save_checkpoint
from steepest.trust.errors import CertifyRequestError, VerificationError
from steepest.trust.flat import flatten_state_dict, unflatten_state_dict
from steepest.trust.telemetry import DictCallback, Measurements, Telemetry, TensorBoardCallback, telemetry
from steepest.trust.verdict import Certificate, Difference
from steepest.trust.verify import Verification, verify

__all__ = [
    "AppliedStep",
    "Certificate",
    "CertifyRequestError",
    "DictCallback",
    "Difference",
    "Measurements",
    "Telemetry",
    "TensorBoardCallback",
    "Verification",
    "VerificationError",
    "certify",
    "certify_function",
    "flatten_state_dict",
    "load_checkpoint",
    "save_checkpoint",
    "telemetry",
    "unflatten_state_dict",
    "verify",
]
