"""Who is compared with whom: optimizers with one equation, on the tensors that it is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

import steepest

from ..errors import LabError
from .entry import Entry, Scope, ours
from .peers import PEERS, REPEATED
from .shapes import ShapeList, Tensor

Where = Literal["all", "hidden", "attention"]

# torch.optim.Muon's own: the same triple five times.
_MUON = {"coefficients": "jordan"}


@dataclass(frozen=True)
class Family:
    """Contestants that take turns on the same tensors; the first is what the others are compared with.

    Args:
        name: The family's name.
        scope: What limits a step: bytes for element rules, flops for matrix rules.
        where: Which of a model's tensors it steps.
    """

    name: str
    scope: Scope
    where: Where
    entries: tuple[Entry, ...]

    def tensors(self, shapes: ShapeList, blocks: int | None) -> tuple[Tensor, ...]:
        """The tensors of a model that are stepped, of `blocks` of its blocks where they are matrices."""
        if self.where == "all":
            return shapes.tensors
        hidden = shapes.hidden(blocks)
        attention = tuple(t for t in hidden if "attn" in t.name)
        return attention if self.where == "attention" and attention else hidden


def _both(rule: str, label: str | None = None, **hyper: Any) -> tuple[Entry, Entry]:
    return ours(rule, "compiled", label, **hyper), ours(rule, "eager", label, **hyper)


def _named() -> list[Family]:
    square: dict[str, Any] = {"max_skew_dense": float("inf")}
    return [
        Family("signgsd", "element", "all", _both("signgsd")),
        Family("signum", "element", "all", _both("signum")),
        Family("lion", "element", "all", _both("lion")),
        Family("sgd", "element", "all", _both("sgd", "sgd momentum", momentum=0.9)),
        Family("sgd_sai", "element", "all", _both("sgd_sai")),
        Family("adamw", "element", "all", _both("adamw")),
        Family(
            "simba",
            "element",
            "all",
            (
                *_both("simba", "simba int16"),
                *_both("simba", "simba int8", counter_dtype=torch.int8, window_size=100),
                *_both("simba_leaky", "simba leaky"),
            ),
        ),
        Family(
            "muon",
            "matrix",
            "hidden",
            # The peers iterate in bfloat16 whatever the device, so ours that does too is compared with them.
            (*_both("muon", "muon bfloat16", ns_dtype=torch.bfloat16, **_MUON), *_both("muon", **_MUON)),
        ),
        Family(
            "muon kin",
            "matrix",
            "hidden",
            (
                *(entry for rule in ("normuon", "polargrad", "scion") for entry in _both(rule)),
                *_both("hyperball", weight_decay=0.0),
            ),
        ),
        Family("psgd dense/diagonal", "matrix", "hidden", (*_both("procrustes"), *_both("quad"))),
        Family(
            "psgd dense/dense",
            "matrix",
            "attention",
            (*_both("procrustes", **square), *_both("quad", **square)),
        ),
    ]


# A base to subclass: by itself it does nothing.
_NOT_MEASURED = {"orthogonalized"}


def families(
    optimizers: Sequence[str] | None = None,
    *,
    eager: bool = True,
    compiled: bool = True,
    peers: bool = True,
    full: bool = True,
) -> list[Family]:
    """The families in which these optimizers are; all of them unless some are named.

    Args:
        optimizers: Names of `steepest.list_optimizers()`.
        eager: Measure ours eagerly.
        compiled: Measure ours compiled.
        peers: Measure the other packages' beside them.
        full: Also the `REPEATED` ones of these.

    Raises:
        LabError: an unknown name.
    """
    known = steepest.list_optimizers()
    for name in optimizers or ():
        if name not in known:
            raise LabError(f"no optimizer {name!r}; steepest has {', '.join(known)}")
    wanted = set(optimizers or known) - _NOT_MEASURED
    if not wanted:
        raise LabError("orthogonalized is a base to subclass and does nothing by itself: name another")
    named = _named()
    new = sorted(wanted - {entry.rule for family in named for entry in family.entries})
    named += [Family(rule, *_place(rule), _both(rule)) for rule in new]
    hows = _hows(eager, compiled)
    chosen = []
    for family in named:
        own = tuple(e for e in family.entries if e.rule in wanted and e.how in hows)
        if own:
            compared = {entry.rule for entry in own}
            others = tuple(
                e
                for e in PEERS.get(family.name, ())
                if peers and e.rule in compared and (full or (family.name, e.label) not in REPEATED)
            )
            chosen.append(Family(family.name, family.scope, family.where, own + others))
    return chosen


def _hows(eager: bool, compiled: bool) -> set[str]:
    if not (eager or compiled):
        raise LabError("neither eager nor compiled: there is nothing to measure")
    return {how for how, wanted in (("eager", eager), ("compiled", compiled)) if wanted}


def _place(rule: str) -> tuple[Scope, Where]:
    """Where a rule that no family names belongs."""
    made = steepest.create(rule, [torch.nn.Parameter(torch.ones(2, 2))])
    return ("matrix", "hidden") if type(made).rule.scope == "matrix" else ("element", "all")
