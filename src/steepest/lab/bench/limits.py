"""What a step cannot do without: bytes it must move, products it must compute."""

from __future__ import annotations

import torch

from .material import Material

AXPY = "axpy"
COPY = "copy"


def least_bytes(parameter_bytes: int, gradient_bytes: int, state_bytes: int) -> int:
    """Read the gradient, read and write parameters and state, each once.

    Example:
        >>> [least_bytes(4, 4, state) for state in (0, 4, 8)]  # sign descent, Lion, AdamW
        [12, 20, 28]
    """
    return 2 * parameter_bytes + gradient_bytes + 2 * state_bytes


def axpy_bytes(material: Material) -> int:
    """What p ← p + a·g moves: it reads both and writes one."""
    return least_bytes(material.nbytes, material.nbytes, 0)


def axpy(material: Material) -> None:
    """p ← p + a·g over all tensors: sign descent's traffic with hardly any arithmetic."""
    params = [param.detach() for _, param in material.params]
    torch._foreach_add_(params, material.grads, alpha=1e-9)


def copy_bytes(material: Material) -> int:
    """What p ← g moves: it reads one and writes the other."""
    return 2 * material.nbytes


def copy(material: Material) -> None:
    """p ← g over all tensors; no step minds what its parameters are."""
    torch._foreach_copy_([param.detach() for _, param in material.params], material.grads)
