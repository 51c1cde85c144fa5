"""Collect param groups into batches of parameters to step, before anything changes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from steepest.distributed.agreement import History
from steepest.distributed.local import LocalState, is_dtensor, local_part
from steepest.engine.batches import ParamBatch, ParamUpdate, check_names, describe, name_of
from steepest.engine.cycled_momentum import adopt_cycled_momentum
from steepest.engine.layout import Extent, real_view
from steepest.engine.param_check import (
    check_materialized,
    check_numbers,
    check_overlaps,
    check_param,
    check_shard,
)
from steepest.engine.plan import Plan
from steepest.engine.storage import Storage, storage_of
from steepest.engine.units import Sharding
from steepest.engine.update import PLAIN, UpdateConfig
from steepest.hyperparameters import is_finite, make_plain
from steepest.random import tensor_word
from steepest.rule import Group, Rule, Targets, find_rule

__all__ = ["Collector", "ParamBatch", "ParamUpdate", "describe"]


_LISTS = (list, tuple)


class _CheckedGroup:
    """A snapshot of a group at its last check, so that a step only checks changes."""

    def __init__(self, rule: Rule, group: Group) -> None:
        names = [name for name in rule.defaults() if name != "lr"]
        self.rule = rule
        self.read = itemgetter("rule", "base_lr", *names)
        # Copies, so that changes in place show up.
        self.values: tuple[Any, ...] | None = None
        self.views = (rule.counts_matrices(group), copy.copy(group.get("views")))
        self.params: list[Tensor] = []
        # A copy of the parameters' names, and the words of the noise's keys, if there are names.
        self.names: list[str] | None = None
        self.words: list[int] | None = None
        self.configs: dict[Any, UpdateConfig] = {}
        self.storages: dict[Any, Storage] = {}

    def accept(self, group: Group) -> None:
        """Record the present options as checked."""
        self.values = tuple([copy.copy(v) if isinstance(v, (list, dict)) else v for v in self.read(group)])

    def same_options(self, group: Group) -> bool:
        try:
            return bool(self.read(group) == self.values)
        except (KeyError, RuntimeError, ValueError):
            return False


class Collector:
    """Turn an optimizer's param groups into batches, and check what has changed in them.

    It is no state of the optimizer: without it the next step checks everything.
    """

    def __init__(self, groups: Sequence[Group] = ()) -> None:
        self._groups: list[_CheckedGroup] = []
        # The shapes of all vectors and whether there were matrices when the groups were made.
        self._vectors: set[torch.Size] = set()
        self._matrices = False
        # The key words on each device, kept as long as the optimizer: a captured graph reads them.
        self._words: dict[Any, dict[int, Tensor]] = {}
        # Whether processes must agree before a step: a parameter is or was a DTensor, or a group asks for it.
        self.sharded = False
        self.history = History()
        self._sharding = Sharding()
        self._is_made = False
        self._plan: Plan | None = None
        # The ids of the parameters that the last step had gradients of.
        self._stepped: list[int] = []
        self.remember(groups)

    def forget(self, groups: Sequence[Group]) -> None:
        """Look at everything again, because groups were loaded."""
        self._is_made = False
        self._plan = None
        # Parameters may have been replaced by shards, which no step has seen yet.
        self.sharded |= any(map(is_dtensor, (param for group in groups for param in group["params"])))

    def remember(self, groups: Sequence[Group]) -> None:
        """Record the parameters of new groups; the next step checks their options."""
        for index in range(len(self._groups), len(groups)):
            checked = _CheckedGroup(find_rule(groups[index]["rule"]), groups[index])
            self._groups.append(checked)
            self._remember(checked, groups[index]["params"])
            self.sharded = self.sharded or groups[index].get("distributed") == "owners"

    def _remember(self, checked: _CheckedGroup, params: Sequence[Tensor]) -> None:
        checked.params = list(params)
        self._vectors |= {param.shape for param in params if param.dim() < 2}
        self._matrices |= any(param.dim() > 1 for param in params)
        self.sharded = self.sharded or any(type(param) not in PLAIN and is_dtensor(param) for param in params)
        self._is_made = False

    def check(self, who: str, groups: Sequence[dict[str, Any]]) -> None:
        """Raise ``ValueError``, before the step begins, for options or parameters that would break it.

        Args:
            who: the optimizer, for the message.
            groups: its param groups.
        """
        adopt_cycled_momentum(groups)
        renamed = len(self._groups) > len(groups)
        anew = False
        del self._groups[len(groups) :]
        for index, group in enumerate(groups):
            known = self._groups[index] if index < len(self._groups) else None
            lr = group.get("lr")
            if not (type(lr) is float and math.isfinite(lr)):
                make_plain(group, ("lr",))
                lr = group.get("lr")
                _check_lr(f"{who}, group {index}", lr, reads=not group.get("capturable"))
            if known is None or not known.same_options(group):
                known = self._look_again(f"{who}, group {index}", groups, index, known)
                anew = True
            params = group.get("params")
            if not isinstance(params, _LISTS):
                raise ValueError(f"{who}, group {index}: params must be a list of tensors, got {params!r}")
            if (names := group.get("param_names")) != known.names:
                check_names(f"{who}, group {index}", names)
                renamed = True
            if len(params) != len(known.params) or not all(map(is_, params, known.params)):
                self._check_replaced(known, group, index)
                check_overlaps([each for each in groups if isinstance(each.get("params"), _LISTS)])
                self._remember(known, params)
                renamed = True
        if renamed:
            self._hash_names(groups)
        if renamed or anew:
            self._plan = None

    def _hash_names(self, groups: Sequence[Group]) -> None:
        """Compute the words of all parameters' noise keys from their names."""
        met: dict[int, int] = {}
        for known, group in zip(self._groups, groups, strict=True):
            names = group.get("param_names")
            known.names, known.words = copy.copy(names), None
            # Parameters may have been put into a group without names.
            if names is None or len(names) != len(group["params"]):
                continue
            known.words = []
            for name in names:
                word = tensor_word(name)
                times = met[word] = met.get(word, -1) + 1
                # Two models' parameters may have the same names.
                known.words.append(tensor_word(f"{name} {times}") if times else word)

    def _look_again(
        self, who: str, groups: Sequence[dict[str, Any]], index: int, known: _CheckedGroup | None
    ) -> _CheckedGroup:
        group = groups[index]
        rule = find_rule(group.get("rule"))
        make_plain(group, rule.defaults())
        rule.check(who, {"base_lr": None, **group, "lr": rule.own_defaults["lr"]})
        checked = _CheckedGroup(rule, group)
        if known is None:
            self._groups.append(checked)
            self._remember(checked, group["params"])
        else:
            if checked.views != known.views and not self._flattened(known, group):
                for at, param in enumerate(group["params"]):
                    rule.check_param(describe(group, index, at), name_of(group, at), param, group)
            checked.params, checked.names, checked.words = known.params, known.names, known.words
            self._groups[index] = checked
        checked.accept(group)
        self.sharded |= group["agree"] == "all" or group.get("distributed") == "owners"
        self._is_made = False
        return checked

    def _check_replaced(self, known: _CheckedGroup, group: Group, group_index: int) -> None:
        """Refuse parameters swapped into a group that its rule cannot serve."""
        for at, param in enumerate(group["params"]):
            if not isinstance(param, Tensor):
                raise ValueError(
                    f"parameter {at} of group {group_index} was replaced by a {type(param).__name__}: only "
                    "tensors are stepped"
                )
        if self._flattened(known, group):
            raise ValueError(
                f"{describe(group, group_index, 0)} is a vector of shape {tuple(group['params'][0].shape)}, "
                "which was not there when the group was made: something has flattened the parameters "
                f"(DeepSpeed ZeRO, FSDP1), but {known.rule.name!r} needs whole tensors. Use "
                "DistributedDataParallel or fully_shard (FSDP2), which keep the shapes, or an element rule, "
                "such as 'adamw', which takes any. Nothing was stepped"
            )
        ids = {id(param) for param in known.params}
        for at, param in enumerate(group["params"]):
            if id(param) not in ids:
                check_param(describe(group, group_index, at), name_of(group, at), param, known.rule, group)

    def _flattened(self, known: _CheckedGroup, group: Group) -> bool:
        """Return whether tensors of a rule that needs whole ones were replaced by flat vectors.

        Whoever replaces parameters puts matrices in their place; a flat vector of them all leaves none.
        """
        params = group["params"]
        if known.rule.scope == "element" or not (self._matrices and params):
            return False
        return all(param.dim() < 2 and param.shape not in self._vectors for param in params)

    def plan(
        self,
        who: str,
        groups: Sequence[dict[str, Any]],
        states: Mapping[Tensor, MutableMapping[str, Any]],
        targets: Targets | None = None,
    ) -> Plan:
        """Return the last step's plan if it still holds, else one of :meth:`batches_of` the same arguments.

        :meth:`keep` gives it back, unless the step raises.
        """
        self.check(who, groups)
        plan, self._plan = self._plan, None
        if plan is not None and targets is None and plan.renew(groups, states):
            return plan
        # What has been dropped since then need not be alive while the next state is made.
        del plan
        check_materialized(groups)
        return Plan(self._collect(groups, states, targets))

    def keep(self, plan: Plan, groups: Sequence[Group], states: Mapping[Tensor, Any]) -> None:
        """Keep a step's plan for the next one, if processes need not agree on the step.

        Making it ready costs as much as a step saves, so the last step must have had the same gradients.
        """
        settled = plan.stepped == self._stepped
        self._stepped = plan.stepped
        if settled and not self.sharded and plan.keep(groups, states):
            self._plan = plan

    def batches_of(
        self,
        who: str,
        groups: Sequence[dict[str, Any]],
        states: Mapping[Tensor, MutableMapping[str, Any]],
        targets: Targets | None = None,
    ) -> list[ParamBatch]:
        """Check the groups, and batch the parameters that have gradients by group, device and dtypes.

        Args:
            who: the optimizer, for messages.
            groups: its param groups.
            states: the parameters' states; none is made.
            targets: what parameters stand for whose rule moves that.

        Raises:
            ValueError: see :meth:`check`.
        """
        self.check(who, groups)
        return self._collect(groups, states, targets)

    def _collect(
        self,
        groups: Sequence[Group],
        states: Mapping[Tensor, MutableMapping[str, Any]],
        targets: Targets | None,
    ) -> list[ParamBatch]:
        batches: list[ParamBatch] = []
        ordinal = 0
        seen: set[int] = set()
        for group_index, group in enumerate(groups):
            by_config: dict[int, ParamBatch] = {}
            known = self._groups[group_index]
            moves, words = known.rule.moves, known.words
            waits = moves and targets is not None and targets.waits()
            for index, owner in enumerate(group["params"], ordinal):
                if (owner.grad is None and not waits) or id(owner) in seen:
                    continue
                seen.add(id(owner))
                word = index if words is None else words[index - ordinal]
                member = self._member(group, group_index, index - ordinal, word, states)
                if moves:
                    member.target = _target(targets, member)
                config = self._config(group_index, group, member)
                batch = by_config.get(id(config))
                if batch is None:
                    batch = by_config[id(config)] = ParamBatch(config, [])
                    batches.append(batch)
                batch.members.append(member)
            ordinal += len(group["params"])
        return batches

    def one(
        self,
        groups: Sequence[Group],
        group_index: int,
        index: int,
        ordinal: int,
        states: Mapping[Tensor, MutableMapping[str, Any]],
    ) -> ParamBatch:
        """Return one parameter, which has a gradient, as a batch; the groups are checked."""
        group, words = groups[group_index], self._groups[group_index].words
        word = ordinal if words is None else words[index]
        member = self._member(group, group_index, index, word, states)
        return ParamBatch(self._config(group_index, group, member), [member])

    def sharding(
        self, groups: Sequence[Group], user_functions: Callable[[ParamBatch], Any]
    ) -> Sharding | None:
        """Return who computes the matrices; None if processes share the work on none.

        ``user_functions`` gives the optimizer's own code for a batch, which must see whole parameters.
        """
        if not self.sharded:
            return None
        if not self._is_made:
            self._sharding.make(groups, lambda config: user_functions(ParamBatch(config, [])) is not None)
            self._is_made = True
        return self._sharding if self._sharding.is_shared else None

    def _member(
        self,
        group: Group,
        group_index: int,
        index: int,
        word: int,
        states: Mapping[Tensor, MutableMapping[str, Any]],
    ) -> ParamUpdate:
        owner: Tensor = group["params"][index]
        if type(owner) not in PLAIN and is_dtensor(owner):
            self.sharded = True
            of = _member_of_target if self._groups[group_index].rule.moves else _local_member
            return of(group, group_index, index, word, states)
        if type(owner) not in PLAIN:
            check_numbers(describe(group, group_index, index), owner)
        # A parameter without a gradient is collected only for its target.
        grad = torch.zeros_like(owner) if owner.grad is None else owner.grad
        if grad.layout is not torch.strided:
            grad = grad.to_dense()
        param = owner
        if owner.is_complex():
            param, grad = real_view(owner), real_view(grad)
        return ParamUpdate(group, group_index, index, word, owner, param, grad, states.get(owner, {}))

    def _config(self, group_index: int, group: Group, member: ParamUpdate) -> UpdateConfig:
        """Return the configuration of a parameter in a checked group."""
        checked = self._groups[group_index]
        param, dtype = member.param, member.grad.dtype
        storage = _storage(checked, group, member)
        key = (param.dtype, dtype, param.device, storage)
        config = checked.configs.get(key)
        if config is None:
            if dtype.is_complex:
                raise ValueError(f"{member.name} is real, but its gradient is {dtype}: nothing was stepped")
            config = UpdateConfig(checked.rule, group, param.dtype, dtype, param.device, storage)
            checked.configs[key] = config
            config.words = self._words.setdefault((param.device, config.offloaded), {})
        # A copied group is a different dict with the same options.
        config.group = group
        return config


def _storage(checked: _CheckedGroup, group: Group, member: ParamUpdate) -> Storage:
    """Return how the parameter's state is stored."""
    owner, views = member.owner, group.get("views") if checked.rule.transforms else None
    view = (views or {}).get(member.label)
    dtypes = {name: entry.dtype for name, entry in member.state.items() if isinstance(entry, Tensor)}
    placed = None
    if type(owner) not in PLAIN and is_dtensor(owner):
        placed = (tuple(owner.device_mesh.shape), owner.placements)
    key = (owner.dtype, owner.shape, placed, repr(view), *dtypes.items())
    storage = checked.storages.get(key)
    if storage is None:
        try:
            storage = storage_of(checked.rule, group, owner, view, dtypes)
        except ValueError as error:
            raise ValueError(f"{member.name}: {error}") from None
        checked.storages[key] = storage
    return storage


def _local_member(
    group: Group,
    group_index: int,
    index: int,
    word: int,
    states: Mapping[Tensor, MutableMapping[str, Any]],
) -> ParamUpdate:
    """Return the local shard of a DTensor.

    A gradient with other placements is redistributed later, when the processes have agreed: see
    :func:`~steepest.engine.grad_check.check_together`.
    """
    owner = group["params"][index]
    who = describe(group, group_index, index)
    region = check_shard(who, owner, find_rule(group["rule"]), group)
    assert region is not None
    # Without one, its state is made before the first step.
    given = torch.zeros_like(owner) if owner.grad is None else owner.grad
    if not is_dtensor(given) or given.device_mesh != owner.device_mesh:
        raise ValueError(f"{who} is a DTensor, but its gradient is not, or lies on another mesh")
    param, grad = real_view(local_part(owner)), real_view(local_part(given))
    whole = (*owner.shape, 2) if owner.is_complex() else owner.shape
    state = LocalState(owner, states.get(owner, {}))
    member = ParamUpdate(group, group_index, index, word, owner, param, grad, state)
    member.extent, member.first = Extent.within(whole, region.first), region.first
    return member


def _member_of_target(
    group: Group,
    group_index: int,
    index: int,
    word: int,
    states: Mapping[Tensor, MutableMapping[str, Any]],
) -> ParamUpdate:
    """Return a DTensor that stands for a target; its state is the target's, and not laid out as it is."""
    owner = group["params"][index]
    param = local_part(owner)
    grad = torch.zeros_like(param) if owner.grad is None else owner.grad
    grad = local_part(grad) if is_dtensor(grad) else grad
    return ParamUpdate(group, group_index, index, word, owner, param, grad, states.get(owner, {}))


def _target(targets: Targets | None, member: ParamUpdate) -> Any:
    target = None if targets is None else targets.find(member.owner)
    if target is None:
        raise ValueError(
            f"{member.name} is not the vote buffer of a ternary layer, as {member.group['rule']!r} "
            "needs: steepest.build(model, ...) makes such groups"
        )
    return target


def _check_lr(who: str, lr: Any, *, reads: bool) -> None:
    # A schedule may end slightly below 0 by rounding, which is harmless. Reading a tensor's value would
    # wait for its device, and a captured step may read none.
    if isinstance(lr, Tensor):
        real = lr.numel() == 1 and not lr.is_complex() and lr.dtype is not torch.bool
        good = real and (not (reads and lr.is_cpu) or math.isfinite(lr))
    else:
        good = is_finite(lr)
    if not good:
        raise ValueError(f"{who}: lr must be a finite number or a 1-element tensor, got {lr!r}")
