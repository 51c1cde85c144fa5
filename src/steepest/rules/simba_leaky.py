"""Simba-leaky: integer counters that forget."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from steepest.constructor import constructor
from steepest.hyperparameters import CommonOptions, at_least, learning_rate, rate
from steepest.optimizer import Optimizer
from steepest.random import stochastic_floor
from steepest.rule import Group, Moments, Noise, Rule, Scalar, StateSpec

__all__ = ["SimbaLeaky", "SimbaLeakyRule"]

_LIMIT = torch.iinfo(torch.int16).max


class SimbaLeakyRule(Rule):
    """s ← s − round_s(s·leak) + round_s(8·clip(g/rms(g), −7, 7));   p ← p − η·sign(s)."""

    name = "simba_leaky"
    hyper = {"lr": learning_rate(), "leak": rate(), "weight_decay": at_least(0)}
    counts_steps = True
    spreads = frozenset({"inverse_rms"})

    def state_specs(self, group: Group) -> dict[str, StateSpec]:
        return {"counts": StateSpec(dtype=torch.int16)}

    def measure(
        self, moments: Moments | None, state: Mapping[str, Tensor], group: Group
    ) -> tuple[dict[str, Scalar], dict[str, Scalar]]:
        """Return 1/rms(g) over the whole tensor; 0, and so no vote, if the rms is zero or not finite, or so
        small that 1/rms is not."""
        assert moments is not None
        inverse = (moments.square / max(moments.numel, 1)).sqrt_().reciprocal_()
        return {"inverse_rms": inverse.nan_to_num_(nan=0.0, posinf=0.0)}, {}

    def update(
        self, grad: Tensor, param: Tensor, counts: Tensor, *, leak: Scalar, inverse_rms: Scalar, noise: Noise
    ) -> tuple[Tensor, dict[str, Tensor]]:
        # Draw the noise first, because drawing takes the most memory.
        u = noise(0)
        counts = counts - stochastic_floor(counts * leak, u)
        u = noise(1)
        vote = (grad * inverse_rms).clamp_(-7, 7)
        vote *= 8
        counts += stochastic_floor(vote, u)
        counts.clamp_(-_LIMIT, _LIMIT)
        return counts.sign(), {"counts": counts}


class SimbaLeaky(Optimizer, rule=SimbaLeakyRule()):
    r"""Sign descent on a leaky integer memory of scaled gradients.

    .. math::
        s \leftarrow s - \mathrm{round}_s(s\ell)
            + \mathrm{round}_s\bigl(8\,\mathrm{clip}(g/\mathrm{rms}(g), -7, 7)\bigr), \qquad
        p \leftarrow p - \eta\lambda p - \eta\,\mathrm{sign}(s)

    rms(g) is taken over the whole tensor's gradient, before an l2 decay is added to it. round_s rounds up
    or down at random with the exact expectation, from noise keyed by (seed, step, element). The counters
    follow the gradient's mean as Lion's momentum does, at a quarter of AdamW's bytes, and forget at the
    rate ℓ. They include the current gradient.

    State: ``counts``, int16 of the parameter's shape: 2 bytes per parameter; one step count per tensor.

    Args:
        params: tensors, ``(name, tensor)`` pairs, or group dicts.
        lr: learning rate η ≥ 0, a float or a 1-element tensor: how far every coordinate moves.
        leak: ℓ in (0, 1]. The counters saturate at ±32767, which leaks below 56/32767 can reach.
        weight_decay: λ ≥ 0, acting as ``weight_decay_method`` says.
        **common: see :class:`~steepest.CommonOptions`.

    Raises:
        TypeError: an unknown keyword, or parameters that are not tensors.
        ValueError: a value out of range; a parameter that cannot be optimized, by name.

    Tuning:
        - ``lr``: measured here: 0.31 times AdamW's on a small GPT, a tenth of it on digits
          (docs/learning_rates.md).
        - ``weight_decay``: keep AdamW's lr·λ.
        - ``leak``: corresponds to 1 − β of Lion's momentum: 0.01 averages over a hundred steps.
        - batch size: keep lr, and search around it. Measured here: with 16 times the batch and as many
          steps the best lr is 1.8 times as large on digits (docs/learning_rates.md).

    When not to use it:
        In a CUDA graph, or where the optimizer's own time matters: every step sums the gradient and draws
        noise.

    Source: our own; it fixes :class:`Simba`, whose counters forget slowly after a reversal.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = SimbaLeaky([weight], lr=0.5)
    >>> weight.grad = torch.tensor([1.0, -1.0])
    >>> optimizer.step()
    >>> weight.tolist(), optimizer.state[weight]["counts"].tolist()
    ([-0.5, 0.5], [8, -8])
    """

    @constructor
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        leak: float = 0.01,
        weight_decay: float = 0.0,
        **common: Unpack[CommonOptions],
    ) -> None: ...
