"""Memory bandwidth: the bytes that a step must move, and axpy and copy to measure the bandwidth."""

from __future__ import annotations

import torch

from .params import SharedParams

AXPY = "axpy"
COPY = "copy"


def least_bytes(parameter_bytes: int, gradient_bytes: int, state_bytes: int) -> int:
    """Return the bytes to read the gradient once, and to read and write parameters and state once.

    Example:
        >>> [least_bytes(4, 4, state) for state in (0, 4, 8)]  # sign descent, Lion, AdamW
        [12, 20, 28]
    """
    return 2 * parameter_bytes + gradient_bytes + 2 * state_bytes


def axpy_bytes(shared: SharedParams) -> int:
    """Return the bytes that `axpy` moves: two reads and one write."""
    return least_bytes(shared.nbytes, shared.nbytes, 0)


def axpy(shared: SharedParams) -> None:
    """Compute p ← p + a·g over all tensors: the memory traffic of sign descent with minimal arithmetic."""
    params = [param.detach() for _, param in shared.params]
    torch._foreach_add_(params, shared.grads, alpha=1e-9)


def copy_bytes(shared: SharedParams) -> int:
    """Return the bytes that `copy` moves: one read and one write."""
    return 2 * shared.nbytes


def copy(shared: SharedParams) -> None:
    """Compute p ← g over all tensors; this does not affect the other timers, whatever the values."""
    torch._foreach_copy_([param.detach() for _, param in shared.params], shared.grads)
