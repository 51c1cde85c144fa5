"""The optimizer: param groups, the step, the state dict. Every optimizer here is this class with a rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from steepest.constructor import signature_defaults, spell_out
from steepest.distributed.local import is_dtensor, local_part
from steepest.engine.collect import Collector, ParamBatch
from steepest.engine.cuda_graphs import check_capture
from steepest.engine.grad_check import both, check_gradients, check_together
from steepest.engine.matrices import UserFunctions
from steepest.engine.pipeline import take_step
from steepest.hyperparameters import near_miss, plain
from steepest.param_groups import (
    OLD_REASONS,
    check_overlaps,
    check_own_views,
    check_params,
    check_views,
    drop_foreign_options,
    filled,
)
from steepest.rule import Rule, Targets, find_rule, register_rule
from steepest.state_dict import loadable, placed, restored

if TYPE_CHECKING:
    from steepest.explain import Explanation, Reasons

__all__ = ["OPTIMIZERS", "Optimizer"]

OPTIMIZERS: dict[str, type[Optimizer]] = {}
"""The classes by their rules' names; a class statement with a rule adds one."""


class Optimizer(torch.optim.Optimizer):
    r"""Steepest descent under any rule, or under several at once.

    .. math:: p \leftarrow p - \eta\,(\text{direction} + \lambda p)

    The direction is the rule's; weight decay, learning rate, rounding, the check for non-finite
    gradients and compilation are the same for all. A param group names its rule, so one object can
    hold several: a group's ``"rule"`` key picks another than the optimizer's, with that rule's own
    default learning rate and hyper-parameters unless the group gives them, and the optimizer's common
    options.

    State: what the rules keep; see :meth:`state_bytes`.

    Args:
        params: tensors, ``(name, tensor)`` pairs, or group dicts. Keys of a group that no rule knows are
            kept as they are.
        rule: the rule's name, one of :func:`steepest.list_optimizers`.
        extra: options that no rule knows, kept in every group for subclasses to read.
        **hyper: the rule's hyper-parameters, and the common options (:class:`~steepest.CommonOptions`).

    Raises:
        TypeError: ``params`` is a tensor or holds something else than tensors; an unknown keyword.
        ValueError: no parameters; an unknown rule; a hyper-parameter out of range; a parameter that
            cannot be optimized (integers, sparse storage, shards), by name.

    >>> matrix, bias = (torch.nn.Parameter(torch.ones(n)) for n in (4, 2))
    >>> optimizer = Optimizer(
    ...     [{"params": [matrix], "weight_decay": 0.1}, {"params": [bias], "rule": "sgd", "lr": 0.5}],
    ...     rule="lion", lr=0.25,
    ... )
    >>> matrix.grad, bias.grad = torch.ones(4), torch.ones(2)
    >>> optimizer.step()
    >>> matrix[0].item(), bias[0].item()
    (0.725..., 0.5)
    """

    rule: ClassVar[Rule]
    extra_state: ClassVar[frozenset[str]] = frozenset()
    """Names of state that a subclass keeps besides its rules'. State dicts with other names are refused."""

    targets: Targets | None = None
    """What parameters stand for whose rule moves that: :mod:`steepest.ternary` sets it by :meth:`watch`."""

    reasons: Reasons | None = None
    """Why each tensor has its rule; :func:`steepest.build` sets it for :meth:`explain`."""

    def __init_subclass__(
        cls, rule: Rule | None = None, defaults: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """``class Lion(Optimizer, rule=LionRule())`` makes rule and class known by the rule's name.

        The defaults of the rule's hyperparameters are those of the class's constructor, or of its bases' for
        options that it takes by ``**``; ``defaults`` says which of the latter are others for this rule.
        """
        super().__init_subclass__(**kwargs)
        if rule is not None:
            known = OPTIMIZERS.get(rule.name)
            # The same class again is a module that was reloaded, not a clash.
            if known is not None and (known.__module__, known.__qualname__) != (
                cls.__module__,
                cls.__qualname__,
            ):
                raise ValueError(
                    f"the rule name {rule.name!r} is taken by {known.__module__}.{known.__qualname__}"
                )
            rule.own_defaults = signature_defaults(cls, rule, defaults or {})
            cls.rule = rule
            register_rule(rule)
            OPTIMIZERS[rule.name] = cls
        if hasattr(cls, "rule") and (rule is not None or "__init__" in cls.__dict__):
            spell_out(cls, cls.rule.defaults())

    def __init__(
        self, params: ParamsT, *, rule: str, extra: Mapping[str, Any] | None = None, **hyper: Any
    ) -> None:
        found = find_rule(rule)
        known = found.defaults()
        for name in hyper:
            if name not in known:
                flags = ("differentiable", "foreach", "fused")
                hint = " (compile= says how to run)" if name in flags else near_miss(name, known)
                raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {name!r}{hint}")
        defaults = {"rule": rule, **known, **hyper, **(extra or {})}
        found.check(type(self).__name__, defaults)
        defaults = {name: plain(value) if name in known else value for name, value in defaults.items()}
        super().__init__(params, defaults)
        check_views(self.defaults.get("views") or {}, self.param_groups)

    def _construct(self, params: ParamsT, options: dict[str, Any]) -> None:
        """Make an optimizer by its own rule of what its :func:`constructor` was called with."""
        Optimizer.__init__(self, params, rule=self.rule.name, **options)

    # -- param groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group; see the constructor for what it may hold and which errors it raises."""
        full: dict[str, Any] = {}
        if isinstance(param_group, dict) and "params" in param_group:
            params = param_group["params"]
            if not isinstance(params, (Tensor, set)):
                # A generator can be read once only, and it is looked at before it is added.
                param_group["params"] = params = list(params)
            full = filled(param_group, self.defaults)
            group_index = len(self.param_groups)
            find_rule(full["rule"]).check(f"{type(self).__name__}, group {group_index}", full)
            full |= {name: plain(full[name]) for name in find_rule(full["rule"]).defaults()}
            full.setdefault("base_lr", float(full["lr"]))
            given = [params] if isinstance(params, Tensor) else list(params)
            check_params(given, group_index, full)
            check_overlaps(given, (param for group in self.param_groups for param in group["params"]))
            if (own := param_group.get("views")) and own is not self.defaults.get("views"):
                check_own_views(own, full["rule"], param_group["params"])
            param_group.update(full)
        super().add_param_group(param_group)
        drop_foreign_options(self.param_groups[-1], self.defaults["rule"], keep=full)
        self._collector.remember(self.param_groups)

    # -- the step

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step with the parameters that have a gradient.

        Args:
            closure: evaluates the model and its gradients again and returns the loss; called once, with
                gradients enabled, before anything else.

        Returns:
            What the closure returned.

        Raises:
            FloatingPointError: a gradient that is not finite, with ``nonfinite="raise"``.
            RuntimeError: a CUDA graph is being captured whose replay would not be this step.
            ValueError: an option in a param group has become one that the rule does not take, or a
                matrix a vector. In either case parameters and state are as they were.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        collector = self._collector
        batches = collector.batches_of(type(self).__name__, self.param_groups, self.state, self.targets)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            check_capture(batches, self.param_groups)
        taken: bool | Tensor = True
        # A process without gradients must tell the others.
        if batches or collector.sharded:
            taken = self._take(batches, self._check(batches))
        # Of released gradients, which are stepped before: they and the rest are one step to count.
        if "_taken_in_backward" in self.__dict__:
            taken = both(self.__dict__.pop("_taken_in_backward"), taken)
        if taken is not True:
            self._count_skipped((~taken).to(torch.int64) if isinstance(taken, Tensor) else 1)
        return loss

    def _take(self, batches: list[ParamBatch], finite: bool | Tensor) -> bool | Tensor:
        """Step these parameters if their gradients are finite; whether it was done, see :func:`take_step`."""
        return take_step(batches, finite, self.state, self._states_by_rule, self._user_functions)

    @property
    def _collector(self) -> Collector:
        # Not in what is pickled: a copy's parameters have the shapes that they have there.
        collector: Collector | None = self.__dict__.get("_collects")
        if collector is None:
            collector = self.__dict__["_collects"] = Collector()
        return collector

    def watch(self, targets: Targets) -> None:
        """Step what parameters stand for whose rule moves that; the parameters are in the groups."""
        targets.bind(self.param_groups, self.state)
        self.targets = targets

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, and what backward has left for targets."""
        super().zero_grad(set_to_none)
        if self.targets is not None:
            self.targets.drop()

    def _check(self, batches: list[ParamBatch]) -> bool | Tensor:
        """Whether this step may be taken, see :func:`check_gradients`; nothing has changed yet."""

        def check() -> bool | Tensor:
            if self._collector.sharded:
                return check_together(batches, self.param_groups)
            watched = any([batch.config.group["nonfinite"] != "ignore" for batch in batches])  # noqa: C419
            return check_gradients(batches) if watched else True

        return check() if self.targets is None else self.targets.agree(self.param_groups, self.state, check)

    def _user_functions(self, batch: ParamBatch) -> UserFunctions | None:
        """Return a subclass's own code for the batch's parameters, which steps them one at a time."""
        return None

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped for a gradient that was not finite (waits for the device)."""
        return int(self.param_groups[0]["skipped_steps"])

    def state_bytes(self) -> int:
        """Bytes of all state tensors that exist now; of sharded ones, this process's part.

        >>> from steepest import Lion
        >>> weight = torch.nn.Parameter(torch.zeros(10))
        >>> optimizer = Lion([weight])
        >>> before = optimizer.state_bytes()
        >>> weight.grad = torch.ones(10)
        >>> optimizer.step()
        >>> before, optimizer.state_bytes()
        (0, 40)
        """
        entries = [value for state in self.state.values() for value in state.values()]
        tensors = [value for value in entries if isinstance(value, Tensor)]
        return sum((local_part(value) if is_dtensor(value) else value).nbytes for value in tensors)

    def explain(self) -> Explanation:
        """Explain what each tensor gets and why: rows and totals, and as a string a table.

        The reasons are those of :func:`steepest.build`; for other tensors they are "set by hand". Copies
        and pickles keep the reasons; state dicts do not, because the optimizer that loads one has its own.

        >>> optimizer = Optimizer({"layer.weight": torch.nn.Parameter(torch.ones(4, 2))}.items(), rule="lion")
        >>> optimizer.explain().rows[0].rule, optimizer.explain().totals[0].state_bytes
        ('lion', 32)
        """
        from steepest.explain import explain

        return explain(self.param_groups, self.defaults["rule"], self.reasons, self.targets)

    def _count_skipped(self, count: int | Tensor) -> None:
        held = any(group["capturable"] for group in self.param_groups)
        for group in self.param_groups:
            before = group["skipped_steps"]
            if held and isinstance(before, Tensor) and isinstance(count, Tensor):
                # In the same memory, to which a graph that was captured adds in every replay. A checkpoint
                # may have brought it to the host.
                group["skipped_steps"] = before.to(count.device).add_(count)
            else:
                group["skipped_steps"] = before + count

    def _states_by_rule(self) -> dict[str, list[Mapping[str, Tensor]]]:
        states: dict[str, list[Mapping[str, Tensor]]] = {}
        for group in self.param_groups:
            stepped = [self.state[param] for param in group["params"] if self.state.get(param)]
            states.setdefault(group["rule"], []).extend(stepped)
        return states

    # -- checkpoints

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave; every state tensor keeps the dtype it was saved with.

        Tensors are copied: nothing is shared with ``state_dict`` afterwards. Checkpoints of other optimizers
        load where their state means the same: those of ``torch.optim.AdamW``, ``SGD`` and ``Muon``,
        ``lion_pytorch``, ``sgd_sai``, quad_torch, Emerging-Optimizers, and the original Simba. Options that
        they do not have stay as they are here.

        Raises:
            ValueError: another number of groups or parameters, another rule, state of another shape than
                the parameter's, or state that this rule does not know; a checkpoint of another optimizer
                that cannot go on here, by its name. The optimizer is as it was.
        """
        accepted: dict[str, Any] = {}

        def check(_: torch.optim.Optimizer, loaded: dict[str, Any]) -> dict[str, Any] | None:
            if self.targets is not None:
                loaded = self.targets.check_load(self.param_groups, loaded)
            here = loadable(self.param_groups, loaded, self.extra_state, self.targets)
            accepted.update(here)
            return placed(self.param_groups, here) or here

        def restore(_: torch.optim.Optimizer) -> None:
            for ours, theirs in zip(self.param_groups, accepted["param_groups"], strict=True):
                for saved, param in zip(theirs["params"], ours["params"], strict=True):
                    if saved in accepted["state"]:
                        self.state[param] = restored(param, ours, accepted["state"][saved])

        # The user's own pre-hooks may replace the dict, so it is looked at after them; their post-hooks
        # must find the dtypes mended.
        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()
        if self.targets is not None:
            self.targets.drop()
            self.targets.bind(self.param_groups, self.state)

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles keep: torch's part, the reasons and the targets."""
        state: dict[str, Any] = super().__getstate__()
        kept = {"reasons": self.reasons, "targets": self.targets}
        return state | {name: value for name, value in kept.items() if value is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle; options that did not exist when the pickle was made get their defaults."""
        current = self.__dict__.get("param_groups", ())
        made = "_collects" in self.__dict__
        super().__setstate__(state)
        self.defaults.setdefault("rule", type(self).rule.name if hasattr(type(self), "rule") else None)
        for index, group in enumerate(self.param_groups):
            known = current[index] if index < len(current) else {}
            if made:
                for name in OLD_REASONS.difference(known):
                    group.pop(name, None)
            fallback = {k: v for k, v in known.items() if k not in ("params", "param_names", "base_lr")}
            for name, value in filled({**fallback, **group}, self.defaults).items():
                group.setdefault(name, value)
            if known:
                drop_foreign_options(group, self.defaults["rule"], keep=known)
            group.setdefault("base_lr", float(group.get("initial_lr", group["lr"])))
        if not made:
            self._collector.remember(self.param_groups)
        if self.targets is not None:
            self.targets.bind(self.param_groups, self.state)
