"""Simba: integer counters of gradient signs, and its ablations."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from steepest.arithmetic import average_in_place
from steepest.constructor import constructor
from steepest.hyperparameters import (
    CommonOptions,
    Hyperparameter,
    at_least,
    betas,
    choice,
    fraction,
    integer,
    learning_rate,
)
from steepest.optimizer import Optimizer
from steepest.rule import Group, Rule, Scalar, StateSpec

__all__ = ["Simba", "SimbaRule"]


class SimbaRule(Rule):
    """d = sign(s) where |s| > ⌊wγ⌋, else sign(g);   p ← p − η·d;   s ← clamp(s + sign(g), −w, w)."""

    name = "simba"
    hyper = {
        "lr": learning_rate(),
        "window_size": integer(low=1, high=32766),
        "threshold": fraction(closed=True),
        "weight_decay": at_least(0),
        "counter_dtype": choice(torch.int16, torch.int8),
        "memory": choice("counts", "momentum"),
        "choice": choice("threshold", "lion", "memory"),
        "betas": betas(2),
        "leak": Hyperparameter(lambda value: value is None, "None: a leaky group has 'rule': 'simba_leaky'"),
    }

    temporaries = 5

    def check(self, owner: str, group: Group) -> None:
        """Refuse a window w for which w + 1 would wrap around in the counters' dtype."""
        super().check(owner, group)
        largest = torch.iinfo(group["counter_dtype"]).max - 1
        if group["window_size"] > largest:
            raise ValueError(
                f"{owner}: window_size must be ≤ {largest} with counter_dtype={group['counter_dtype']}, "
                f"got {group['window_size']!r}"
            )

    def state_specs(self, group: Group) -> dict[str, StateSpec]:
        """Return counters, a momentum, or both, depending on the ablation."""
        specs = {}
        if group["memory"] == "counts" or group["choice"] == "threshold":
            specs["counts"] = StateSpec(dtype=group["counter_dtype"])
        if group["memory"] == "momentum" or group["choice"] == "lion":
            specs["exp_avg"] = StateSpec(range="signed", beta=group["betas"][1])
        return specs

    def scalars(self, step: Scalar, **hyper: Any) -> dict[str, Scalar]:
        """Compute ⌊wγ⌋ exactly: ⌊100·0.29⌋ is 29, though the floating point product is smaller."""
        return {"cutoff": float(math.floor(round(hyper["window_size"] * hyper["threshold"], 9)))}

    def update(
        self,
        grad: Tensor,
        param: Tensor,
        counts: Tensor | None = None,
        exp_avg: Tensor | None = None,
        *,
        window_size: int,
        cutoff: Scalar,
        memory: str,
        choice: str,
        betas: tuple[Any, Any],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the direction from the memory as it was before this gradient."""
        beta1, beta2 = betas
        local = grad.sign()
        remembered = counts if memory == "counts" else exp_avg
        assert remembered is not None
        direction = remembered.sign()
        if choice == "threshold":
            assert counts is not None
            # local + trusted·(direction − local) in place, with trusted 0 or 1: exact, and torch.where takes
            # thirty times as long on a CPU if the condition is unpredictable.
            trusted = counts.abs()
            trusted.gt_(cutoff)
            direction -= local
            direction *= trusted
            direction += local
        elif choice == "lion":
            assert exp_avg is not None
            # Its sign tells which is larger. If both are equal but disagree in sign, Lion's interpolation
            # is 0: half of their sum, truncated.
            larger = exp_avg.abs()
            larger *= beta1
            larger -= (1 - beta1) * grad.abs()
            larger.sign_()
            direction += larger * direction
            larger *= local
            direction -= larger
            direction += local
            direction *= 0.5
            direction.trunc_()
        state = {}
        if counts is not None:
            local += counts
            state["counts"] = local.clamp_(-window_size, window_size)
        if exp_avg is not None:
            state["exp_avg"] = average_in_place(exp_avg, beta2, grad)
        return direction, state


class Simba(Optimizer, rule=SimbaRule()):
    r"""Sign descent that trusts a counter of past signs where it is clear, the gradient's sign elsewhere.

    .. math::
        d = \begin{cases} \mathrm{sign}(s) & |s| > \lfloor w\gamma \rfloor \\
                          \mathrm{sign}(g) & \text{else} \end{cases}, \qquad
        p \leftarrow p - \eta\lambda p - \eta d, \qquad
        s \leftarrow \mathrm{clamp}(s + \mathrm{sign}(g), -w, w)

    The counter is a clamped random walk, not a sliding window: on pure noise it is uniform on
    [−w, w], and it forgets slowly after a reversal; :class:`SimbaLeaky`, or ``leak`` here, fixes that.

    State: ``counts``, integers of the parameter's shape: 2 bytes per parameter in int16, 1 in int8.
    The ablations that use a momentum hold ``exp_avg`` too, or instead (4 bytes in float32).

    Args:
        params: tensors, ``(name, tensor)`` pairs, or group dicts.
        lr: learning rate η ≥ 0, a float or a 1-element tensor: how far every coordinate moves.
        window_size: w, at most 32766 with int16 counters and 126 with int8.
        threshold: γ in [0, 1]; γ·w < 1 trusts every counter that is not 0.
        weight_decay: λ ≥ 0, acting as ``weight_decay_method`` says.
        counter_dtype: ``torch.int16`` or ``torch.int8``.
        memory: the remembered sign: of ``"counts"``, or of ``"momentum"`` m ← β₂m + (1−β₂)g.
        choice: when it is used: ``"threshold"`` as above, ``"lion"`` where β₁|m| > (1−β₁)|g|, or
            ``"memory"`` always.
        betas: β₁ of Lion's comparison, β₂ of the momentum.
        leak: None, or a rate in (0, 1]: run the rule of :class:`SimbaLeaky`, which has no window,
            threshold, memory or choice.
        **common: see :class:`~steepest.CommonOptions`.

    Raises:
        TypeError: an unknown keyword, or parameters that are not tensors.
        ValueError: a value out of range, a window that the counters cannot hold, options that have no
            meaning with ``leak``; a parameter that cannot be optimized, by name.

    Tuning:
        - ``lr``: measured here: AdamW's on a small GPT, 0.18 times AdamW's on digits
          (docs/learning_rates.md).
        - ``weight_decay``: keep AdamW's lr·λ.
        - ``window_size, threshold``: 128 and 0.1 are the original study's; a smaller window forgets sooner.
        - batch size: keep lr, and search around it. Measured here: with 16 times the batch and as many
          steps the best lr is the same on digits, with 4 times the batch the same on text
          (docs/learning_rates.md).

    When not to use it:
        If gradients turn around during training: the counters forget slowly, those of :class:`SimbaLeaky`
        do not. :class:`Signum` with momentum in bfloat16 takes the same 2 bytes.

    Source: the original Simba study of sign memory in sequential recommendation, of which no publication is
    known; its ablations are ``memory="momentum"`` (Simba + m), ``choice="lion"`` (Simba + (1)), and both
    ``memory="momentum", choice="memory"`` (c = m).

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = Simba([weight], lr=1.0, window_size=10, threshold=0.2)
    >>> for gradient in (5.0, 5.0, 5.0, -5.0):
    ...     weight.grad = torch.tensor([gradient, 0.0])
    ...     optimizer.step()
    >>> weight.tolist(), optimizer.state[weight]["counts"].tolist()
    ([-4.0, 0.0], [2, 0])
    """

    @constructor
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        window_size: int = 128,
        threshold: float = 0.1,
        weight_decay: float = 0.0,
        *,
        counter_dtype: torch.dtype = torch.int16,
        memory: Literal["counts", "momentum"] = "counts",
        choice: Literal["threshold", "lion", "memory"] = "threshold",
        betas: tuple[float, float] = (0.9, 0.99),
        leak: float | None = None,
        **common: Unpack[CommonOptions],
    ) -> None: ...

    def _construct(self, params: ParamsT, options: dict[str, Any]) -> None:
        leak = options["leak"]
        if leak is None:
            super()._construct(params, options)
            return
        shared = ("lr", "weight_decay", "leak")
        own = {name: options.pop(name) for name in SimbaRule.hyper if name not in shared}
        defaults = self.rule.defaults()
        if meaningless := [name for name, value in own.items() if value != defaults[name]]:
            raise ValueError(
                f"Simba: {', '.join(meaningless)} have no effect with leak={leak!r}; leave them out"
            )
        Optimizer.__init__(self, params, rule="simba_leaky", **options)
