"""Muon: momentum orthogonalized by Newton-Schulz."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from steepest.constructor import constructor
from steepest.engine.collect import ParamBatch
from steepest.engine.matrices import UserFunctions
from steepest.hyperparameters import (
    Hyperparameter,
    at_least,
    choice,
    flag,
    fraction,
    integer,
    learning_rate,
    optional,
)
from steepest.linalg import MatmulPrecision, Normalization, float32_matmul_precision, newton_schulz
from steepest.linalg.newton_schulz import newton_schulz_way
from steepest.optimizer import Optimizer
from steepest.rule import MatrixOptions, Scalar, StateSpec
from steepest.rules.orthogonalized import OrthogonalizedOptimizer, OrthogonalizedRule, momentum_step

__all__ = ["Muon", "MuonOptions", "MuonRule", "Scale", "scale_factor", "scaled_polar"]

Scale = Literal["original", "match_rms_adamw", "spectral", "unit_rms_norm", "none"]
Coefficients = str | Sequence[tuple[float, float, float]]


def scale_factor(scale: Scale, rows: int, columns: int) -> float:
    """Return the factor on the polar factor of a matrix with ``rows`` outputs and ``columns`` inputs.

    ======================  =========================  =====================================
    ``"original"``          max(1, out/in)^½           Jordan et al. (2024)
    ``"match_rms_adamw"``   0.2·max(out, in)^½         rms 0.2, AdamW's; arXiv 2502.16982
    ``"spectral"``          max(out, in)^½
    ``"unit_rms_norm"``     (out/in)^½                 RMS-to-RMS norm; arXiv 2409.20325
    ``"none"``              1
    ======================  =========================  =====================================

    >>> scale_factor("original", 64, 16), scale_factor("unit_rms_norm", 16, 64)
    (2.0, 0.5)
    """
    if scale == "original":
        return math.sqrt(max(1.0, rows / columns))
    if scale in ("match_rms_adamw", "spectral"):
        return (1.0 if scale == "spectral" else 0.2) * math.sqrt(max(rows, columns))
    if scale == "unit_rms_norm":
        return math.sqrt(rows / columns)
    return 1.0


def _steps(coefficients: Coefficients, ns_steps: int | None) -> int | None:
    """Return the number of iterations, None for a named set's whole table; short lists repeat."""
    if ns_steps is not None:
        return int(ns_steps)
    return None if isinstance(coefficients, str) else max(5, len(coefficients))


def scaled_polar(
    u: Tensor,
    *,
    ns_steps: int | None,
    coefficients: Coefficients,
    normalization: Normalization | None,
    method: Literal["newton_schulz", "svd"],
    ns_dtype: torch.dtype | None,
    scale: Scale,
    extra_scale: Scalar,
    out: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Return the polar factor of u [..., m, n], times its scale, in ``out`` if given, which may be u."""
    steps = _steps(coefficients, ns_steps)
    polar = newton_schulz(
        u, coefficients, steps, normalization=normalization, dtype=ns_dtype, method=method, out=out
    )
    return polar.mul_(extra_scale * scale_factor(scale, u.shape[-2], u.shape[-1]))


class MuonOptions(MatrixOptions, total=False):
    """Keyword-only options of Muon and its variants, documented in :class:`Muon`."""

    nesterov: bool
    ns_steps: int | None
    coefficients: Coefficients
    normalization: Normalization | None
    scale: Scale
    extra_scale: float
    method: Literal["newton_schulz", "svd"]
    ns_dtype: torch.dtype | None
    fp32_matmul_prec: MatmulPrecision
    view: Literal["flatten", "batch"]


class MuonRule(OrthogonalizedRule):
    """m ← βm + (1−β)g;   p ← p − η·scale(out, in)·polar(u),   u as in the base."""

    name = "muon"
    keeps_input: ClassVar[bool] = True
    """Whether an overridden :meth:`finish` reads u; otherwise the polar factor takes its memory."""
    hyper = {
        "lr": learning_rate(),
        "momentum": fraction(),
        "weight_decay": at_least(0),
        "nesterov": flag(),
        "ns_steps": optional(integer(low=1)),
        "coefficients": Hyperparameter(
            lambda value: isinstance(value, str) or {len(triple) for triple in value} == {3},
            "a name or a list of triples",
        ),
        "normalization": optional(choice(*get_args(Normalization))),
        "method": choice("newton_schulz", "svd"),
        "ns_dtype": optional(choice(torch.bfloat16, torch.float16, torch.float32, torch.float64)),
        "scale": choice("original", "match_rms_adamw", "spectral", "unit_rms_norm", "none"),
        "extra_scale": at_least(0),
        "view": choice("flatten", "batch"),
        "fp32_matmul_prec": choice("highest", "high", "medium"),
    }

    def check(self, owner: str, group: Mapping[str, Any]) -> None:
        """Check the coefficients as well, so that errors do not wait for the first step."""
        super().check(owner, group)
        try:
            # On an empty matrix, this only checks the arguments.
            steps = _steps(group["coefficients"], group["ns_steps"])
            newton_schulz(
                torch.empty(0, 0, device="cpu"), group["coefficients"], steps, dtype=group["ns_dtype"]
            )
        except ValueError as error:
            raise ValueError(f"{owner}: {error}") from None

    def working_bytes(self, dtype: torch.dtype, group: Mapping[str, Any]) -> int:
        own: torch.dtype = group["ns_dtype"] or dtype
        return self.working_copies * max(dtype.itemsize, own.itemsize)

    def cost(self, shape: tuple[int, ...], group: Mapping[str, Any]) -> float:
        """Return the flops of five Newton-Schulz iterations, in the form that takes fewer."""
        short, long = sorted(shape[-2:])
        gram, plain = (8.0 * long + 28.0 * short), (20.0 * long + 10.0 * short)
        return math.prod(shape[:-2]) * short**2 * min(gram, plain)

    def way(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, group: Mapping[str, Any]
    ) -> str | None:
        """Return the form and dtype of the iterations, and whether tall matrices are transposed."""
        if group["method"] == "svd" or 0 in shape:
            return None
        return newton_schulz_way(
            shape,
            group["coefficients"],
            _steps(group["coefficients"], group["ns_steps"]),
            operand_dtype=torch.promote_types(torch.float32, dtype),
            device=device,
            normalization=group["normalization"],
            dtype=group["ns_dtype"],
        )

    def host_sync(self, group: Mapping[str, Any]) -> str | None:
        return "method='svd'" if group["method"] == "svd" else None

    def moves_like_adamw(self, group: Mapping[str, Any]) -> bool:
        """Return whether the scale is the one made for that; variants that rescale it return False."""
        return bool(group["scale"] == "match_rms_adamw" and group["extra_scale"] == 1)

    def state_specs(self, group: Mapping[str, Any]) -> dict[str, StateSpec]:
        return {"momentum_buffer": StateSpec(range="signed", beta=group["momentum"])}

    def update(  # type: ignore[override]
        self, grad: Tensor, param: Tensor, momentum_buffer: Tensor, *, momentum: Scalar, nesterov: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return momentum_step(grad, momentum_buffer, momentum, nesterov)

    def transform(
        self, u: Tensor, *, orthogonalize: Callable[[Tensor], Tensor] | None, **options: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scaled polar factor, or the result of a subclass's own function, which also scales."""
        with float32_matmul_precision(options["fp32_matmul_prec"]):
            if orthogonalize is not None:
                polar = orthogonalize(u)
            else:
                keeps = self.keeps_input and type(self).finish is not MuonRule.finish
                polar = scaled_polar(u, out=None if keeps else u, **options)
        return self.finish(polar, u, **options)

    def finish(self, polar: Tensor, u: Tensor, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (direction, new entries) from the scaled polar factor; Muon's variants override it.

        Unless :attr:`keeps_input`, ``u`` has been overwritten.
        """
        return polar, {}


class Muon(OrthogonalizedOptimizer, rule=MuonRule()):
    r"""Muon: momentum, orthogonalized by a few Newton-Schulz iterations.

    .. math::
        m \leftarrow m + (1-\beta)(g - m), \quad
        u = g + \beta(m - g), \quad
        p \leftarrow p - \eta\lambda p - \eta\, s(\mathrm{out}, \mathrm{in})\,\mathrm{polar}(u)

    It is for matrices of hidden layers. Embeddings, output layers, norms and biases belong to an
    element rule, in a group with ``"rule": "adamw"`` or as :func:`steepest.build` decides. With the
    default scale the update has AdamW's rms. The best learning rate may still be another: 0.013 for the
    small GPT of docs/which-optimizer.md, where AdamW's is 0.0018.
    Momentum is an average (EMA), not a sum; weight decay uses the unscaled lr. Parameters of one shape
    are stacked and orthogonalized together, unless a subclass overrides :meth:`orthogonalize`.

    State: ``momentum_buffer``, of the parameter's shape in ``state_dtype``: 4 bytes per float32
    parameter.

    Args:
        params: matrices: tensors, ``(name, tensor)`` pairs, or group dicts.
        lr: learning rate η ≥ 0, a float or a 1-element tensor.
        momentum: β in [0, 1).
        weight_decay: λ ≥ 0, acting as ``weight_decay_method`` says.
        nesterov: u = g + β(m − g); otherwise u = m.
        ns_steps: Newton-Schulz iterations; None runs a named set's whole table, 5 for most, and a list of
            triples once, or for 5 iterations if it has fewer.
        coefficients: a named set of :func:`steepest.linalg.newton_schulz`, or a list of triples.
        normalization: the norm that brings u below spectral norm 1, as in
            :func:`~steepest.linalg.newton_schulz`; None is the set's own.
        scale: s, see :func:`scale_factor`; out and in are the matrix's rows and columns, as ``nn.Linear``
            stores them.
        extra_scale: a factor on s.
        method: ``"newton_schulz"``, or ``"svd"`` for the exact polar factor (slow; an oracle).
        ns_dtype: dtype of the iteration; None lets :func:`~steepest.linalg.newton_schulz` choose half
            precision where it is faster. ``torch.float32`` gives results that agree on all machines.
        fp32_matmul_prec: torch's float32 matmul precision while orthogonalizing.
        view: how to see more than two dimensions: ``"flatten"`` as [out, rest], ``"batch"`` as a batch
            of matrices.
        **options: ``views`` of fused parameters, whose update equals that of separate matrices, and
            ``bucket_bytes`` (:class:`~steepest.rule.MatrixOptions`); :class:`~steepest.CommonOptions`.

    Raises:
        TypeError: an unknown keyword, or parameters that are not tensors.
        ValueError: a value out of range; a parameter with fewer than two dimensions, by name.

    Tuning:
        - ``lr``: AdamW's for large models (Liu et al.). Measured here: 10 times AdamW's on a small GPT, the
          same on digits (docs/learning_rates.md).
        - ``weight_decay``: AdamW's if you keep its lr (Liu et al.); otherwise keep lr·λ.
        - ``momentum``: 0.95, with Nesterov; other values are not measured here.
        - batch size: keep lr, and search around it. Measured here: with 16 times the batch and as many
          steps the best lr is 0.57 times as large on digits, with 4 times the batch the same on text
          (docs/learning_rates.md). The optimizer's step takes the same time for any batch, so its share of
          the training time shrinks with larger ones.

    When not to use it:
        For embeddings, output layers, norms and biases, which :func:`steepest.build` gives to AdamW; for
        fine-tuning a model that AdamW has trained, where Liu et al. report little gain; for wide layers with
        small batches, where the products of Newton-Schulz may take longer than the backward pass.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); Liu et al.,
    "Muon is Scalable for LLM Training", arXiv 2502.16982 (2025).

    >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
    >>> optimizer = Muon([weight], lr=1.0, momentum=0.0, scale="none", method="svd")
    >>> weight.grad = torch.tensor([[0.0, 3.0], [0.5, 0.0]])
    >>> optimizer.step()
    >>> weight.detach().round(decimals=3).abs()
    tensor([[0., 1.],
            [1., 0.]])
    """

    _decay_names = {}

    @constructor
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 1e-2,
        *,
        nesterov: bool = True,
        ns_steps: int | None = None,
        coefficients: Coefficients = "quintic",
        normalization: Normalization | None = None,
        method: Literal["newton_schulz", "svd"] = "newton_schulz",
        ns_dtype: torch.dtype | None = None,
        scale: Scale = "match_rms_adamw",
        extra_scale: float = 1.0,
        view: Literal["flatten", "batch"] = "flatten",
        fp32_matmul_prec: MatmulPrecision = "highest",
        **options: Unpack[MatrixOptions],
    ) -> None: ...

    def _construct(self, params: ParamsT, options: dict[str, Any]) -> None:
        # Skip the base class, which makes unknown keywords group options and renames decay methods.
        Optimizer._construct(self, params, options)

    def orthogonalize(self, p: Tensor, grad: Tensor, **kwargs: Any) -> Tensor:
        """Return scale(out, in)·polar(grad), with the options in ``kwargs``; see the base class."""
        return scaled_polar(grad, **kwargs)

    def _user_functions(self, batch: ParamBatch) -> UserFunctions | None:
        if type(self).orthogonalize is Muon.orthogonalize and not self._decays_itself():
            return None
        return super()._user_functions(batch)
