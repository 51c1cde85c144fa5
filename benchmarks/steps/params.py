"""Parameters and gradients with a model's names and shapes, which all cases share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from steepest.lab.training.seeding import seeded
from steepest.model_shapes import ParamShape

_PARAM_STD, _GRAD_STD = 0.02, 0.1


@dataclass(frozen=True)
class SharedParams:
    """Parameters with their gradients.

    A step's time does not depend on the values, so all cases update the same parameters instead of
    copies. The gradients are constant, so values neither grow nor become denormal.
    """

    params: list[tuple[str, nn.Parameter]]
    grads: list[torch.Tensor]

    @classmethod
    def create(cls, tensors: Sequence[ParamShape], device: torch.device, dtype: torch.dtype) -> SharedParams:
        """Fill the tensors with reproducible normal random numbers."""
        with seeded(0):
            params = [
                (
                    t.name,
                    nn.Parameter(torch.empty(t.shape, device=device, dtype=dtype).normal_(0, _PARAM_STD)),
                )
                for t in tensors
            ]
            grads = [torch.empty_like(p, requires_grad=False).normal_(0, _GRAD_STD) for _, p in params]
        return cls(params, grads)

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters, equal to those of the gradients."""
        return sum(grad.nbytes for grad in self.grads)

    def set_grads(self) -> None:
        """Set every parameter's gradient, because some optimizers remove it in their step."""
        for (_, param), grad in zip(self.params, self.grads, strict=True):
            param.grad = grad

    def has_grads(self) -> bool:
        """Return whether every parameter still has its gradient."""
        return all(param.grad is grad for (_, param), grad in zip(self.params, self.grads, strict=True))

    def sample(self) -> torch.Tensor:
        """Return a copy of the first values of the first parameter, to detect whether a step changed them."""
        return self.params[0][1].detach().view(-1)[:4096].clone()


def meta_params(tensors: Sequence[ParamShape], dtype: torch.dtype) -> list[tuple[str, nn.Parameter]]:
    """Return parameters on the meta device, which have shapes but no memory."""
    return [(t.name, nn.Parameter(torch.empty(t.shape, device="meta", dtype=dtype))) for t in tensors]
