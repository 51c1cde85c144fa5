"""A CUDA graph in miniature, on the CPU: the operations of a step, to be done again on the same memory.

As there, numbers that the host put into an operation stay what they were, and what the host reads or makes
of its own data cannot be recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from steepest.engine import compiled, compiled_sums
from steepest.engine.update import UpdateConfig

__all__ = ["Apart", "Recorded", "configure", "record_compiled"]

_aten = torch.ops.aten
_READS = {_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.is_nonzero.default}
_FROM_HOST = {_aten.lift_fresh.default, _aten.lift_fresh_copy.default}


class Recorded(TorchDispatchMode):
    """Records what runs within it.

    Args:
        at_home: tensors that live on the host, which it may read.
    """

    def __init__(self, at_home: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.at_home = {tensor.data_ptr() for tensor in at_home}
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _READS and args[0].data_ptr() not in self.at_home:
            raise AssertionError(f"the host reads a device's number: {func}")
        if func in _FROM_HOST:
            raise AssertionError("a tensor is made of the host's numbers")
        made = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, made))
        return made

    @torch.no_grad()
    def replay(self) -> None:
        """Do it all again."""
        for func, args, kwargs, made in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
                # What shares memory with an operand is there already.
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Apart(TorchDispatchMode):
    """Refuses operations in which the host's and a device's tensors meet: copies, and the host's numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        kinds = {leaf.device.type for leaf in tree_leaves((args, kwargs, made)) if isinstance(leaf, Tensor)}
        if len(kinds) > 1 or (func in _FROM_HOST and kinds != {"cpu"}):
            raise AssertionError(f"the host's tensors and a device's meet: {func}")
        return made


def configure(monkeypatch: pytest.MonkeyPatch, **values: Any) -> None:
    """Configure updates as on another machine: each attribute is given as a function of the group."""
    original = UpdateConfig.__post_init__

    def configured(self: UpdateConfig) -> None:
        original(self)
        for name, value in values.items():
            setattr(self, name, value(self.group))

    monkeypatch.setattr(UpdateConfig, "__post_init__", configured)


def record_compiled(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """Let compiled code be recorded, which goes past torch's dispatch: by the last of the list, if any."""
    recorders: list[Recorded] = []

    def watch(find_code: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*wanted: Any) -> Any:
            with _disable_current_modes():
                code = find_code(*wanted)
            assert code is not None

            def compute(*given: Any) -> None:
                code(*given)

            def run(*given: Any) -> None:
                with _disable_current_modes():
                    compute(*given)
                if recorders:
                    recorders[-1].calls.append((compute, given, {}, None))

            return run

        return watched

    for module in (compiled, compiled_sums):
        monkeypatch.setattr(module, "_code", watch(module._code))
    return recorders
