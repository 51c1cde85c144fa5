"""SGD-SaI: momentum, and one scale per tensor measured once from the first gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from steepest.arithmetic import average_in_place
from steepest.constructor import constructor
from steepest.hyperparameters import (
    CommonOptions,
    at_least,
    choice,
    finite,
    flag,
    fraction,
    integer,
    learning_rate,
    positive,
)
from steepest.optimizer import Optimizer
from steepest.rule import Group, Moments, Rule, Scalar, StateSpec

__all__ = ["SGDSaI", "SGDSaIRule"]


_SCALE, _COUNT = at_least(0), finite()


class SGDSaIRule(Rule):
    """m ← μ m + (1−μ) g, and m ← g first;   p ← p − η·G·m   with G = ‖g‖₂ / (std(g) + ε) of the first g."""

    name = "sgd_sai"
    needs_total = True
    spreads = frozenset({"gain"})
    hyper = {
        "lr": learning_rate(),
        "momentum": fraction(),
        "eps": at_least(0),
        "weight_decay": at_least(0),
        "normalize": choice("none", "max"),
        "scale": choice("gsnr", "sqrt_numel", "none"),
        "warmup_batches": integer(low=1),
        "relative_eps": flag(),
        "max_scale": positive(),
    }

    def state_specs(self, group: Group) -> dict[str, StateSpec]:
        """Return the momentum, the scale G, and how many gradients it was measured on."""
        specs = {
            "gsnr": StateSpec("tensor", numbers=_SCALE),
            "measured": StateSpec("tensor", torch.float32, numbers=_COUNT),
        }
        beta = group["momentum"]
        return specs | ({"momentum_buffer": StateSpec(range="signed", beta=beta)} if beta != 0 else {})

    def needs_moments(self, state: Mapping[str, Tensor], group: Group) -> bool:
        """Return whether the scale is still to be measured."""
        return bool(abs(float(state.get("measured", 0.0))) < group["warmup_batches"])

    def reads_back(self, state: Mapping[str, Tensor], group: Group) -> bool:
        """Return whether the scale is still to be measured, or the momentum has not begun."""
        return bool(float(state.get("measured", 0.0)) < group["warmup_batches"])

    def measure(
        self, moments: Moments | None, state: Mapping[str, Tensor], group: Group
    ) -> tuple[dict[str, Scalar], dict[str, Scalar]]:
        """Measure G on the first gradient that is neither zero nor non-finite; until then G = 1 and m = g.

        A negative ``measured`` counts gradients that were measured before the first step, when the momentum
        has not begun. A G whose ``measured`` is 0 is measured again, while the momentum continues.
        """
        gsnr, measured = before = float(state["gsnr"]), float(state["measured"])
        first = not has_momentum(gsnr, measured)
        measured = abs(measured)
        if moments is not None:
            fresh = gradient_scale(moments.numel, float(moments.total), float(moments.square), group)
            if fresh is not None:
                # Round as the state does, so that a resumed run multiplies by the same number.
                mean = (gsnr * measured + fresh) / (measured + 1)
                gsnr = float(torch.tensor(mean, dtype=state["gsnr"].dtype, device="cpu"))
                measured += 1
        gain = gsnr if measured > 0 or gsnr > 0 else 1.0
        mu = group["momentum"]
        return (
            {"keep": 0.0 if first else mu, "take": 1.0 if first else 1 - mu, "gain": gain},
            {} if (gsnr, measured) == before else {"gsnr": gsnr, "measured": measured},
        )

    def relates(self, group: Group) -> str | None:
        """Return ``normalize``, if set: the largest G is known only after all are measured."""
        return "normalize='max'" if group["normalize"] == "max" else None

    def relate(
        self, scalars: Sequence[dict[str, Scalar]], states: Sequence[Mapping[str, Any]], group: Group
    ) -> None:
        """Divide by the largest G measured so far."""
        largest = max((float(s["gsnr"]) for s in states if float(s["measured"]) > 0), default=1.0)
        for own in scalars:
            own["gain"] = own["gain"] / largest

    def update(
        self,
        grad: Tensor,
        param: Tensor,
        momentum_buffer: Tensor | None = None,
        *,
        keep: Scalar,
        take: Scalar,
        gain: Scalar,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Step the average; (keep, take) is (0, 1) in the first step, then (μ, 1−μ), and gain is G."""
        average, state = grad, {}
        if momentum_buffer is not None:
            average = average_in_place(momentum_buffer, keep, grad, take)
            state = {"momentum_buffer": average}
        direction = gain * average
        # G·m may overflow where lr·G·m does not.
        largest = torch.finfo(direction.dtype).max
        return direction.clamp_(-largest, largest), state


def has_momentum(gsnr: float, measured: float) -> bool:
    """Return whether a tensor's state says that its momentum contains a gradient."""
    return measured > 0 or (measured == 0 and gsnr > 0)


def gradient_scale(count: int, total: float, square: float, group: Mapping[str, Any]) -> float | None:
    """Return G of a gradient with ``count`` elements, sum ``total`` and sum of squares ``square``.

    It is None for a zero or non-finite gradient. One element has no spread, so its G is at most √1.
    """
    if not (math.isfinite(square) and square > 0):
        return None
    if group["scale"] == "none":
        return 1.0
    if group["scale"] == "sqrt_numel":
        return math.sqrt(count)
    variance = max(square - total * total / count, 0.0) / (count - 1) if count > 1 else 0.0
    eps = group["eps"] * (math.sqrt(square / count) if group["relative_eps"] else 1.0)
    spread = math.sqrt(variance) + eps
    cap = float(group["max_scale"]) * math.sqrt(count)
    if count == 1:
        cap = min(cap, 1.0)
    return min(math.sqrt(square) / spread, cap) if spread > 0 else cap


class SGDSaI(Optimizer, rule=SGDSaIRule()):
    r"""SGD with momentum and learning rates scaled at initialization by the gradient's signal-to-noise ratio.

    .. math::
        G = \frac{\lVert g_1 \rVert_2}{\mathrm{std}(g_1) + \epsilon}, \qquad
        m \leftarrow \mu m + (1-\mu) g, \qquad
        p \leftarrow p - \eta\lambda p - \eta\, G\, m

    G is measured once for each tensor, over all of its elements, on its first gradient that is neither
    zero nor non-finite, and kept; in that step m = g. Until then G = 1 and m = g. A tensor of d elements
    has G ≈ √d unless its gradient has a mean.

    State: ``momentum_buffer``, of the parameter's shape in ``state_dtype`` (4 bytes per float32
    parameter; none with momentum 0), and two float32 scalars per tensor, ``gsnr`` (float64 for float64
    parameters) and ``measured``.

    Args:
        params: tensors, ``(name, tensor)`` pairs, or group dicts.
        lr: learning rate η ≥ 0, a float or a 1-element tensor.
        momentum: μ in [0, 1).
        eps: ε ≥ 0, absolute, or relative to rms(g) with ``relative_eps``.
        weight_decay: λ ≥ 0, acting as ``weight_decay_method`` says.
        normalize: ``"max"`` divides every G by the largest among all tensors measured so far, as the
            paper's pseudocode does and its code does not.
        scale: G is the ``"gsnr"`` above, ``"sqrt_numel"`` √d, or ``"none"`` 1: the ablations.
        warmup_batches: G is averaged over this many gradients.
        relative_eps: make ε relative, so that it does not swamp gradients near 1e-9.
        max_scale: G is at most ``max_scale``·√d, since a constant gradient has no spread; at most 1 for a
            single element, whose gradient never has any.
        **common: see :class:`~steepest.CommonOptions`.

    Raises:
        TypeError: an unknown keyword, or parameters that are not tensors.
        ValueError: a value out of range; a parameter that cannot be optimized, by name.

    Tuning:
        - ``lr``: measured here: AdamW's on a small GPT, 1.8 times AdamW's on digits (docs/learning_rates.md).
          The paper's grid for convnets is 1e-4 to 1e-1.
        - ``weight_decay``: decoupled; keep lr·λ.
        - ``momentum``: 0.9, the authors'; other values are not measured here.
        - batch size: the scales are measured on the first batch; if that is tiny, raise ``warmup_batches``.
          Measured here: with 16 times the batch and as many steps the best lr is the same on digits, with 4
          times the batch 0.56 times as large on text (docs/learning_rates.md).

    When not to use it:
        For small GPTs from scratch: measured here, 3.415 bits per byte after 400 steps, AdamW 2.985. The
        first gradients fix the scales for good, so do not start with batches that are unlike the rest.

    Source: Xu et al., "No More Adam: Learning Rate Scaling at Initialization is All You Need",
    arXiv 2412.11768 (2024).

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = SGDSaI([weight], lr=1.0, weight_decay=0.0, eps=0.0)
    >>> weight.grad = torch.tensor([1.0, -1.0])  # ‖g‖ = √2, std = √2
    >>> optimizer.step()
    >>> weight.tolist()
    [-1.0, 1.0]
    """

    @constructor
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        momentum: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        normalize: Literal["none", "max"] = "none",
        scale: Literal["gsnr", "sqrt_numel", "none"] = "gsnr",
        warmup_batches: int = 1,
        relative_eps: bool = False,
        max_scale: float = 10.0,
        **common: Unpack[CommonOptions],
    ) -> None: ...
