"""Compare the gradients that are stepped with those that backward delivered."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from steepest.engine.layout import real_view
from steepest.trust.applied import dense, widened
from steepest.trust.errors import VerificationError

__all__ = ["DeliveredGradients"]

_TOLERANCE = 0.01  # covers half precision's rounding; a second division is by 2 at least
_CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_'s


class DeliveredGradients:
    """The sums, since the gradients were last cleared, of what backward delivered to some parameters.

    Args:
        scale: what a stepped gradient must be over that sum, or a function that returns it at each step.
        max_norm: the norm to which ``torch.nn.utils.clip_grad_norm_`` clips all of them together, after that.
    """

    def __init__(self, scale: float | Callable[[], float], max_norm: float | None) -> None:
        self._scale, self._max_norm = scale, max_norm
        self._names: Mapping[Tensor, str] = {}
        self._sums: dict[Tensor, Tensor] = {}
        self._arriving: dict[Tensor, tuple[Tensor, bool]] = {}
        # What backward has added to since the last step, or since the gradients were cleared after it.
        self._arrived: set[Tensor] = set()
        self._hooks: dict[Tensor, list[RemovableHandle]] = {}

    def watch(self, params: Mapping[Tensor, str]) -> None:
        """Watch these parameters, given with their names for messages, from the next backward pass on."""
        self._names = params
        # Wrappers average the gradients of several processes, after they were delivered.
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            return
        for param in params.keys() - self._hooks.keys():
            if param.requires_grad and param.is_leaf:
                # Only both hooks together tell what is added to .grad from what torch.autograd.grad returns.
                watch: Any = param  # torch has no types for its hooks
                self._hooks[param] = [
                    watch.register_hook(partial(self._arrives, param)),
                    watch.register_post_accumulate_grad_hook(self._is_added),
                ]

    def remove(self) -> None:
        """Watch no longer."""
        for hook in (hook for hooks in self._hooks.values() for hook in hooks):
            hook.remove()
        self._hooks.clear()
        self._sums.clear()
        self._arriving.clear()
        self._arrived.clear()

    def step_taken(self) -> None:
        """Begin to note what arrives for the next step."""
        self._arrived.clear()

    def _arrives(self, param: Tensor, gradient: Tensor) -> None:
        fresh = param.grad is None or _is_zero(param.grad)
        self._arriving[param] = (gradient, fresh)

    @torch.no_grad()
    def _is_added(self, param: Tensor) -> None:
        if param not in self._arriving:
            return
        gradient, fresh = self._arriving.pop(param)
        gradient = dense(gradient.detach())
        if fresh:
            if param in self._arrived:  # no step has used what had arrived: all of it was discarded
                self._arrived.clear()
            self._sums[param] = gradient.clone()
        elif param in self._sums:  # not what was there before anybody watched
            self._sums[param] = self._sums[param] + gradient
        self._arrived.add(param)

    @torch.no_grad()
    def check(self, stepped: Collection[Tensor]) -> None:
        """Raise :class:`VerificationError` if a gradient is not what backward delivered, times the scale.

        Gradients to which no backward has added since the watch began are not compared, and where there are
        any, nor is the norm. Parameters that are not ``stepped`` belong to the norm alone.
        """
        for param in self._sums.keys() - self._arrived:
            if param.grad is None or _is_zero(param.grad):
                del self._sums[param]  # cleared, and backward has not reached it since
        for param in stepped:
            if param in self._arrived and param.grad is None:
                raise VerificationError(
                    f"{self._names[param]}: backward delivered a gradient, but the step found none: "
                    "something dropped it in between. If that is intended, pass gradient_scale=None"
                )
        given = [param for param in self._names if param.grad is not None]
        watched = [param for param in given if param in self._sums]
        if not watched:
            return
        scale = float(self._scale() if callable(self._scale) else self._scale)
        sums = {param: _wide(self._sums[param]) for param in watched}
        if not all(bool(total.isfinite().all()) for total in sums.values()):
            return  # skipped, or NaN whatever they are multiplied by
        expected: float | None = scale
        if self._max_norm is not None:
            if all(param in sums or _is_zero(param.grad) for param in given):
                norm = abs(scale) * torch.stack([total.norm().cpu() for total in sums.values()]).norm().item()
                expected = scale * min(1.0, self._max_norm / (norm + _CLIP_EPS))
            else:
                expected = None
        for param in watched:
            if param in stepped:
                self._compare(param, sums[param], expected)

    def _compare(self, param: Tensor, total: Tensor, expected: float | None) -> None:
        assert param.grad is not None
        stepped, name = _wide(dense(param.grad)), self._names[param]
        if not bool(stepped.isfinite().all()):
            return  # ``nonfinite`` says what becomes of it
        square = total.square().sum()
        factor = float((stepped * total).sum() / square) if float(square) > 0 else 0.0
        # What float16 cannot hold is lost in the division, not by anybody's mistake.
        least = torch.finfo(param.grad.dtype).smallest_normal * stepped.numel() ** 0.5
        off = float((stepped - factor * total).norm())
        if off > _TOLERANCE * float(stepped.norm()) + least:
            raise VerificationError(
                f"{name}: the gradient that was stepped is not the one that backward delivered, times a "
                "number: something changed it in between. If that is intended, pass gradient_scale=None"
            )
        if expected is None:
            return
        missed = float((stepped - expected * total).norm())
        if missed > _TOLERANCE * abs(expected) * float(total.norm()) + least:
            raise VerificationError(
                f"{name}: the gradient that was stepped is {factor:.6g} times what backward delivered "
                f"since it was cleared, and should be {expected:.6g} times that. Is it divided twice, or "
                "not at all? Pass what you intend: gradient_scale=1/k where the sum of k backward passes is "
                "averaged by hand, gradient_scale=lambda: 1 / scaler.get_scale() with a GradScaler, "
                "max_norm=c with clip_grad_norm_(parameters, c), gradient_scale=None for no such check"
            )


def _is_zero(gradient: Tensor | None) -> bool:
    return gradient is not None and not bool(dense(gradient).any())


def _wide(tensor: Tensor) -> Tensor:
    return widened(real_view(tensor))
