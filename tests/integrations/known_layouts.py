"""Golden cases for the known layouts: the models' own forward passes say how a fused weight is laid out.

Multiply one of the separate matrices by 0 or by 2, and the output must change as that matrix's place in the
formula demands. Any other cut mixes two of the matrices, and the output changes in another way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest.routing.known_layouts import _KNOWN
from steepest.views import View, cut, repetitions


@dataclass(frozen=True)
class Case:
    """A model, and what its output says about one fused weight.

    Attributes:
        make: builds the model.
        inputs: the arguments of its forward pass.
        view: the view that build() must find.
        effects: a letter for each of the separate matrices. ``l``: the output is linear in it. ``0``: without
            it the output is 0. ``s``: it is a factor of the scores, so without it the output is another one,
            but not 0, and the same whichever of these factors is missing. ``-``: it has no effect.
        seen: the end of the name of the layer whose input is looked at; by default, it is the output of the
            module that owns the weight.
    """

    make: Callable[[], nn.Module]
    inputs: tuple[Any, ...]
    view: View
    effects: str
    seen: str = ""


class Alone(nn.Module):
    """One module of a library, and a last layer of its own, so that none of the module's counts as one."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.last = body, nn.Linear(3, 3)

    def forward(self, *inputs: Any) -> Any:
        return self.body(*inputs)


def without_case(package: str, cases: Iterable[str]) -> list[str]:
    """Return the alternatives in the package's part of the table of known layouts that no case takes."""
    rows = [(classes, weights) for each, classes, weights, *_ in _KNOWN if each == package]
    taken: list[set[str]] = [set() for _ in rows]
    for kind, weight in map(_parts, cases):
        matching = [
            i for i, (kinds, names) in enumerate(rows) if kinds.fullmatch(kind) and names.fullmatch(weight)
        ]
        for row in matching[:1]:  # find_fused() takes the first, too
            taken[row] |= {each for each in _alternatives(rows[row][0]) if re.fullmatch(each, kind)}
    return [
        f"{each}.{weights.pattern}"
        for (kinds, weights), found in zip(rows, taken, strict=True)
        for each in _alternatives(kinds)
        if each not in found
    ]


def _alternatives(classes: re.Pattern[str]) -> list[str]:
    return classes.pattern.split("|")


def _parts(name: str) -> tuple[str, str]:
    """Take a case's name apart, which is 'Class.weight' or 'Class.weight, variant'."""
    kind, _, weight = name.partition(",")[0].partition(".")
    return kind, weight


def check(name: str, case: Case) -> None:
    """Raise unless build() finds the case's view, and its matrices, but no others, have their effects."""
    torch.manual_seed(0)
    model = case.make().double().eval()
    _draw(model)
    kind, weight = _parts(name)
    path, owner = next((path, each) for path, each in model.named_modules() if type(each).__name__ == kind)
    full = f"{path}.{weight}" + (".weight" if isinstance(getattr(owner, weight), nn.Module) else "")
    explanation = steepest.build(model, "muon").explain()
    assert next(row.view for row in explanation.rows if row.name == full) == case.view
    assert not [text for text in explanation.warnings if "in one" in text and weight in text]
    _check_effects(model, owner, model.get_parameter(full), case, case.view)
    with pytest.raises(AssertionError):
        _check_effects(model, owner, model.get_parameter(full), case, _another(case.view))


def _another(view: View) -> View:
    """Contiguous blocks for interleaved ones, and halves that are interleaved for contiguous blocks."""
    kind, sizes, *stored = view
    times = repetitions(view)
    if times > 1:
        return (kind, tuple(size * times for size in sizes), *stored[1:])
    return (kind, tuple(size // 2 for size in sizes), 2, *stored)


def _check_effects(model: nn.Module, owner: nn.Module, param: nn.Parameter, case: Case, view: View) -> None:
    stored = param.detach().clone()

    def output(index: int, factor: float) -> Tensor:
        cut(param.data, view, param.dim() > 2)[index].mul_(factor)
        result = _output(model, owner, case)
        param.data.copy_(stored)
        return result

    plain = output(0, 1.0)
    assert plain.abs().max() > 1e-6
    scores: list[Tensor] = []
    for index, effect in enumerate(case.effects):
        without = output(index, 0.0)
        if effect == "s":
            scores.append(without)
            assert without.abs().max() > 1e-6
            assert not torch.allclose(without, plain, rtol=1e-4)
            torch.testing.assert_close(without, scores[0])
        elif effect == "-":
            assert torch.equal(without, plain)
        else:
            assert without.abs().max() == 0
        if effect == "l":
            torch.testing.assert_close(output(index, 2.0), 2 * plain)


@torch.no_grad()
def _draw(model: nn.Module) -> None:
    """Draw large weights, so that every effect shows, and no biases, so that 0 times a matrix gives 0."""
    for name, param in model.named_parameters():
        if "bias" in name:
            param.zero_()
        elif param.dim() > 1:
            param.normal_(std=0.5)


@torch.no_grad()
def _output(model: nn.Module, owner: nn.Module, case: Case) -> Tensor:
    seen: list[Any] = []

    def hook(module: nn.Module, given: Any, result: Any) -> None:
        seen.append(given if case.seen else result)

    watched = owner
    if case.seen:
        watched = next(each for path, each in model.named_modules() if path.endswith(case.seen))
    with watched.register_forward_hook(hook):
        model(*case.inputs)
    return (seen[-1][0] if isinstance(seen[-1], (tuple, list)) else seen[-1]).clone()
