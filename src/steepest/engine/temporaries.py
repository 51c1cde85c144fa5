"""How much memory a function takes while it runs, seen by running it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["peak_bytes"]


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes of the tensors that operations have made and nobody has dropped yet."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held: int = 0
        self.peak: int = 0
        # How many tensors look at a storage: views keep it alive.
        self._views: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {id(leaf) for leaf in tree_leaves((args, kwargs))}
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and id(leaf) not in given:
                self._hold(leaf)
        return made

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        where, size = storage._cdata, storage.nbytes()
        self._views[where] = self._views.get(where, 0) + 1
        if self._views[where] == 1:
            self.held += size
            self.peak = max(self.peak, self.held)
        weakref.finalize(tensor, self._drop, where, size).atexit = False

    def _drop(self, where: int, size: int) -> None:
        self._views[where] -= 1
        if self._views[where] == 0:
            del self._views[where]
            self.held -= size


def peak_bytes(act: Callable[[], object]) -> int:
    """The most bytes of tensors that ``act`` has made and holds at once; it is run to find out.

    What an operation takes within itself, as where it must cast what it is given, is not seen.

    >>> import torch
    >>> def act():
    ...     a = torch.ones(1000)
    ...     b = a + 1
    ...     del a, b
    ...     return torch.ones(500).sum()
    >>> peak_bytes(act)
    8000
    """
    watch = _Watch()
    with watch:
        act()
    return watch.peak
