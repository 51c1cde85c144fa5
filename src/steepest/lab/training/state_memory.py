"""Memory of an optimizer's state, measured on the optimizer itself."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves


def state_bytes(optimizer: Optimizer) -> int:
    """Return the bytes of optimizer state that are currently allocated.

    Calls the optimizer's own `state_bytes()` if it has one, as all of steepest's do. Otherwise sums the
    storages of all tensors in `optimizer.state`, nested ones too, counting a shared storage once.

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
    for leaf in tree_leaves([*optimizer.state.values()]):
        if isinstance(leaf, Tensor):
            storage = leaf.untyped_storage()
            storages[storage.data_ptr(), str(leaf.device)] = storage.nbytes()
    return sum(storages.values())
