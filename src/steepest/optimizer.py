"""The optimizer: param groups, the step, the state dict. Every optimizer here is this class with a rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from steepest import master_weights
from steepest.constructor import check_name, signature_defaults, spell_out
from steepest.distributed.local import is_dtensor, local_part
from steepest.engine.collect import Collector, ParamBatch
from steepest.engine.cuda_graphs import check_capture
from steepest.engine.grad_check import both
from steepest.engine.interrupts import HeldInterrupts
from steepest.engine.matrices import UserFunctions
from steepest.engine.pipeline import decide, take_step
from steepest.explain import Explanation, Reasons, explain, summarize
from steepest.group_names import name_beside
from steepest.group_options import (
    Placeholder,
    check_masters,
    check_views,
    checked,
    complete,
    count_skipped,
    first_rule,
    refuse_model,
)
from steepest.hyperparameters import make_plain, near_miss
from steepest.rule import Rule, Targets, find_rule, register_rule
from steepest.state_dict import loading, saving

__all__ = ["OPTIMIZERS", "Optimizer"]

OPTIMIZERS: dict[str, type[Optimizer]] = {}
"""The optimizer classes by rule name; every class statement with a rule adds one."""


class Optimizer(torch.optim.Optimizer):
    r"""Steepest descent under any rule, or under several at once.

    .. math:: p \leftarrow p - \eta\,(\text{direction} + \lambda p)

    The rule computes the direction; everything else is the same for all rules. Groups may have different
    rules: a group whose ``"rule"`` key names another rule than the optimizer's gets that rule's default
    learning rate and hyper-parameters unless it sets them, and the optimizer's common options.

    State: that of the rules; see :meth:`state_bytes`.

    Args:
        params: tensors, ``(name, tensor)`` pairs, or group dicts; groups keep keys that no rule knows.
        rule: the rule's name, one of :func:`steepest.list_optimizers`; None takes that of the first group.
        extra: options that no rule knows, kept in every group for subclasses.
        **hyper: the rule's hyper-parameters, and the common options (:class:`~steepest.CommonOptions`).

    Raises:
        TypeError: ``params`` is a tensor or a model, or contains anything but tensors; an unknown keyword;
            a misspelt option in a group, or one of another rule.
        ValueError: no parameters; an unknown rule; a hyper-parameter out of range; a parameter that cannot be
            optimized (integers, sparse storage, shards that the rule does not take), by name.

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
    """Names of a subclass's own state. State dicts with other names than these and the rules' are refused."""
    targets: Targets | None = None
    """The targets of parameters whose rule moves those; :mod:`steepest.ternary` sets it by :meth:`watch`."""
    reasons: Reasons | None = None
    """The reason for each tensor's rule; :func:`steepest.build` sets it for :meth:`explain`."""

    def __init_subclass__(
        cls, rule: Rule | None = None, defaults: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Register rule and class under the rule's name: ``class Lion(Optimizer, rule=LionRule())``.

        The rule's defaults are those in its signature, in ``defaults``, and in its bases' signatures.
        """
        super().__init_subclass__(**kwargs)
        if rule is not None:
            check_name(rule.name, cls, OPTIMIZERS.get(rule.name, cls))
            rule.own_defaults = signature_defaults(cls, rule, defaults or {})
            cls.rule = rule
            register_rule(rule)
            OPTIMIZERS[rule.name] = cls
        if hasattr(cls, "rule") and (rule is not None or "__init__" in cls.__dict__):
            spell_out(cls, cls.rule.defaults())

    def __init__(
        self,
        params: ParamsT,
        *,
        rule: str | None = None,
        extra: Mapping[str, Any] | None = None,
        **hyper: Any,
    ) -> None:
        owner = type(self).__name__
        refuse_model(owner, params)
        if rule is None:
            params, rule = first_rule(owner, params)
        known = find_rule(rule).defaults()
        for name in [name for name in hyper if name not in known]:
            is_flag = name in ("differentiable", "foreach", "fused")
            hint = " (compile= says how to run)" if is_flag else near_miss(name, known)
            raise TypeError(f"{owner}() got an unexpected keyword argument {name!r}{hint}")
        defaults = {"rule": rule, **known, **hyper, **(extra or {})}
        make_plain(defaults, known)
        find_rule(rule).check(owner, defaults)
        if not defaults.keys() & {"momentum", "betas"}:
            defaults["momentum"] = Placeholder(0.0)  # they cycle what the groups' rules have
        self._collector = Collector()
        super().__init__(params, defaults)
        check_views(self.defaults.get("views") or {}, self.param_groups)
        check_masters(owner, self.param_groups)

    def _construct(self, params: ParamsT, options: dict[str, Any]) -> None:
        """Initialize with the class's rule and the arguments of its :func:`constructor`."""
        Optimizer.__init__(self, params, rule=self.rule.name, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group; see the constructor for what it may hold and which errors it raises.

        Where all groups so far have a ``"name"``, as those of :func:`steepest.build` do, it gets one, too.
        """
        own: dict[str, Any] = {}  # torch raises the errors for sets and for anything but a dict
        if isinstance(param_group, dict) and not isinstance(param_group.get("params"), set):
            own = checked(type(self).__name__, param_group, self.param_groups, self.defaults)
            if "name" not in own and (name := name_beside(own, self.param_groups, self.defaults)):
                own["name"] = name
            param_group.update(own)
        super().add_param_group(param_group)
        # torch copies the main rule's options into groups of all rules. Schedulers read betas in every group.
        main = find_rule(self.defaults["rule"]).hyper.keys()
        placeholders = {name for name, value in self.defaults.items() if isinstance(value, Placeholder)}
        for name in (main | placeholders) - own.keys() - {"betas"}:
            param_group.pop(name, None)
        self._collector.remember(self.param_groups)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    # What a step in inference mode made, no later step could change outside.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step with all parameters that have a gradient, or none if it raises an error listed below.

        Ctrl-C during the step raises ``KeyboardInterrupt`` when all have been stepped; a second one at once.
        Where memory runs out within the step, some parameters may be a step ahead of others.

        Args:
            closure: evaluates the model and its gradients again, and returns the loss, as ``step()`` then
                does; called once, with gradients enabled, before anything else.

        Raises:
            FloatingPointError: a gradient that is not finite, with ``nonfinite="raise"``.
            RuntimeError: a CUDA graph could not replay this step; processes differ in gradients or options.
            ValueError: an option was changed to an invalid value, a matrix was replaced by a vector, or a
                parameter is on the meta device.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups, state, targets, collector = self.param_groups, self.state, self.targets, self._collector
        plan = collector.plan(type(self).__name__, groups, state, targets)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            check_capture(plan.batches, groups)
        taken: bool | Tensor = True
        if plan.batches or collector.sharded:  # a process without gradients must tell those that have some
            finite = decide(collector, plan.batches, groups, state, targets, self._user_functions)
            with HeldInterrupts():
                taken = self._take(plan.batches, finite)
        if "_taken_in_backward" in self.__dict__:  # count both as one step
            taken = both(self.__dict__.pop("_taken_in_backward"), taken)
        if taken is not True:
            count_skipped(groups, taken)
        collector.keep(plan, groups, state)
        return loss

    def _take(self, batches: list[ParamBatch], finite: bool | Tensor) -> bool | Tensor:
        """Step these parameters if their gradients are finite, and return whether: see :func:`take_step`."""
        groups, functions = self.param_groups, self._user_functions
        sharding = self._collector.sharding(groups, functions)
        return take_step(batches, finite, groups, self.state, functions, sharding)

    def watch(self, targets: Targets) -> None:
        """Let ``step()`` also move the targets of parameters in the groups."""
        targets.bind(self.param_groups, self.state)
        self.targets = targets

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, and discard what backward has stored for targets."""
        super().zero_grad(set_to_none)
        if self.targets is not None:
            self.targets.drop()

    def _user_functions(self, batch: ParamBatch) -> UserFunctions | None:
        """Return a subclass's own code, which steps the batch's parameters one at a time; or None."""
        return None

    @property
    def skipped_steps(self) -> int:
        """The number of steps skipped because a gradient was not finite (reading it waits for the device)."""
        return int(self.param_groups[0]["skipped_steps"])

    def state_bytes(self) -> int:
        """Return the bytes of all state tensors that exist now; only this process's shards count.

        >>> from steepest import Lion
        >>> optimizer = Lion([weight := torch.nn.Parameter(torch.zeros(10))])
        >>> weight.grad = torch.ones(10)
        >>> optimizer.step()
        >>> optimizer.state_bytes()
        40
        """
        entries = [e for state in self.state.values() for e in state.values() if isinstance(e, Tensor)]
        return sum((local_part(entry) if is_dtensor(entry) else entry).nbytes for entry in entries)

    master_weight = master_weights.master_weight
    set_master_weight = master_weights.set_master_weight

    def explain(self) -> Explanation:
        """Explain each tensor's rule and options, and why, as data; ``str()`` of it is a table.

        The reasons are those of :func:`steepest.build`; for other tensors they are "set by hand", or "one
        rule for all tensors". State dicts do not contain them. Sharded parameters have a layout and owners;
        nothing is communicated.

        >>> optimizer = Optimizer({"layer.weight": torch.nn.Parameter(torch.ones(4, 2))}.items(), rule="lion")
        >>> optimizer.explain().rows[0].rule, optimizer.explain().totals[0].state_bytes
        ('lion', 32)
        """
        groups, rule = self.param_groups, self.defaults["rule"]
        sharding = self._collector.sharding(groups, self._user_functions)
        return explain(groups, rule, self.reasons, self.targets, sharding, self.state)

    def __repr__(self) -> str:
        """Summarize the groups in a line each; :meth:`explain` tells of every tensor."""
        return summarize(type(self).__name__, self.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """Return the state and the groups; all processes must call it if each keeps factors of its own."""
        with saving(self):
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a copy of a :meth:`state_dict`; state in floats keeps the dtype it was saved with.

        Coded state and floats are converted to what this run's ``state_dtype`` and ``master`` ask for.
        Checkpoints of other optimizers load if their state means the same: those of ``torch.optim.AdamW``,
        ``SGD`` and ``Muon``, ``lion_pytorch``, ``sgd_sai``, quad_torch, Emerging-Optimizers, and the original
        Simba. Options that they lack keep their current values.

        Raises:
            ValueError: the number of groups or parameters, the order of named ones, a rule, or a state's
                shape or format differs; an entry is missing; the rule does not know a state, or cannot use
                another optimizer's. Nothing was loaded.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"load_state_dict() takes a state dict, got {type(state_dict).__name__}")
        with loading(self, self.extra_state, self.targets):
            super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes that copies and pickles keep: torch's, the reasons and the targets."""
        own = ("reasons", "targets")
        kept: dict[str, Any] = {name: self.__dict__[name] for name in own if name in self.__dict__}
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle or load; options that the groups lack keep their current values, or get defaults."""
        before = self.__dict__.get("param_groups", [{}] * len(state["param_groups"]))
        super().__setstate__(state)
        if "rule" not in self.defaults:
            self.defaults["rule"] = self.rule.name
        for group, known in zip(self.param_groups, before, strict=True):
            complete(group, known, self.defaults)
        if "_collector" not in self.__dict__:  # never pickled: it holds the parameters' shapes
            self._collector = Collector(self.param_groups)
        if self.targets is not None:
            self.targets.bind(self.param_groups, self.state)
