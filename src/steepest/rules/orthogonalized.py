"""The orthogonalized family's base: momentum, a matrix function of it, and a step along the result."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from steepest.constructor import constructor
from steepest.engine.collect import ParamBatch, ParamUpdate
from steepest.engine.matrices import MatrixFunction
from steepest.hyperparameters import Hyperparameter, at_least, choice, flag, fraction, integer, learning_rate
from steepest.linalg import MatmulPrecision, float32_matmul_precision
from steepest.optimizer import Optimizer
from steepest.param_groups import RESERVED
from steepest.rule import Group, Rule, Scalar, StateSpec
from steepest.views import View, fused_parameters

__all__ = ["MATRIX_OPTIONS", "OrthogonalizedOptimizer", "OrthogonalizedRule"]

# What all rules on this base take besides their own hyper-parameters.
MATRIX_OPTIONS: dict[str, Hyperparameter] = {
    "view": choice("flatten", "batch"),
    "views": fused_parameters(),
    "bucket_bytes": integer(low=1),
    "fp32_matmul_prec": choice("highest", "high", "medium"),
}


class OrthogonalizedRule(Rule):
    """m ← m + (1−β)(g − m);  u = g + β(m − g) with Nesterov, else m;  p ← p − η·orthogonalize(u)."""

    name = "orthogonalized"
    conventions = MappingProxyType({"momentum_convention": "ema"})
    hidden_only = True
    vectors = False
    hyper = {
        "lr": learning_rate(),
        "momentum_beta": fraction(),
        "weight_decay": at_least(0),
        "use_nesterov": flag(),
        **MATRIX_OPTIONS,
    }

    def matrix_shape(self, shape: torch.Size, group: Group) -> tuple[int, ...]:
        """[out, rest], or leading dimensions as a batch of matrices."""
        if len(shape) == 2 or group["view"] == "batch":
            return tuple(shape)
        return shape[0], math.prod(shape[1:])

    def state_specs(self, group: Group) -> dict[str, StateSpec]:
        """One momentum."""
        return {"momentum_buffer": StateSpec()}

    def update(
        self,
        grad: Tensor,
        param: Tensor,
        momentum_buffer: Tensor,
        *,
        momentum_beta: Scalar,
        use_nesterov: bool,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The momentum step."""
        return momentum_step(grad, momentum_buffer, momentum_beta, use_nesterov)

    def transform(
        self,
        u: Tensor,
        *,
        fp32_matmul_prec: str,
        orthogonalize: Callable[[Tensor], Tensor] | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The optimizer's own function, under the chosen float32 matmul precision."""
        if orthogonalize is None:
            warnings.warn(
                f"rule {self.name!r} orthogonalizes in its own class only; the momentum is used as it is",
                UserWarning,
                stacklevel=2,
            )
            return u, {}
        with float32_matmul_precision(fp32_matmul_prec):
            return orthogonalize(u), {}


def momentum_step(
    grad: Tensor, average: Tensor, beta: Scalar, nesterov: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """m ← m + (1−β)(g − m), in place; u = g + β(m − g) with Nesterov, else m."""
    average += (grad - average).mul_(1 - beta)
    u = (average - grad).mul_(beta).add_(grad) if nesterov else average
    return u, {"momentum_buffer": average}


class OrthogonalizedOptimizer(Optimizer, rule=OrthogonalizedRule()):
    r"""The base that people subclass: momentum, any matrix function of it, and a step along the result.

    .. math::
        m \leftarrow m + (1-\beta)(g - m), \quad
        u = \begin{cases} g + \beta(m - g) & \text{Nesterov} \\ m & \text{else} \end{cases}, \quad
        p \leftarrow p - \eta\lambda p - \eta\,\mathrm{orthogonalize}(p, u)

    Override :meth:`orthogonalize`; it is called for one parameter at a time, inside the step, without
    gradients, with ``u`` viewed as a matrix. It may read attributes of the parameter and any option of
    the group; if it raises, no parameter and no state has changed (the results of all are held until the
    last has returned). Without an override it calls ``scaled_orthogonalize_fn``.

    State: ``momentum_buffer``, of the parameter's shape in ``state_dtype``: 4 bytes per float32
    parameter.

    Args:
        params: matrices: tensors, ``(name, tensor)`` pairs, or group dicts.
        lr: learning rate η ≥ 0, a float or a 1-element tensor.
        momentum_beta: β in [0, 1) of the average above.
        weight_decay: λ ≥ 0, acting as ``weight_decay_method`` says, with the unscaled lr. Here
            ``weight_decay_method="independent"`` is the mixin's, p ← p − λp, and groups say ``"untied"``.
        use_nesterov: Nesterov's form of u.
        fp32_matmul_prec: torch's float32 matmul precision while orthogonalizing; restored afterwards, also
            after an error.
        scaled_orthogonalize_fn: matrix -> matrix; None is the identity, with a warning unless
            :meth:`orthogonalize` is overridden.
        view: how more than two dimensions are seen: ``"flatten"`` as [out, rest], ``"batch"`` as a batch
            of matrices.
        views: parameter names -> blocks (:mod:`steepest.views`) of fused parameters.
        bucket_bytes: bound on the working memory of matrices that are computed together, in bytes; 2²⁸ by
            default.
        **options: the common options (:class:`~steepest.CommonOptions`); any other keyword becomes an
            option of every group, overridable per group, saved with it, and passed to
            :meth:`orthogonalize`.

    A group, and so a checkpoint, says ``momentum_convention``: ``"ema"``, the average above. State dicts
    with another are refused, and those of other libraries that do not say; those of this one load.

    Raises:
        TypeError: parameters that are not tensors; an option with a name that groups have a use for.
        ValueError: a value out of range; a parameter with fewer than two dimensions, by name.

    Source: the base class follows NVIDIA's Emerging-Optimizers; the method is Jordan et al., "Muon"
    (2024), and Bernstein and Newhouse, arXiv 2409.20325 (2024).

    >>> from steepest.linalg import newton_schulz
    >>> weight = torch.nn.Parameter(torch.zeros(4, 4))
    >>> optimizer = OrthogonalizedOptimizer([weight], lr=1.0, scaled_orthogonalize_fn=newton_schulz)
    >>> weight.grad = torch.eye(4)
    >>> optimizer.step()
    >>> bool((weight.diagonal() < -0.5).all())
    True

    A fused QKV projection, its parts orthogonalized apart:

    >>> class SplitQKV(OrthogonalizedOptimizer):
    ...     def orthogonalize(self, p, grad, **options):
    ...         blocks = grad.split(options["qkv"]) if getattr(p, "is_qkv", False) else [grad]
    ...         return torch.cat([newton_schulz(block) for block in blocks])
    >>> qkv = torch.nn.Parameter(torch.zeros(6, 4))
    >>> qkv.is_qkv = True
    >>> optimizer = SplitQKV([qkv], lr=1.0, momentum_beta=0.0, qkv=[2, 2, 2])
    >>> qkv.grad = torch.randn(6, 4)
    >>> optimizer.step()
    >>> bool((torch.linalg.matrix_norm(qkv[2:4], ord=2) < 1.3))
    True
    """

    # Names of weight-decay methods that mean something else here than in CommonOptions; {} in Muon and kin.
    _decay_names: ClassVar[Mapping[str, str]] = MappingProxyType({"independent": "untied"})

    @constructor
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum_beta: float = 0.95,
        weight_decay: float = 0.0,
        *,
        use_nesterov: bool = False,
        fp32_matmul_prec: MatmulPrecision = "highest",
        scaled_orthogonalize_fn: Callable[[Tensor], Tensor] | None = None,
        view: Literal["flatten", "batch"] = "flatten",
        views: Mapping[str, View] | None = None,
        bucket_bytes: int = 1 << 28,
        **options: Any,
    ) -> None: ...

    def _construct(self, params: ParamsT, options: dict[str, Any]) -> None:
        known = self.rule.defaults()
        extra = {name: options.pop(name) for name in list(options) if name not in known}
        for name in (RESERVED - {"scaled_orthogonalize_fn"}).intersection(extra):
            raise TypeError(
                f"{type(self).__name__}() got the option {name!r}, a name that param groups have a use for"
            )
        if extra["scaled_orthogonalize_fn"] is None and not self._overrides():
            warnings.warn(
                f"{type(self).__name__}: neither scaled_orthogonalize_fn is given nor orthogonalize "
                "overridden; the momentum is used as it is",
                UserWarning,
                stacklevel=3,
            )
        self._rename_decay(options)
        super()._construct(params, {"extra": extra, **options})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group; see :class:`~steepest.Optimizer`."""
        if isinstance(param_group, dict) and param_group.get("rule", self.rule.name) == self.rule.name:
            self._rename_decay(param_group)
        super().add_param_group(param_group)
        # torch copies all defaults into a group; a function there would keep a checkpoint from loading.
        self.param_groups[-1].pop("scaled_orthogonalize_fn", None)

    def orthogonalize(self, p: Tensor, grad: Tensor, **kwargs: Any) -> Tensor:
        """The update's direction, of grad's shape: ``scaled_orthogonalize_fn(grad)``. Override it freely.

        Args:
            p: the parameter, as it was given to the optimizer.
            grad: the momentum, or Nesterov's form of it, viewed as a matrix [out, rest], or
                [..., m, n] with ``view="batch"``; float32 or wider. It is a copy.
            **kwargs: the param group's options, all but ``"params"``.
        """
        function = self.defaults.get("scaled_orthogonalize_fn")
        return grad if function is None else function(grad)

    def _rename_decay(self, options: dict[str, Any]) -> None:
        method = options.get("weight_decay_method")
        if isinstance(method, str) and method in self._decay_names:
            options["weight_decay_method"] = self._decay_names[method]

    def _overrides(self) -> bool:
        return type(self).orthogonalize is not OrthogonalizedOptimizer.orthogonalize

    def _matrix_function(self, batch: ParamBatch) -> MatrixFunction | None:
        config = batch.config
        if config.rule.name != self.rule.name:
            # A group of another rule has that rule's own matrix function.
            return None
        options = {name: value for name, value in config.group.items() if name != "params"}

        def orthogonalize(member: ParamUpdate, u: Tensor) -> Tensor:
            result = self.orthogonalize(member.owner, u[0], **options)
            if not isinstance(result, Tensor):
                raise TypeError(
                    f"{type(self).__name__}.orthogonalize returned a {type(result).__name__} "
                    f"for {member.name}"
                )
            if result.shape != u.shape[1:]:
                raise ValueError(
                    f"{type(self).__name__}.orthogonalize returned shape {tuple(result.shape)} "
                    f"for {member.name}, whose matrix is {tuple(u.shape[1:])}"
                )
            return result.unsqueeze(0)

        return orthogonalize
