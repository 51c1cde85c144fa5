"""Proof that a run does what it says: that it resumes to the bit, and steps by its rule."""

from steepest.trust.applied import AppliedStep
from steepest.trust.errors import VerificationError
from steepest.trust.telemetry import DictCallback, Measurements, Telemetry, TensorBoardCallback, telemetry
from steepest.trust.verify import Verification, verify

__all__ = [
    "AppliedStep",
    "DictCallback",
    "Measurements",
    "Telemetry",
    "TensorBoardCallback",
    "Verification",
    "VerificationError",
    "telemetry",
    "verify",
]
