"""The orthogonalized family's base: momentum, a matrix function of it, and a step along the result."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from steepest.arithmetic import average_in_place, weighted_sum
from steepest.constructor import constructor
from steepest.engine.collect import ParamBatch, ParamUpdate
from steepest.engine.matrices import UserFunctions
from steepest.engine.storage import CORRECTION
from steepest.engine.update import decay_strength, decayed, initial_lr
from steepest.group_options import RESERVED
from steepest.hyperparameters import at_least, choice, flag, fraction, learning_rate, near_miss
from steepest.linalg import MatmulPrecision, float32_matmul_precision
from steepest.optimizer import Optimizer
from steepest.rule import Group, Rule, Scalar, StateSpec

__all__ = ["OrthogonalizedOptimizer", "OrthogonalizedRule"]


class OrthogonalizedRule(Rule):
    """m ← βm + (1−β)g;  u = βm + (1−β)g of the new m with Nesterov, else m;  p ← p − η·orthogonalize(u)."""

    name = "orthogonalized"
    conventions = {"momentum_convention": "ema"}
    hidden_only = True
    vectors = False
    hyper = {
        "lr": learning_rate(),
        "momentum_beta": fraction(),
        "weight_decay": at_least(0),
        "use_nesterov": flag(),
        "view": choice("param", "flatten", "batch"),
        "fp32_matmul_prec": choice("highest", "high", "medium"),
    }

    def matrix_shape(self, shape: torch.Size, group: Group) -> tuple[int, ...]:
        """Return [out, rest], or the shape itself; with ``"batch"`` its leading dimensions count matrices."""
        if len(shape) == 2 or group["view"] != "flatten":
            return tuple(shape)
        return shape[0], math.prod(shape[1:])

    def state_specs(self, group: Group) -> dict[str, StateSpec]:
        return {"momentum_buffer": StateSpec(range="signed", beta=group["momentum_beta"])}

    def update(
        self,
        grad: Tensor,
        param: Tensor,
        momentum_buffer: Tensor,
        *,
        momentum_beta: Scalar,
        use_nesterov: bool,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return momentum_step(grad, momentum_buffer, momentum_beta, use_nesterov)

    def transform(
        self, u: Tensor, *, fp32_matmul_prec: str, orthogonalize: Callable[[Tensor], Tensor] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the optimizer's own function, under the chosen float32 matmul precision."""
        if orthogonalize is None:
            warnings.warn(
                f"rule {self.name!r} orthogonalizes only in its own class; the momentum is used as it is",
                UserWarning,
                stacklevel=2,
            )
            return u, {}
        with float32_matmul_precision(fp32_matmul_prec):
            return orthogonalize(u), {}


def momentum_step(
    grad: Tensor, average: Tensor, beta: Scalar, nesterov: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute m ← βm + (1−β)g, in place, and u = βm + (1−β)g of the new m with Nesterov, else m."""
    average = average_in_place(average, beta, grad)
    u = weighted_sum(beta, average, 1 - beta, grad) if nesterov else average
    return u, {"momentum_buffer": average}


class _Option:
    """A group option as an attribute; assigning a value sets it in every group of the rule."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, optimizer: OrthogonalizedOptimizer | None, owner: type) -> Any:
        """Return the value in this rule's groups, or the one for new groups if these differ."""
        if optimizer is None:
            return self
        default, *said = (each[self.name] for each in self._holders(optimizer))
        value = said[0] if said and all(each == said[0] for each in said) else default
        return {theirs: ours for ours, theirs in optimizer._decay_names.items()}.get(value, value)

    def __set__(self, optimizer: OrthogonalizedOptimizer, value: Any) -> None:
        new = {self.name: value}
        optimizer._rename_decay(new)
        holders = self._holders(optimizer)
        for each in holders:
            optimizer.rule.check(type(optimizer).__name__, {**each, **new})
        for each in holders:
            each.update(new)

    def _holders(self, optimizer: OrthogonalizedOptimizer) -> list[dict[str, Any]]:
        """Return the defaults, and the groups of the optimizer's own rule."""
        own = optimizer.rule
        if self.name not in own.defaults():
            owner = type(optimizer).__name__
            raise AttributeError(f"{owner} has no option {self.name!r}", name=self.name, obj=optimizer)
        return [optimizer.defaults, *(g for g in optimizer.param_groups if g["rule"] == own.name)]


class OrthogonalizedOptimizer(Optimizer, rule=OrthogonalizedRule()):
    r"""The base class for users' matrix optimizers: momentum, a matrix function of it, a step along that.

    .. math::
        m \leftarrow m + (1-\beta)(g - m), \quad
        u = \begin{cases} g + \beta(m - g) & \text{Nesterov} \\ m & \text{else} \end{cases}, \quad
        p \leftarrow p - \eta\lambda p - \eta\,\mathrm{orthogonalize}(p, u)

    Override :meth:`orthogonalize`. The step calls it without gradients for one parameter at a time, before it
    steps the groups of other rules. It may read attributes of the parameter and any option of the group. A
    subclass may also decay by its own code, in :meth:`_apply_weight_decay_inplace`.

    If one of them raises, the parameters before the failed one are stepped; that one, all after it, and
    their states are unchanged. The step holds the memory of only one parameter: a copy of its state, u, and
    the function's own.

    ``scaled_orthogonalize_fn``, ``use_nesterov``, ``weight_decay_method`` and ``fp32_matmul_prec`` are
    attributes too: reading one returns the current value, and assigning one changes it for all present and
    future groups of this rule. Copies and pickles keep the attributes that a subclass sets on itself.

    State: ``momentum_buffer``, of the parameter's shape in ``state_dtype``: 4 bytes per float32 parameter.

    Args:
        params: matrices: tensors, ``(name, tensor)`` pairs, or group dicts.
        lr: learning rate η ≥ 0, a float or a 1-element tensor.
        momentum_beta: β in [0, 1) of the average above.
        weight_decay: λ ≥ 0, acting as ``weight_decay_method`` says, with the unscaled lr. Here
            ``weight_decay_method="independent"`` is the mixin's, p ← p − λp, which groups store as
            ``"untied"`` and the attribute returns as ``"independent"``.
        use_nesterov: Nesterov's form of u.
        fp32_matmul_prec: torch's float32 matmul precision while orthogonalizing; restored afterwards, also
            after an error.
        scaled_orthogonalize_fn: matrix -> matrix; None is the identity, with a warning unless
            :meth:`orthogonalize` is overridden.
        view: how :meth:`orthogonalize` sees more than two dimensions: ``"param"`` and ``"batch"`` in the
            parameter's own shape, ``"flatten"`` as [out, rest]. With ``"batch"`` a transposed view swaps the
            last two dimensions instead of the first two.
        **options: :class:`~steepest.rule.MatrixOptions` and :class:`~steepest.CommonOptions`; any other
            keyword becomes an option of every group, overridable per group, saved with it, and passed to
            :meth:`orthogonalize`; one that is nearly the name of an option here warns.

    Groups, and so checkpoints, record ``momentum_convention="ema"``, the average above. State dicts with
    another are refused, and so are those of other libraries without one; this library's own load.

    Raises:
        TypeError: parameters that are not tensors; an option whose name is reserved in param groups; a
            ``scaled_orthogonalize_fn`` that cannot be called.
        ValueError: a value out of range; a parameter with fewer than two dimensions, by name.

    Tuning:
        - ``lr``: depends on the matrix function's scale; for a polar factor see :class:`~steepest.Muon`.
        - ``weight_decay``: keep lr·λ.
        - ``momentum_beta``: 0.95, as for Muon.
        - batch size: as for Muon, if the matrix function normalizes; otherwise the step shrinks as the
          batch averages the gradient's noise.

    When not to use it:
        When the function is Newton-Schulz or an SVD: :class:`~steepest.Muon` stacks matrices of one shape
        and steps them together; this class steps them one by one.

    Source: the base class follows NVIDIA's Emerging-Optimizers. The method goes back to Carlson, Cevher and
    Carin, "Stochastic spectral descent for Restricted Boltzmann Machines" (2015), Carlson et al.,
    "Preconditioned spectral descent for deep learning" (2015), and Flynn, "The duality structure gradient
    descent algorithm", arXiv 1708.00523 (2017); in this form it is Jordan et al., "Muon" (2024), and
    Bernstein and Newhouse, arXiv 2409.20325 (2024).

    >>> from steepest.linalg import newton_schulz
    >>> weight = torch.nn.Parameter(torch.zeros(4, 4))
    >>> optimizer = OrthogonalizedOptimizer([weight], lr=1.0, scaled_orthogonalize_fn=newton_schulz)
    >>> weight.grad = torch.eye(4)
    >>> optimizer.step()
    >>> bool((weight.diagonal() < -0.5).all())
    True

    A fused QKV projection, whose parts are orthogonalized separately:

    >>> class SplitQKV(OrthogonalizedOptimizer):
    ...     def orthogonalize(self, p, grad, **options):
    ...         parts = grad.split(options["qkv"]) if getattr(p, "is_qkv", False) else [grad]
    ...         return torch.cat([self.scaled_orthogonalize_fn(part) for part in parts])
    >>> qkv = torch.nn.Parameter(torch.zeros(6, 4))
    >>> qkv.is_qkv = True
    >>> optimizer = SplitQKV(
    ...     [qkv], lr=1.0, momentum_beta=0.0, scaled_orthogonalize_fn=newton_schulz, qkv=[2, 2, 2]
    ... )
    >>> qkv.grad = torch.randn(6, 4)
    >>> optimizer.step()
    >>> bool((torch.linalg.matrix_norm(qkv[2:4], ord=2) < 1.3))
    True
    """

    # Names of weight-decay methods that mean something else here than in CommonOptions; {} in Muon.
    _decay_names: ClassVar[Mapping[str, str]] = {"independent": "untied"}

    use_nesterov = _Option()
    weight_decay_method = _Option()
    fp32_matmul_prec = _Option()

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
        view: Literal["param", "flatten", "batch"] = "param",
        **options: Any,
    ) -> None: ...

    def _construct(self, params: ParamsT, options: dict[str, Any]) -> None:
        known, who = self.rule.defaults(), type(self).__name__
        extra = {name: options.pop(name) for name in list(options) if name not in known}
        for name in RESERVED.intersection(extra):
            raise TypeError(f"{who}() got the option {name!r}, a name that is reserved in param groups")
        _check_function(who, extra["scaled_orthogonalize_fn"])
        overridden = type(self).orthogonalize is not OrthogonalizedOptimizer.orthogonalize
        if extra["scaled_orthogonalize_fn"] is None and not overridden:
            warnings.warn(
                f"{who}: neither scaled_orthogonalize_fn is given nor orthogonalize "
                "overridden; the momentum is used as it is",
                UserWarning,
                stacklevel=3,
            )
        for name in extra:
            if name not in _OWN and (meant := near_miss(name, {*known, *_OWN}, cutoff=_NEAR)):
                warnings.warn(
                    f"{who}: {name!r} is no option of {self.rule.name!r}{meant}; it is kept for a subclass "
                    "to read",
                    UserWarning,
                    stacklevel=3,
                )
        self._rename_decay(options)
        super()._construct(params, {"extra": extra, **options})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group; see :class:`~steepest.Optimizer`."""
        if isinstance(param_group, dict) and param_group.get("rule", self.rule.name) == self.rule.name:
            self._rename_decay(param_group)
        if isinstance(param_group, dict) and "scaled_orthogonalize_fn" in param_group:
            raise ValueError(
                "scaled_orthogonalize_fn is not an option of groups: pass it to the constructor, for "
                "all groups, or override orthogonalize"
            )
        super().add_param_group(param_group)
        # torch copies all defaults into a group; a function there would keep a checkpoint from loading.
        self.param_groups[-1].pop("scaled_orthogonalize_fn", None)

    @property
    def scaled_orthogonalize_fn(self) -> Callable[[Tensor], Tensor]:
        """The constructor's function, or the identity; assigning another replaces it."""
        if "scaled_orthogonalize_fn" not in self.defaults:
            raise AttributeError(
                f"{type(self).__name__} has no scaled_orthogonalize_fn: its options say what it computes. "
                "Call super().orthogonalize(p, block, **kwargs) for a block"
            )
        function: Callable[[Tensor], Tensor] | None = self.defaults["scaled_orthogonalize_fn"]
        return (lambda u: u) if function is None else function

    @scaled_orthogonalize_fn.setter
    def scaled_orthogonalize_fn(self, function: Callable[[Tensor], Tensor] | None) -> None:
        if "scaled_orthogonalize_fn" not in self.defaults:
            raise AttributeError(f"{type(self).__name__} takes no scaled_orthogonalize_fn")
        _check_function(type(self).__name__, function)
        self.defaults["scaled_orthogonalize_fn"] = function

    def orthogonalize(self, p: Tensor, grad: Tensor, **kwargs: Any) -> Tensor:
        """Compute the update's direction, of grad's shape; here it is ``scaled_orthogonalize_fn(grad)``.

        Args:
            p: the parameter, as it was given to the optimizer.
            grad: the momentum, or Nesterov's form of it, in the shape that ``view`` says; float32 or wider.
                It is a copy.
            **kwargs: the param group's options, all but ``"params"``.
        """
        return self.scaled_orthogonalize_fn(grad)

    def _apply_weight_decay_inplace(
        self, p: Tensor, grad: Tensor, lr: float | Tensor, weight_decay: float
    ) -> None:
        """Decay ``p``, or add the decay to ``grad``, in place.

        The step calls an override instead of decaying by itself: for each parameter, before it updates the
        momentum, even with ``weight_decay=0``. It may call this method, which decays as
        ``weight_decay_method`` says and rounds to the parameter's dtype; the step then rounds a second time.
        With ``master`` it decays the master weight, as an override can by :meth:`set_master_weight`.

        Args:
            p: the parameter, as it was given to the optimizer.
            grad: a copy of its gradient; with ``maximize``, of the negative, since the step descends.
            lr: the group's learning rate.
            weight_decay: the group's weight decay.

        Raises:
            ValueError: ``"cautious"``, which needs the direction.
        """
        if weight_decay == 0:
            return
        group = next(group for group in self.param_groups if any(each is p for each in group["params"]))
        method = group["weight_decay_method"]
        if method == "cautious":
            raise ValueError(
                "weight_decay_method='cautious' needs the step's direction, which is not known where "
                "_apply_weight_decay_inplace is overridden"
            )
        strength = decay_strength(method, lr, weight_decay, initial_lr(group))
        master = self.master_weight(p) if CORRECTION in self.state.get(p, {}) else p
        if method == "l2":
            grad += strength * master
        elif master is p:
            p.copy_(decayed(p, strength, method))
        else:
            self.set_master_weight(p, decayed(master, strength, method))

    # -- attributes and copies

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles keep, including attributes that a subclass has set on itself."""
        own = {
            name: value
            for name, value in vars(self).items()
            # A scheduler wraps methods of this object only.
            if not (name in _OF_THE_OBJECT or name.startswith("_optimizer_"))
            and not callable(getattr(type(self), name, None))
        }
        return {**own, **super().__getstate__()}

    def _rename_decay(self, options: dict[str, Any]) -> None:
        method = options.get("weight_decay_method")
        if isinstance(method, str) and method in self._decay_names:
            options["weight_decay_method"] = self._decay_names[method]

    def _decays_itself(self) -> bool:
        mine = OrthogonalizedOptimizer._apply_weight_decay_inplace
        return type(self)._apply_weight_decay_inplace is not mine

    def _user_functions(self, batch: ParamBatch) -> UserFunctions | None:
        if batch.config.rule.name != self.rule.name:
            # A group of another rule uses that rule's own matrix function.
            return None
        group = batch.config.group
        options = {name: value for name, value in group.items() if name != "params"}

        def orthogonalize(member: ParamUpdate, u: Tensor) -> Tensor:
            result = self.orthogonalize(member.owner, u[0], **options)
            said = f"{type(self).__name__}.orthogonalize returned"
            if not isinstance(result, Tensor):
                raise TypeError(f"{said} a {type(result).__name__} for {member.name}")
            if result.shape != u.shape[1:]:
                shape, matrix = tuple(result.shape), tuple(u.shape[1:])
                raise ValueError(f"{said} shape {shape} for {member.name}, whose matrix is {matrix}")
            return result.unsqueeze(0)

        def decay(member: ParamUpdate, grad: Tensor) -> None:
            self._apply_weight_decay_inplace(member.owner, grad, group["lr"], group["weight_decay"])

        return UserFunctions(orthogonalize, decay if self._decays_itself() else None)


# Options that are none of the groups'.
_OWN = frozenset({"scaled_orthogonalize_fn"})

# How alike two names are that are taken for one: "momentum" and "momentum_beta" are 0.76.
_NEAR = 0.75

# Attributes of one object that its copies create anew.
_OF_THE_OBJECT = frozenset({"_collector", "_taken_in_backward", "_step_supports_amp_scaling", "_opt_called"})


def _check_function(owner: str, function: Any) -> None:
    if function is not None and not callable(function):
        raise TypeError(f"{owner}: scaled_orthogonalize_fn must be callable or None, got {function!r}")
