"""Who is compared with whom: optimizers with one equation, on the tensors that it is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

import steepest

from ..errors import LabError
from .entry import GRAPH, Entry, Scope, ours
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


def _ways(rule: str, label: str | None = None, **hyper: Any) -> tuple[Entry, ...]:
    return tuple(ours(rule, how, label, **hyper) for how in ("compiled", "eager", "graph"))


def _psgd(bfloat16: bool, **given: Any) -> tuple[Entry, ...]:
    entries = _ways("procrustes", **given) + _ways("quad", **given)
    if bfloat16:
        given |= {"dtype": torch.bfloat16}
        entries += _ways("procrustes", "procrustes bfloat16", **given)
        entries += _ways("quad", "quad bfloat16", **given)
    return entries


def _named(bfloat16: bool) -> list[Family]:
    return [
        Family("signgsd", "element", "all", _ways("signgsd")),
        Family("signum", "element", "all", _ways("signum")),
        Family("lion", "element", "all", _ways("lion")),
        Family("sgd", "element", "all", _ways("sgd", "sgd momentum", momentum=0.9)),
        Family("sgd_sai", "element", "all", _ways("sgd_sai")),
        Family("adamw", "element", "all", _ways("adamw")),
        Family(
            "simba",
            "element",
            "all",
            (
                *_ways("simba", "simba int16"),
                *_ways("simba", "simba int8", counter_dtype=torch.int8, window_size=100),
                *_ways("simba_leaky", "simba leaky"),
            ),
        ),
        Family(
            "muon",
            "matrix",
            "hidden",
            # The peers iterate in bfloat16 whatever the device, so ours that does too is compared with them.
            (
                *_ways("muon", "muon bfloat16", ns_dtype=torch.bfloat16, **_MUON),
                *_ways("muon", **_MUON),
                *_ways("muon", "muon float32", ns_dtype=torch.float32, **_MUON),
            ),
        ),
        Family(
            "muon kin",
            "matrix",
            "hidden",
            (
                *(entry for rule in ("normuon", "polargrad", "scion") for entry in _ways(rule)),
                *_ways("hyperball", weight_decay=0.0),
            ),
        ),
        Family("psgd dense/diagonal", "matrix", "hidden", _psgd(bfloat16)),
        Family("psgd dense/dense", "matrix", "attention", _psgd(bfloat16, max_skew_dense=float("inf"))),
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
    device: torch.device | str = "cpu",
) -> list[Family]:
    """The families in which these optimizers are; all of them unless some are named.

    Args:
        optimizers: Names of `steepest.list_optimizers()`.
        eager: Measure ours eagerly.
        compiled: Measure ours compiled, and on CUDA captured in a graph and replayed too.
        peers: Measure the other packages' beside them.
        full: Also the `REPEATED` ones of these, and PSGD in bfloat16 on a CPU that has to emulate it.
        device: Where they will be measured.

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
    device = torch.device(device)
    named = _named(full or device.type != "cpu" or _multiplies_bfloat16())
    new = sorted(wanted - {entry.rule for family in named for entry in family.entries})
    named += [Family(rule, *_place(rule), _ways(rule)) for rule in new]
    hows = _hows(eager, compiled)
    if device.type == "cuda" and compiled:
        hows.add(GRAPH)
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


def _multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for it."""
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def _place(rule: str) -> tuple[Scope, Where]:
    """Where a rule that no family names belongs."""
    made = steepest.create(rule, [torch.nn.Parameter(torch.ones(2, 2))])
    return ("matrix", "hidden") if type(made).rule.scope == "matrix" else ("element", "all")
