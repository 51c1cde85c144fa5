"""TernaryFlip: an optimizer of ternary and binary weights; and what :func:`steepest.build` makes for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import nn

from steepest.constructor import signature_defaults
from steepest.hyperparameters import near_miss
from steepest.optimizer import Optimizer
from steepest.rule import register_rule
from steepest.rules.ternary_flip import TernaryFlipRule
from steepest.ternary.layer import TernaryLinear
from steepest.ternary.ranks import Group
from steepest.ternary.stats import FlipStats
from steepest.ternary.targets import PackedWeights
from steepest.ternary.vote_buffer import Outward

__all__ = ["TernaryFlip", "flip_stats"]


class TernaryFlip(Optimizer):
    r"""Train the ternary and binary weights of a model by votes, beside an optimizer for its parameters.

    In backward, every pass through a :class:`TernaryLinear` or :class:`BinaryLinear` votes on each of its
    weights T, by the gradient dT. At :meth:`step`, the sum v of the votes is added to a small integer
    accumulator a, and where that reaches the threshold the weight moves:

    .. math::
        v &= -\mathrm{sign}(dT) \quad\text{or}\quad
            v = -\mathrm{round}_s\bigl(\mathrm{clip}(dT/\mathrm{rms}(dT), -7, 7)\bigr) \\
        a &\leftarrow \mathrm{clamp}(a + v, -M, M) \\
        |a| \ge \tau_t:\quad T &\leftarrow \mathrm{clamp}(T + \mathrm{sign}(a), -1, 1)
            \quad\text{(binary: } T \leftarrow \mathrm{sign}(a)\text{)}, \quad a \leftarrow 0

    M is 127 or 32767. rms(dT) is the layer's, so neither kind of vote depends on the scale of the loss.
    round_s rounds at random with the exact expectation, by noise keyed by (seed, layer, step, pass, weight):
    it resumes exactly, and the global generator is never used. Elements of dT that are not finite do not
    vote; by magnitude, their whole layer does not vote in that pass.

    Call ``step`` and ``zero_grad`` beside the optimizer's; or let :func:`steepest.build` make one optimizer
    that does both. The options are those of the param group of the layers' ``votes``.

    State: a, 1 byte a weight (int8) or 2 (int16): with the packed weights 1.25 or 2.25 bytes (ternary),
    1.125 or 2.125 (binary). Between backward and step the votes take 1 byte more, where a gradient would
    take 4; more than 127 passes by sign in a step, or 18 by magnitude, over all ranks, take 2.

    Args:
        model: has at least one :class:`TernaryLinear` or :class:`BinaryLinear`. A layer belongs to the last
            trainer made for it. One whose ``votes`` require no gradient stays as it is, accumulator included.
        threshold: τ > 0, at most M. Votes by magnitude are larger, so τ should be too.
        votes: ``"sign"`` or ``"magnitude"``.
        accumulator: ``torch.int8`` or ``torch.int16``.
        schedule: τ_t after t steps: ``"constant"``, τ; ``"annealed"``, τ/(1 − t/total_steps)^power,
            under which flips cease once τ_t is above M, with int8 and τ = 16 in the last 13 % of the
            steps; or a function of t, which checkpoints do not hold.
        total_steps: T of the annealed schedule.
        power: of the annealed schedule. 1 doubles τ by the middle of the training, which is early in a
            short one; a smaller one leaves more flips to the later steps.
        outward: what becomes of votes that would move a weight beyond its bound (for binary weights: votes
            for the sign that they have). ``"drop"``: they do not count. ``"cancel"``: they cancel inward
            votes, as far as there are any, so that a weight leaves its bound by majority and not by noise.
        zero_pull: λ in [0, 1]: in every step each weight gets one vote toward 0 with this probability.
            For models without binary weights only.
        max_flip_fraction: at most this fraction of a layer flips in a step: the largest \|a\| first, ties
            at random. Above 0 it is one weight at least; below 1 every step costs a host sync.
        nonfinite: what an infinite or NaN dT does: ``"ignore"``: as above. ``"skip"``: weights, a and
            step stay as they were, the votes are dropped, and :attr:`skipped_steps` counts. ``"raise"``:
            ``FloatingPointError`` with the layer's name; nothing changes. The last two cost a host sync.
        distributed: which accumulators a rank keeps: all of them (None), or those of its share of each
            layer's rows (``"rows"``). With ``"rows"`` a rank flips its own rows, and the ranks exchange votes
            and packed rows: 1.25 bytes a weight are sent (binary: 1.125) where None sends 2. T is whole on
            all ranks, and the same bit for bit, either way. It cannot change after the first step.
        compile: run flips, and the rounding of votes by magnitude, compiled: one graph for all layers. None:
            from 2**22 weights on, where there is a compiler; True warns if there is none.
        seed: of the noise, which is also keyed by the layers' names: two trainers of one seed draw the
            same for layers of one name.
        process_group: the data-parallel ranks, whose votes are summed, as int8 where the sum fits: N ranks
            do exactly what one process does with N times the passes. None: those of the mesh on which
            ``fully_shard`` laid the layers, else all processes, where ``torch.distributed`` is initialized;
            False: this one alone.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: no ternary or binary layers; one on the meta device; a value out of range;
            ``"annealed"`` without ``total_steps``; ``zero_pull`` with a binary layer; layers on several
            meshes, or on a mesh of several dimensions that is a part of all processes, without
            ``process_group``.
        RuntimeError: from ``step``, on all ranks: they have different options or weights T.

    Tuning:
        - ``threshold``: the learning rate of the weights: 24 by sign and 32 by magnitude in
          docs/ternary.md; a higher one moves fewer weights.
        - ``weight_decay``: none; ``zero_pull`` moves weights toward 0 instead.
        - ``schedule``: ``"annealed"`` with the length of the run, ``power`` 0.3 for short ones, and
          ``max_flip_fraction`` 1e-3.
        - batch: every backward pass votes once, whatever its batch: several small ones before a step say
          more than a large one.

    When not to use it:
        Where the time of a step counts more than its bytes: a layer unpacks its weights in every pass.
        Embeddings, output layers and norms stay float (:func:`ternarize`).

    Source: our own. Related: Helwegen et al. 2019 (Bop) flips binary weights where an average of the gradient
    passes a threshold.

    >>> model = nn.Sequential(TernaryLinear(8, 16), nn.ReLU(), TernaryLinear(16, 2))
    >>> flip = TernaryFlip(model, threshold=2)
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> for _ in range(3):
    ...     model(torch.randn(4, 8)).square().mean().backward()
    ...     for each in (optimizer, flip):
    ...         each.step()
    ...         each.zero_grad()
    >>> stats = flip.stats()
    >>> stats.step, stats.weights, stats.flips > 0, flip.state_bytes()
    (3, 160, True, 176)
    """

    def __init__(
        self,
        model: nn.Module,
        threshold: float = 24.0,
        votes: Literal["sign", "magnitude"] = "sign",
        *,
        accumulator: torch.dtype = torch.int8,
        schedule: Literal["constant", "annealed"] | Callable[[int], float] = "constant",
        total_steps: int | None = None,
        power: float = 1.0,
        outward: Outward = "cancel",
        zero_pull: float = 0.0,
        max_flip_fraction: float = 1.0,
        nonfinite: Literal["ignore", "skip", "raise"] = "ignore",
        distributed: Literal["rows"] | None = None,
        compile: bool | None = None,
        seed: int = 0,
        process_group: Group = None,
    ) -> None:
        group, weights = make(
            model,
            {
                "threshold": threshold,
                "votes": votes,
                "accumulator": accumulator,
                "schedule": schedule,
                "total_steps": total_steps,
                "power": power,
                "outward": outward,
                "zero_pull": zero_pull,
                "max_flip_fraction": max_flip_fraction,
                "nonfinite": nonfinite,
                "distributed": distributed,
                "compile": compile,
                "seed": seed,
                "process_group": process_group,
            },
        )
        for name, layer in weights.layers.items():
            if layer.packed.is_meta:
                raise ValueError(f"layer {name!r} is on the meta device: materialize the model first")
        super().__init__([group], rule=TernaryFlipRule.name)
        self.watch(weights)

    def stats(self) -> FlipStats:
        """Return flips of the last step and the fraction of zeros, in all and by layer; a host sync."""
        return flip_stats(self)


def flip_stats(optimizer: Optimizer) -> FlipStats:
    """Return what moved in the last step, and the fraction of zeros, in all and by layer; a host sync.

    The optimizer is a :class:`TernaryFlip`, or of :func:`steepest.build` for a model with ternary layers.

    Raises:
        ValueError: it trains no ternary weights.

    >>> import steepest
    >>> model = nn.Sequential(TernaryLinear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> optimizer = steepest.build(model, "lion", ternary={"threshold": 2})
    >>> for _ in range(2):
    ...     model(torch.ones(4, 8)).square().mean().backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> flip_stats(optimizer).flips > 0, optimizer.state[model[0].votes]["accumulator"].dtype
    (True, torch.int8)
    """
    if not isinstance(optimizer.targets, PackedWeights):
        raise ValueError(f"this {type(optimizer).__name__} trains no ternary weights")
    return optimizer.targets.stats()


_OPTIONS = TernaryFlipRule.hyper.keys() - {"lr", "weight_decay"} | {"nonfinite", "compile", "seed"}


def make(model: nn.Module, options: Mapping[str, Any]) -> tuple[dict[str, Any], PackedWeights]:
    """Make the param group of a model's packed weights, for :func:`steepest.build`."""
    group = dict(options)
    process_group = group.pop("process_group", None)
    for name in group:
        if name not in _OPTIONS:
            raise TypeError(f"TernaryFlip has no option {name!r}{near_miss(name, _OPTIONS)}")
    custom = group["schedule"] if callable(group.get("schedule")) else None
    if custom is not None:
        group["schedule"] = "custom"
    weights = PackedWeights(model, custom, process_group)
    params = [(f"{name}.votes" if name else "votes", layer.votes) for name, layer in weights.layers.items()]
    return {**group, "rule": TernaryFlipRule.name, "params": params}, weights


_RULE = TernaryFlipRule()
_RULE.own_defaults = signature_defaults(TernaryFlip, _RULE, {"lr": 1.0, "weight_decay": 0.0})
register_rule(_RULE)
TernaryLinear._steepest_targets = staticmethod(make)
