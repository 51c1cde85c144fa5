"""Benchmark groups: optimizers with the same equation, compared on the tensors that they suit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

import steepest
from steepest.lab.errors import LabError
from steepest.model_shapes import ModelShapes, ParamShape

from .case import GRAPH, Case, Scope, ours
from .peers import PEERS, REDUNDANT

Subset = Literal["all", "hidden", "attention"]

# The coefficients of torch.optim.Muon: the same triple five times.
_MUON = {"coefficients": "jordan"}


@dataclass(frozen=True)
class Group:
    """Cases that are timed in the same rounds on the same tensors; the first is the reference.

    Args:
        name: The group's name.
        scope: "element" if bytes limit the step, "matrix" if flops do.
        subset: The tensors of a model that the cases update.
        cases: The cases, steepest's first.
    """

    name: str
    scope: Scope
    subset: Subset
    cases: tuple[Case, ...]

    def tensors(self, shapes: ModelShapes, blocks: int | None) -> tuple[ParamShape, ...]:
        """Return the model's tensors that the cases update; matrices come from `blocks` blocks only."""
        if self.subset == "all":
            return shapes.tensors
        hidden = shapes.hidden(blocks)
        attention = tuple(t for t in hidden if "attn" in t.name)
        return attention if self.subset == "attention" and attention else hidden


def _all_modes(rule: str, label: str | None = None, **hyper: Any) -> tuple[Case, ...]:
    return tuple(ours(rule, how, label, **hyper) for how in ("compiled", "eager", "graph"))


def _psgd(bfloat16: bool, **options: Any) -> tuple[Case, ...]:
    cases = _all_modes("procrustes", **options) + _all_modes("quad", **options)
    if bfloat16:
        options |= {"dtype": torch.bfloat16}
        cases += _all_modes("procrustes", "procrustes bfloat16", **options)
        cases += _all_modes("quad", "quad bfloat16", **options)
    return cases


def _predefined(bfloat16: bool) -> list[Group]:
    return [
        Group("signgsd", "element", "all", _all_modes("signgsd")),
        Group("signum", "element", "all", _all_modes("signum")),
        Group("lion", "element", "all", _all_modes("lion")),
        Group("sgd", "element", "all", _all_modes("sgd", "sgd momentum", momentum=0.9)),
        Group("sgd_sai", "element", "all", _all_modes("sgd_sai")),
        Group("adamw", "element", "all", _all_modes("adamw")),
        Group(
            "simba",
            "element",
            "all",
            (
                *_all_modes("simba", "simba int16"),
                *_all_modes("simba", "simba int8", counter_dtype=torch.int8, window_size=100),
                *_all_modes("simba_leaky", "simba leaky"),
            ),
        ),
        Group(
            "muon",
            "matrix",
            "hidden",
            # The peers iterate in bfloat16 on every device, so they are compared with our bfloat16 case.
            (
                *_all_modes("muon", "muon bfloat16", ns_dtype=torch.bfloat16, **_MUON),
                *_all_modes("muon", **_MUON),
                *_all_modes("muon", "muon float32", ns_dtype=torch.float32, **_MUON),
            ),
        ),
        Group(
            "muon variants",
            "matrix",
            "hidden",
            (
                *(case for rule in ("normuon", "polargrad", "scion") for case in _all_modes(rule)),
                *_all_modes("hyperball", weight_decay=0.0),
            ),
        ),
        Group("psgd dense/diagonal", "matrix", "hidden", _psgd(bfloat16)),
        Group("psgd dense/dense", "matrix", "attention", _psgd(bfloat16, max_skew_dense=float("inf"))),
    ]


# A base class for user-defined optimizers.
_NOT_MEASURED = {"orthogonalized"}


def select_groups(
    optimizers: Sequence[str] | None = None,
    *,
    eager: bool = True,
    compiled: bool = True,
    peers: bool = True,
    full: bool = True,
    device: torch.device | str = "cpu",
) -> list[Group]:
    """Return the groups that contain the given optimizers.

    Args:
        optimizers: Names from `steepest.list_optimizers()`; by default all.
        eager: Measure steepest's optimizers in eager mode.
        compiled: Measure them compiled and, on CUDA, also captured in a graph and replayed.
        peers: Also measure other packages' optimizers.
        full: Include the `REDUNDANT` peers, and PSGD in bfloat16 on CPUs that emulate bfloat16.
        device: The device of the measurement.

    Raises:
        LabError: a name is unknown, or nothing remains to be measured.
    """
    known = steepest.list_optimizers()
    for name in optimizers or ():
        if name not in known:
            raise LabError(f"no optimizer {name!r}; steepest has {', '.join(known)}")
    wanted = set(optimizers or known) - _NOT_MEASURED
    if not wanted:
        raise LabError("orthogonalized is a base class that cannot be measured: name another optimizer")
    if not (eager or compiled):
        raise LabError("neither eager nor compiled: there is nothing to measure")
    device = torch.device(device)
    groups = _predefined(full or device.type != "cpu" or _supports_bfloat16())
    new = sorted(wanted - {case.rule for group in groups for case in group.cases})
    groups += [Group(rule, *_scope_and_subset(rule), _all_modes(rule)) for rule in new]
    hows = {how for how, selected in (("eager", eager), ("compiled", compiled)) if selected}
    if device.type == "cuda" and compiled:
        hows.add(GRAPH)
    selected = []
    for group in groups:
        own = tuple(case for case in group.cases if case.rule in wanted and case.how in hows)
        if own:
            rules = {case.rule for case in own}
            others = tuple(
                peer
                for peer in PEERS.get(group.name, ())
                if peers and peer.rule in rules and (full or (group.name, peer.label) not in REDUNDANT)
            )
            selected.append(Group(group.name, group.scope, group.subset, own + others))
    return selected


def _supports_bfloat16() -> bool:
    """Return whether this CPU has bfloat16 instructions."""
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def _scope_and_subset(rule: str) -> tuple[Scope, Subset]:
    """Return the scope and subset of a rule without a predefined group."""
    optimizer = steepest.create(rule, [torch.nn.Parameter(torch.ones(2, 2))])
    return ("matrix", "hidden") if type(optimizer).rule.scope == "matrix" else ("element", "all")
