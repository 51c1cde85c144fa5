"""How much memory an optimizer's state takes, measured on the optimizer itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor
from torch.optim import Optimizer


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of state now allocated.

    An optimizer that counts itself (`state_bytes()`, as all of steepest's do) is asked; of any
    other, every tensor in `optimizer.state` is counted, storage shared by several once.

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
    """Every tensor in dicts and lists, however deep: some keep their factors so."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
