"""A placeholder for a gradient that was applied in backward and freed, which warns if something reads it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

__all__ = ["FreedGradient", "warn_once"]


class FreedGradient(Tensor):
    """Zeros of a gradient's shape that take no memory, call ``read`` when used, and cannot be written.

    Gradient clipping and logged norms read gradients between backward and step. Without a gradient they are
    silent: ``torch.nn.utils.clip_grad_norm_`` passes over parameters whose ``grad`` is None, and returns 0.
    """

    read: Callable[[], None]

    @staticmethod
    def __new__(cls, grad: Tensor, read: Callable[[], None]) -> FreedGradient:
        """Make the placeholder of a gradient."""
        made: FreedGradient = Tensor._make_wrapper_subclass(
            cls, grad.shape, strides=grad.stride(), dtype=grad.dtype, device=grad.device
        )
        made.read = read
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"FreedGradient of shape {tuple(self.shape)}"

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = [each for arg in args for each in (arg if isinstance(arg, (list, tuple)) else (arg,))]
        next(each for each in [*given, *(kwargs or {}).values()] if isinstance(each, FreedGradient)).read()
        if func._schema.is_mutable:
            if isinstance(args[0], FreedGradient):
                return args[0]
            # Of lists, such as torch._foreach_mul_'s, the others are still written.
            kept = [at for at, each in enumerate(args[0]) if not isinstance(each, FreedGradient)]
            count = len(args[0])
            args = [
                [arg[at] for at in kept] if isinstance(arg, (list, tuple)) and len(arg) == count else arg
                for arg in args
            ]
            return func(*args, **(kwargs or {})) if kept else None
        return func(*tree_map(_zeros, tuple(args)), **tree_map(_zeros, dict(kwargs or {})))


def _zeros(value: Any) -> Any:
    if not isinstance(value, FreedGradient):
        return value
    return torch.zeros((), dtype=value.dtype, device=value.device).expand(value.shape)


def warn_once() -> Callable[[str], None]:
    """Return a function that warns, the first time it is called, that a parameter's gradient is gone."""
    told = False

    def read(who: str) -> None:
        nonlocal told
        if not told:
            told = True
            warnings.warn(
                f"the gradient of {who} was read after backward, which stepped the parameter and freed "
                "it: clipping between backward and step has no effect, and a norm computed there is 0. "
                "To clip, pass clip_norm= or clip_value= to release_gradients, and turn the other clipping "
                "off (max_grad_norm=0 in Hugging Face's Trainer, gradient_clip_val=None in Lightning's). "
                "With max_grad_norm=0 that Trainer still reads the norm to log it, which does no harm",
                UserWarning,
                stacklevel=4,
            )

    return read
