"""Drop-in replacements with the originals' names and signatures: change only the import line.

| original | here |
| --- | --- |
| ``ScaledOptum(params, lr=1e-2, weight_decay=0.0)`` | :class:`ScaledOptum`, on :class:`~steepest.SignGSD` |
| ``SGD_sai(params, lr, momentum, eps, weight_decay)`` | :class:`SGD_sai`, on :class:`~steepest.SGDSaI` |
| ``Simba(params, lr, window_size, threshold, weight_decay)`` | :class:`~steepest.Simba`, the same class |
| ``QUAD`` and ``Procrustes`` of quad_torch | :class:`~steepest.QUAD`, :class:`~steepest.Procrustes` |
| ``OrthogonalizedOptimizer`` to subclass | :class:`~steepest.OrthogonalizedOptimizer`, the same class |

Trajectories agree with the originals' to rounding, except where those have faults: see each class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from steepest.constructor import constructor
from steepest.distributed.local import is_dtensor, redistributed
from steepest.engine.layout import real_view
from steepest.engine.sums import Summand, moments
from steepest.hyperparameters import CommonOptions
from steepest.rule import Moments
from steepest.rules.orthogonalized import OrthogonalizedOptimizer
from steepest.rules.procrustes import Procrustes
from steepest.rules.quad import QUAD
from steepest.rules.sgd_sai import SGDSaI, gradient_scale, has_momentum
from steepest.rules.signgsd import SignGSD
from steepest.rules.simba import Simba

__all__ = ["QUAD", "OrthogonalizedOptimizer", "Procrustes", "SGD_sai", "ScaledOptum", "Simba"]


class ScaledOptum(SignGSD):
    r"""Sign descent as first published: p ← p − η(sign g + λ sign p), whose decay overshoots zero.

    State: none. Arguments, shapes, dtypes and errors are those of :class:`~steepest.SignGSD`, which has
    ``decay_overshoot=False`` by default and stops at zero.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0, 0.25]))
    >>> optimizer = ScaledOptum([weight], lr=0.5, weight_decay=1.0)
    >>> weight.grad = torch.tensor([1.0, 0.0])
    >>> optimizer.step()
    >>> weight.tolist()
    [0.0, -0.25]
    """

    @constructor
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        weight_decay: float = 0.0,
        *,
        decay_overshoot: bool = True,
        **common: Unpack[CommonOptions],
    ) -> None: ...

    def get_memory_mb(self, params: Iterable[Tensor] | None = None) -> float:
        """Return the MiB of the parameters themselves: the optimizer's, or the given ones.

        >>> ScaledOptum([torch.nn.Parameter(torch.zeros(1024, 256))]).get_memory_mb()
        1.0
        """
        if params is None:
            params = (param for group in self.param_groups for param in group["params"])
        return sum(param.numel() * param.element_size() for param in params) / 2**20


class SGD_sai(SGDSaI):
    r"""SGD-SaI with the signature of the ``sgd_sai`` package.

    Its trajectory equals the original's where that is sound. Intended differences: checkpoints keep the
    scale, a zero or non-finite first gradient does not freeze a tensor, a constant gradient's scale is
    capped at 10·√d and a single element's at 1, gradients that first appear later are measured then,
    ``momentum=0`` works, a closure is called once, nothing is printed.

    ``step()`` measures missing scales. As in the original, ``warmup_step()`` measures them in advance,
    ``has_warmup = True`` after loading a checkpoint is allowed (but not needed), and
    ``has_warmup = False`` makes the next step measure every scale again.

    Arguments, shapes, dtypes, state and errors are those of :class:`~steepest.SGDSaI`.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = SGD_sai([weight], lr=1.0, weight_decay=0.0)
    >>> weight.grad = torch.tensor([1.0, -1.0])
    >>> optimizer.step()
    >>> [round(value, 6) for value in weight.tolist()], optimizer.has_warmup
    ([-1.0, 1.0], True)
    """

    @constructor
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        momentum: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **common: Unpack[CommonOptions],
    ) -> None: ...

    # No step depends on it.
    _said_to_be_warm = False

    @property
    def has_warmup(self) -> bool:
        """Whether scales have been measured, or the user has set this to True.

        Setting it to False makes the next ``step()`` measure every scale again, while momentum continues;
        the old scale holds until a gradient can be measured. Setting it to True keeps the existing scales; a
        tensor without one is measured on its first gradient.
        """
        return self._said_to_be_warm or any(float(s.get("measured", 0.0)) != 0 for s in self.state.values())

    @has_warmup.setter
    def has_warmup(self, value: bool) -> None:
        self._said_to_be_warm = bool(value)
        for state in self.state.values():
            gsnr, measured = float(state.get("gsnr", 0.0)), float(state.get("measured", 0.0))
            if value and gsnr > 0 and measured == 0:
                state["measured"].fill_(1.0)
            elif not value and measured != 0:
                if not has_momentum(gsnr, measured):
                    state["gsnr"].zero_()
                state["measured"].zero_()

    @torch.no_grad()
    def warmup_step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Measure the scale of every tensor that has a gradient, without a step.

        A zero or non-finite gradient measures nothing: such a tensor is measured in a later step.

        Args:
            closure: evaluates the model and its gradients first; called once, with gradients enabled.

        Returns:
            The closure's result.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = [
            (param, group)
            for group in self.param_groups
            for param in (group["params"] if group["rule"] == self.rule.name else ())
            if param.grad is not None
        ]
        summed = moments([Summand(real_view(_local_grad(param)), param) for param, _ in found])
        for (param, group), sums in zip(found, summed, strict=True):
            self._keep_scale(param, sums, group)
        self._said_to_be_warm = True
        return loss

    def _keep_scale(self, param: Tensor, sums: Moments, group: Mapping[str, Any]) -> None:
        scale = gradient_scale(sums.numel, float(sums.total), float(sums.square), group)
        if scale is None:
            return
        state = self.state[param]
        gsnr, measured = float(state.get("gsnr", 0.0)), float(state.get("measured", 0.0))
        # The first step creates the rest of the state.
        precise = torch.promote_types(real_view(param).dtype, torch.float32)
        state["gsnr"] = torch.tensor(scale, dtype=precise, device="cpu")
        ahead = not has_momentum(gsnr, measured)
        state["measured"] = torch.tensor(-1.0 if ahead else 1.0, dtype=torch.float32, device="cpu")


def _local_grad(param: Tensor) -> Tensor:
    """Return a parameter's gradient, or this process's shard of it."""
    assert param.grad is not None
    if is_dtensor(param) and is_dtensor(param.grad):
        return redistributed(param.grad, param)
    return param.grad.to_dense()
