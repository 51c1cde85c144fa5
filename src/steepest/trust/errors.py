"""The error of a proof that failed."""

from __future__ import annotations

__all__ = ["VerificationError"]


class VerificationError(Exception):
    """A step that did not do what its rule says; the message names the tensor, and what was seen instead."""
