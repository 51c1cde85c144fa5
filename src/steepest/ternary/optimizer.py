"""One optimizer for a model with ternary layers: parameters by rules, packed weights by votes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from steepest.engine.collect import ParamBatch
from steepest.explain import Explanation, Row, explain
from steepest.optimizer import Optimizer
from steepest.registry import register_maker
from steepest.ternary.layer import TernaryLinear
from steepest.ternary.ranks import rank_and_world_size
from steepest.ternary.trainer import TernaryFlip

__all__ = ["RULE", "TernaryOptimizer"]

RULE = "ternary_flip"

# State entries of a layer's scale that hold the layer's accumulator and the trainer's step, and the key of
# the first param group that holds its options: so that checkpoints of all kinds have them.
_VOTES, _STEP, _OPTIONS = "votes", "flip_step", RULE


class TernaryOptimizer(Optimizer):
    """An optimizer whose step also moves ternary and binary weights; :func:`steepest.build` makes it.

    It is an :class:`~steepest.Optimizer` with a :class:`TernaryFlip` beside the param groups: ``step``
    flips, ``zero_grad`` drops votes, a gradient that is not finite in either skips both, and
    ``state_dict`` holds the accumulators, as ``"votes"`` in the state of each layer's scales, and the
    options, as plain data in the first param group (so that they are loaded as those of param groups are).

    Args:
        params: as for every optimizer; the scales of the trainer's layers must be among them.
        flip: moves the ternary weights.
        rule: the rule's name.
        extra, hyper: as for :class:`~steepest.Optimizer`.

    Raises:
        ValueError: the scales of a ternary layer are not among the parameters, by name; and what
            :class:`~steepest.Optimizer` raises.

    >>> import steepest
    >>> model = nn.Sequential(TernaryLinear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> optimizer = steepest.build(model, "lion", ternary={"threshold": 2})
    >>> for _ in range(2):
    ...     model(torch.ones(4, 8)).square().mean().backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> optimizer.flip.stats().flips > 0, optimizer.state[model[0].scale]["votes"].dtype
    (True, torch.int8)
    """

    flip: TernaryFlip
    extra_state = frozenset({_VOTES, _STEP})

    def __init__(
        self,
        params: ParamsT,
        *,
        flip: TernaryFlip,
        rule: str,
        extra: Mapping[str, Any] | None = None,
        **hyper: Any,
    ) -> None:
        self.flip = flip
        super().__init__(params, rule=rule, extra=extra, **hyper)
        known = {id(param) for group in self.param_groups for param in group["params"]}
        for name, layer in flip.layers.items():
            if id(layer.scale) not in known:
                raise ValueError(f"the scales of ternary layer {name!r} are not among the parameters")
        # Not in the state: distributed checkpoints assume that a state with entries has all of them.
        self.param_groups[0][_OPTIONS] = self.flip.options
        self._hand_on()

    def _share(self) -> None:
        """Put the trainer's tensors and options into the state and the first group."""
        self.param_groups[0][_OPTIONS] = self.flip.options
        for name, layer in self.flip.layers.items():
            self.state[layer.scale].update(self._entries(name))

    def _entries(self, name: str) -> dict[str, Tensor]:
        """Return what the state of a layer's scale has besides its rule's entries."""
        return {_VOTES: self.flip.accumulators[name], _STEP: self.flip.taken}

    # -- the step

    def _has_more(self) -> bool:
        return self.flip.has_votes

    def _not_in_a_graph(self) -> str | None:
        return "a step of ternary weights"

    def _check(self, batches: list[ParamBatch]) -> bool | Tensor:
        self._check_scales()
        self._hand_on()
        # The trainer must know whether it may flip, so the device's answer is read here; and all ranks must
        # learn what one of them finds.
        try:
            finite = bool(super()._check(batches))
        except FloatingPointError:
            if rank_and_world_size(self.flip.process_group)[1] > 1:
                self.flip.prepare(finite=False)
            raise
        return self.flip.prepare(finite)

    def _check_scales(self) -> None:
        """Raise ``RuntimeError`` if the model has other parameters than this optimizer steps."""
        known = {id(param) for group in self.param_groups for param in group["params"]}
        for name, layer in self.flip.layers.items():
            if id(layer.scale) not in known:
                raise RuntimeError(
                    f"the scales of ternary layer {name!r} are another tensor than this optimizer was made "
                    "for, as after load_state_dict(assign=True); nothing was changed. Make the optimizer "
                    "after that."
                )

    def _hand_on(self) -> None:
        """Pass a change of the groups' ``nonfinite`` on to the votes' options."""
        now = [group["nonfinite"] for group in self.param_groups]
        before = self.__dict__.get("_nonfinite", now)
        changed = [new for new, old in zip(now, before, strict=False) if new != old]
        if changed:
            self.flip.options["nonfinite"] = changed[0]
        self._nonfinite = now

    def _step_rest(self) -> None:
        # torch's distributed checkpoints fill a fresh state by a step of their own, which must not count.
        if not self.flip.unused:
            self.flip.take()
        # In every step: an accumulator follows its layer to another device.
        self._share()

    def _states_by_rule(self) -> dict[str, list[Mapping[str, Tensor]]]:
        # A scale's state holds votes even if its own rule has never stepped it.
        states = super()._states_by_rule()
        return {rule: [s for s in each if not s.keys() <= {_VOTES, _STEP}] for rule, each in states.items()}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, and drop the votes that no step has counted."""
        super().zero_grad(set_to_none)
        self.flip.zero_grad()

    def state_bytes(self) -> int:
        """Count the bytes of all state tensors that exist now, accumulators included."""
        shared: int = sum(
            state[name].numel() * state[name].element_size()
            for state in self.state.values()
            for name in (_VOTES, _STEP)
            if name in state
        )
        return super().state_bytes() - shared + self.flip.state_bytes()

    def explain(self) -> Explanation:
        """Say what every tensor gets and why; packed weights have the rule ``"ternary_flip"``."""
        return explain(self.param_groups, self.defaults["rule"], self.reasons, self._rows())

    def _rows(self) -> list[Row]:
        return [self._row(name, layer) for name, layer in self.flip.layers.items()]

    def _row(self, name: str, layer: TernaryLinear) -> Row:
        options, accumulator = self.flip.options, self.flip.accumulators[name]
        why = f"linear: {type(layer).__name__}, {layer.bits} bit{'s' * (layer.bits > 1)} a weight"
        if layer.trainable:
            why += f"; moved by {options['votes']} votes, threshold {options['threshold']:g} "
            why += options["schedule"]
        return Row(
            name=f"{name}.packed",
            aliases=(),
            shape=(layer.out_features, layer.in_features),
            rule=RULE,
            lr=math.nan,
            weight_decay=0.0,
            view=None,
            why=why,
            frozen=not layer.trainable,
            parameters=layer.out_features * layer.in_features,
            state_bytes=accumulator.numel() * accumulator.element_size(),
        )

    # -- checkpoints and copies

    def state_dict(self) -> dict[str, Any]:
        """Return the state dict with the accumulators, which it has before the first step too."""
        self._check_scales()

        def add(_: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
            # A copy: later changes of the options must not change what was saved.
            saved["param_groups"][0][_OPTIONS] = dict(self.flip.options)
            ours = (param for group in self.param_groups for param in group["params"])
            theirs = (at for group in saved["param_groups"] for at in group["params"])
            places = {id(param): at for param, at in zip(ours, theirs, strict=True)}
            for name, layer in self.flip.layers.items():
                at = places[id(layer.scale)]
                saved["state"][at] = {**saved["state"].get(at, {}), **self._entries(name)}

        # First, so that the user's own hooks see them.
        hook = self.register_state_dict_post_hook(add, prepend=True)
        try:
            saved: dict[str, Any] = super().state_dict()
        finally:
            hook.remove()
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, accumulators included; T itself is in the model's.

        Raises:
            ValueError: as :meth:`steepest.Optimizer.load_state_dict`; and a state dict without this model's
                accumulators. The optimizer is as it was.
            RuntimeError: a layer has gone to another trainer, or the model has other parameters. The
                optimizer is as it was.
        """
        self._check_scales()
        found: dict[str, Any] = {}

        def look(_: torch.optim.Optimizer, loaded: dict[str, Any]) -> None:
            found["options"], found["step"] = self._check_votes(loaded)

        hook = self.register_load_state_dict_pre_hook(look)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        states = {name: self.state[layer.scale] for name, layer in self.flip.layers.items()}
        accumulators = {name: state[_VOTES] for name, state in states.items()}
        self.flip.restore(accumulators, found["step"], found["options"])
        # Both were saved together.
        self.__dict__.pop("_nonfinite", None)
        self._hand_on()
        self._share()

    def _check_votes(self, loaded: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """Check the accumulators of a state dict and return its (options, step)."""
        self.flip.check_owner()
        saved_groups = loaded.get("param_groups")
        if not saved_groups or "state" not in loaded:
            raise ValueError("the state dict has no 'param_groups' or no 'state'; nothing was loaded")
        if _OPTIONS not in saved_groups[0]:
            raise ValueError("the state dict is of an optimizer without ternary weights; nothing was loaded")
        options = self.flip.check_options(saved_groups[0][_OPTIONS])
        ours = (p for group in self.param_groups for p in group["params"])
        theirs = (at for group in saved_groups for at in group["params"])
        places = {id(param): at for param, at in zip(ours, theirs, strict=False)}
        step = 0
        for name, layer in self.flip.layers.items():
            state = loaded["state"].get(places.get(id(layer.scale)), {})
            if _VOTES not in state or _STEP not in state:
                raise ValueError(f"the state dict has no votes of ternary layer {name!r}; nothing was loaded")
            self.flip.check_accumulator(name, state[_VOTES], options)
            step = self.flip.check_step(state[_STEP])
        return options, step

    def __getstate__(self) -> dict[str, Any]:
        """Copy the trainer too, with copies of the layers."""
        state: dict[str, Any] = super().__getstate__()
        return state | {"flip": self.flip, "_nonfinite": self._nonfinite}


def make(
    model: nn.Module,
    groups: Sequence[dict[str, Any]],
    options: Mapping[str, Any],
    *,
    rule: str,
    **hyper: Any,
) -> TernaryOptimizer:
    """Make the optimizer of a model with ternary layers, for :func:`steepest.build`."""
    given: dict[str, Any] = {name: hyper[name] for name in ("nonfinite", "seed", "compile") if name in hyper}
    flip = TernaryFlip(model, **(given | dict(options)))
    return TernaryOptimizer(list(groups), flip=flip, rule=rule, **hyper)


register_maker(TernaryLinear, make)
