"""Memory of an optimizer's state, measured on the optimizer itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor
from torch.optim import Optimizer


def state_bytes(optimizer: Optimizer) -> int:
    """Return the bytes of optimizer state that are currently allocated.

    Calls the optimizer's own `state_bytes()` if it has one, as all of steepest's do. Otherwise sums
    the storages of all tensors in `optimizer.state`, counting a shared storage once.

    Example:
        >>> import torch
        >>> weight = torch.zeros(100, requires_grad=True)
        >>> weight.grad = torch.ones(100)
        >>> sgd = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        >>> sgd.step()
        >>> state_bytes(sgd)
        400
    """
    own = getattr(optimizer, "state_bytes", None)
    if callable(own):
        return int(own())
    storages = {}
    for tensor in _tensors(list(optimizer.state.values())):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr(), str(tensor.device)] = storage.nbytes()
    return sum(storages.values())


def _tensors(value: object) -> Iterator[Tensor]:
    """Yield every tensor in nested dicts and lists; some optimizers nest their factors."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
