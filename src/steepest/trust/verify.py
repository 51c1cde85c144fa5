"""Verify steps while they are taken: what was applied must be what the rules say."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from steepest.distributed.local import is_dtensor
from steepest.engine.collect import describe
from steepest.optimizer import Optimizer
from steepest.optimizer_in_backward import is_released
from steepest.rule import find_rule
from steepest.rules import OrthogonalizedOptimizer
from steepest.trust.applied import applied_step, dense, own_part
from steepest.trust.delivered import DeliveredGradients
from steepest.trust.errors import VerificationError
from steepest.trust.laws import LAWS, Law
from steepest.trust.movement import Movement
from steepest.trust.nesting import is_nested
from steepest.trust.replay import check_replay
from steepest.trust.snapshot import Snapshot
from steepest.trust.twin import Twin

__all__ = ["Verification", "verify"]


def verify(
    optimizer: Optimizer,
    *,
    model: nn.Module | None = None,
    gradient_scale: float | Callable[[], float] | None = 1.0,
    max_norm: float | None = None,
    may_rest: Collection[str] = (),
    laws: Mapping[str, Law | None] | None = None,
) -> Verification:
    r"""Return a context around some steps that proves what they did, and raises where they break their law.

    For every ``optimizer.step()`` in it, and every tensor, it checks

    - **the law of its rule**: a property of Δp after the weight decay is taken out, by whatever
      ``weight_decay_method``, which no code of the rule has computed. Sign rules: \|Δp\| is lr or 0. Muon and
      its kin: the singular values of Δp are within the band of the polynomials. PSGD: the rms of Δp, and that
      Q damps what it amplifies too much. SGD-SaI: Δp is one constant times the momentum. Hyperball: the norm
      stays. `docs/verify.md` has the mathematics.
    - **the rule itself**: a copy of the optimizer, made before the step with its state and gradients,
      takes the step by the library's own code. All rules have this law, users' rules too.
    - **the gradients**: what is stepped must be what backward delivered, times ``gradient_scale``.
    - **stillness**: no tensor of the optimizer, nor its state, may change between its steps, unless a state
      dict is loaded, and a step that is skipped because a gradient is not finite must leave all as it is.

    At the end every tensor that requires a gradient must have moved, and have had one that is not 0; a group
    all of whose tensors are frozen is an error, unless :func:`steepest.build` made it; and at least one step
    must have been taken. Rounding is allowed for: half precision hides what is below its spacing.

    It costs two copies of parameters and state, one of gradients, a second step and, for Muon, singular
    values; use it around a few steps. Outside of the context there is nothing that costs anything. Take at
    least two steps: SOAP's first one moves nothing. With several processes all must verify the same steps;
    each sees its own shards of DTensors.

    Args:
        optimizer: one of this library's. Schedulers, GradScaler, closures and subclasses are fine.
        model: parameters of the model that require a gradient, are not the optimizer's, and have not
            changed at the end, are an error: nobody steps them.
        gradient_scale: what stepped gradients must be over the sum of those that backward delivered since
            they were cleared, or a function without arguments that returns it. None allows anything. With
            a GradScaler: ``lambda: 1 / scaler.get_scale()``; with k summed backward passes that are averaged
            by hand: ``1 / k``. Assigned gradients are not compared, nor any with several processes, where
            wrappers average them.
        max_norm: the argument of ``torch.nn.utils.clip_grad_norm_``, if the training calls it for the
            parameters of ``model``, or without one for those of the optimizer.
        may_rest: names of tensors that need not move, such as experts that no token reaches.
        laws: laws by rule name, instead of or beyond those above: functions of an
            :class:`~steepest.trust.applied.AppliedStep` that return what is wrong, or None. None instead of
            a function leaves the comparison with the copy; a Muon subclass needs that if its own
            ``orthogonalize`` returns something else than polar factors of whole matrices.

    Returns:
        The context, a :class:`~steepest.trust.Verification`.

    Raises:
        VerificationError: as above, in ``step()`` or at the end, naming the tensor.
        TypeError: ``optimizer`` is not of this library; ``may_rest`` is a string.
        ValueError: ``laws`` names no rule; ``max_norm`` is given with ``gradient_scale=None``; the gradients
            are released (they are gone before ``step()``); there are DTensors of a rule that needs more than
            a shard; the context is entered twice.

    >>> from steepest import Lion
    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = Lion({"weight": weight}.items(), lr=0.25)
    >>> with verify(optimizer) as verification:
    ...     weight.grad = torch.tensor([3.0, -0.5])
    ...     optimizer.step()
    >>> verification.steps
    1
    >>> with verify(optimizer):
    ...     optimizer.step()
    ...     _ = weight.data.mul_(0.5)  # somebody else
    Traceback (most recent call last):
    steepest.trust.errors.VerificationError: parameter 'weight' changed after the last optimizer.step(), ...
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"verify() takes an optimizer of steepest, got {type(optimizer).__module__}."
            f"{type(optimizer).__name__}; give it the one that a wrapper wraps"
        )
    if isinstance(may_rest, str):
        raise TypeError(f"verify(): may_rest is a collection of names; pass may_rest=[{may_rest!r}]")
    if max_norm is not None and gradient_scale is None:
        raise ValueError("verify(): gradient_scale=None compares no gradients, so max_norm has no effect")
    for rule in laws or {}:
        find_rule(rule)  # raises for those that there are not
    return Verification(optimizer, model, gradient_scale, max_norm, may_rest, laws)


class Verification:
    """The context that :func:`steepest.verify` returns, which documents it.

    Attributes:
        steps: the steps verified so far.
        report: what the laws measured in the last step, by tensor and quantity, such as an update's rms.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module | None,
        gradient_scale: float | Callable[[], float] | None,
        max_norm: float | None,
        may_rest: Collection[str],
        laws: Mapping[str, Law | None] | None,
    ) -> None:
        self.steps = 0
        self.report: dict[str, dict[str, float]] = {}
        self._optimizer, self._model = optimizer, model
        self._scale, self._max_norm = gradient_scale, max_norm
        self._may_rest = frozenset(may_rest)
        self._laws: dict[str, Law | None] = {**LAWS, **(laws or {})}
        self._hooks: list[Any] = []
        self._twin: Twin | None = None

    def __enter__(self) -> Verification:
        if self._hooks:
            raise ValueError("verify(): this context has been entered already")
        optimizer = self._optimizer
        self._check_supported()
        self._names = _names(optimizer, self._model)
        self.steps, self.report = 0, {}
        self._remember(optimizer)
        self._others = {
            name: (param, own_part(param.detach()).clone())
            for name, param in (() if self._model is None else self._model.named_parameters())
            if param.requires_grad and param not in self._names and own_part(param).numel() > 0
        }
        self._movement = Movement()
        self._skipped = 0
        if self._scale is not None:
            self._delivered = DeliveredGradients(self._scale, self._max_norm)
            self._delivered.watch(_all_names(optimizer, self._model))
            self._hooks.append(self._delivered)
        self._hooks.append(optimizer.register_step_pre_hook(self._before_step))
        self._hooks.append(optimizer.register_step_post_hook(self._after_step))
        self._hooks.append(optimizer.register_load_state_dict_post_hook(self._remember))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._twin = None
        try:
            if kind is None:
                self._check_end()
        finally:  # the copies are as large as the training's own tensors
            self._last.clear()
            self._others.clear()
            self._names = {}
            self._movement = Movement()

    @torch.no_grad()
    def _remember(self, optimizer: torch.optim.Optimizer) -> None:
        """Copy what must stay as it is until the next step."""
        self._last = {param: Snapshot.of(self._optimizer, param) for param in self._names}

    # -- the step

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not is_nested(optimizer):
            self._twin = None  # of a step that raised
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._begin()
            return None

        def evaluated() -> Any:
            loss = closure()
            self._begin()
            return loss

        if len(args) > 1:
            return (args[0], evaluated, *args[2:]), kwargs
        return args, {**kwargs, "closure": evaluated}

    @torch.no_grad()
    def _begin(self) -> None:
        """Copy everything before the step; within a subclass's own ``step()``, only the gradients again."""
        if self._scale is not None:
            # Parameters may have been added, or unfrozen.
            self._delivered.watch(_all_names(self._optimizer, self._model))
            self._delivered.check(_names(self._optimizer, None))
        if self._twin is not None:
            self._twin.take_gradients()
            return
        self._check_supported()
        self._names = _names(self._optimizer, self._model)  # groups may have been added
        for param in self._names.keys() - self._last.keys():
            self._last[param] = Snapshot.of(self._optimizer, param)
        self._check_unchanged()
        self._twin = Twin(self._optimizer)
        self._skipped_before = self._optimizer.skipped_steps

    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def _after_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        twin, self._twin = self._twin, None
        if self._scale is not None and not is_nested(optimizer):
            self._delivered.step_taken()
        if twin is None:  # the end of a subclass's own step(), whose inner one has been verified
            self._check_unchanged()
            return
        self.steps += 1
        self.report = {}
        if self._optimizer.skipped_steps > self._skipped_before or _must_skip(twin.optimizer):
            self._skipped += 1
            self._check_unchanged(" in a step that had to be skipped, because a gradient is not finite")
            return
        self._check_laws(twin)
        check_replay(self._optimizer, twin, self._names)
        self._movement.note(self._optimizer, twin, self._last)
        self._remember(optimizer)

    def _check_laws(self, twin: Twin) -> None:
        """Check the properties of Δp that rules have."""
        optimizer, owners = self._optimizer, {copy: param for param, copy in twin.params.items()}
        copied = twin.optimizer
        batches = copied._collector.batches_of(
            type(optimizer).__name__, copied.param_groups, copied.state, copied.targets
        )
        for batch in batches:
            law = self._laws.get(batch.config.rule.name)
            if (
                law is None
                or batch.config.rule.moves
                or _decays_by_own_code(optimizer, batch.config.rule.name)
            ):
                continue
            for member in batch.members:
                owner = owners[member.owner]
                absent = sorted(batch.config.specs.keys() - optimizer.state.get(owner, {}).keys())
                if absent:
                    raise VerificationError(
                        f"{self._names[owner]}, in a group of {batch.config.rule.name!r}: the step has not "
                        f"made the state {absent[0]!r} that the rule keeps: another optimizer took it"
                    )
                step = applied_step(optimizer, copied, batch, member, owner)
                if step is None:
                    continue
                wrong = law(step)
                self.report[self._names[owner]] = step.report
                if wrong is not None:
                    raise VerificationError(f"{self._names[owner]}, stepped by {step.rule.name!r}: {wrong}")

    def _check_unchanged(self, when: str = "") -> None:
        for param, last in self._last.items():
            if param not in self._names:
                continue
            what = self._names[param]
            if not last.weights_differ(self._optimizer, param):
                entry = last.changed_entry(self._optimizer, param)
                if entry is None:
                    continue
                what = f"the state {entry!r} of {what}"
            self._twin = None
            if when:
                raise VerificationError(f"{what} changed{when}")
            after = "after the last optimizer.step()" if self.steps else "before any optimizer.step()"
            raise VerificationError(
                f"{what} changed {after}, outside of it: another optimizer steps it, or other code writes it"
            )

    # -- the end

    @torch.no_grad()
    def _check_end(self) -> None:
        self._names = _names(self._optimizer, self._model)
        self._check_unchanged()
        if self.steps == 0:
            raise VerificationError("no step was taken: optimizer.step() was never called in the context")
        for name, (param, first) in self._others.items():
            if param not in self._names and torch.equal(own_part(param.detach()), first):
                raise VerificationError(
                    f"parameter {name!r} of the model is in no group of the optimizer, and nothing stepped it"
                )
        if self._skipped == self.steps:
            raise VerificationError(f"all {self.steps} steps were skipped: a gradient was not finite in each")
        self._movement.check(self._optimizer, self._names, self._may_rest, self.steps)

    def _check_supported(self) -> None:
        optimizer = self._optimizer
        if is_released(optimizer):
            raise ValueError(
                "verify(): the gradients are released: parameters are stepped, and their gradients freed, in "
                "the backward pass. Call remove() on the handle of release_gradients() for the verified steps"
            )
        for index, group in enumerate(optimizer.param_groups):
            rule = find_rule(group["rule"])
            for at, param in enumerate(group["params"]):
                if is_dtensor(param) and rule.scope != "element":
                    raise ValueError(
                        f"verify(): {describe(group, index, at)} is a DTensor, and {rule.name!r} needs more "
                        "than a shard of it; verify element rules (sign rules, AdamW, SGD), or one process"
                    )


def _names(optimizer: Optimizer, model: nn.Module | None) -> dict[Tensor, str]:
    """Return every routed tensor's name for messages, the model's if the optimizer has none."""
    known = (
        {} if model is None else {param: f"parameter {name!r}" for name, param in model.named_parameters()}
    )
    return {
        param: describe(group, index, at)
        if "param_names" in group
        else known.get(param, describe(group, index, at))
        for index, group in enumerate(optimizer.param_groups)
        for at, param in enumerate(group["params"])
    }


def _all_names(optimizer: Optimizer, model: nn.Module | None) -> dict[Tensor, str]:
    """Return the names of the optimizer's tensors and of the model's parameters."""
    named = () if model is None else model.named_parameters()
    return {**{param: f"parameter {name!r}" for name, param in named}, **_names(optimizer, model)}


def _must_skip(copied: Optimizer) -> bool:
    """Return whether a gradient that is not finite must keep the step from being taken."""
    return any(
        param.grad is not None and not bool(dense(own_part(param.grad)).isfinite().all())
        for group in copied.param_groups
        if group["nonfinite"] == "skip"
        for param in group["params"]
    )


def _decays_by_own_code(optimizer: Optimizer, rule: str) -> bool:
    """Return whether a subclass decays parameters of this rule by code of its own."""
    return (
        isinstance(optimizer, OrthogonalizedOptimizer)
        and optimizer.rule.name == rule
        and optimizer._decays_itself()
    )
