"""The tensors that contestants share: parameters and gradients with a model's names and shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..seeding import seeded
from .shapes import Tensor

_WEIGHT, _GRADIENT = 0.02, 0.1


@dataclass(frozen=True)
class Material:
    """Parameters with their gradients.

    A step's time does not depend on the values, so all contestants step the same parameters, and none
    of them needs a copy of its own. The gradients stand still: nothing grows, nothing becomes denormal.
    """

    params: list[tuple[str, nn.Parameter]]
    grads: list[torch.Tensor]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], device: torch.device, dtype: torch.dtype) -> Material:
        """Normal numbers, the same ones each time."""
        with seeded(0):
            params = [
                (t.name, nn.Parameter(torch.empty(t.shape, device=device, dtype=dtype).normal_(0, _WEIGHT)))
                for t in tensors
            ]
            grads = [torch.empty_like(p, requires_grad=False).normal_(0, _GRADIENT) for _, p in params]
        return cls(params, grads)

    @property
    def numel(self) -> int:
        """How many parameters there are."""
        return sum(grad.numel() for grad in self.grads)

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters; the gradients are as many again."""
        return sum(grad.nbytes for grad in self.grads)

    def lend_gradients(self) -> None:
        """Give every parameter its gradient: some optimizers take it away in their step."""
        for (_, param), grad in zip(self.params, self.grads, strict=True):
            param.grad = grad

    def has_gradients(self) -> bool:
        """Whether every parameter still has the gradient that it was lent."""
        return all(param.grad is grad for (_, param), grad in zip(self.params, self.grads, strict=True))

    def sample(self) -> torch.Tensor:
        """The first numbers of the first parameter, copied: has a step moved anything?"""
        return self.params[0][1].detach().view(-1)[:4096].clone()


def blank(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[tuple[str, nn.Parameter]]:
    """The parameters on the meta device: they have shapes and no memory."""
    return [(t.name, nn.Parameter(torch.empty(t.shape, device="meta", dtype=dtype))) for t in tensors]


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Run a block with so many CPU threads."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def available_bytes(device: torch.device) -> int:
    """Memory that can be had now, in bytes; on a system that does not say, four gibibytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 << 30
