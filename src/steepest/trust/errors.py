"""The errors of a proof that failed, and of one that cannot be begun."""

from __future__ import annotations

__all__ = ["CertifyRequestError", "VerificationError"]


class CertifyRequestError(ValueError):
    """What :func:`steepest.certify` is asked for makes no sense; a training's own errors are never of it."""


class VerificationError(Exception):
    """A step that did not do what its rule says; the message names the tensor, and what was seen instead."""
