"""What :func:`steepest.certify` found: which values differ, from which step on, by how much, and why."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steepest.trust.resume import MISSING

__all__ = ["Certificate", "Difference", "compare"]

_SHOWN = 6
_WIDTH = 100


@dataclass(frozen=True)
class Difference:
    """A value of the resumed run that is not that of the run that never stopped.

    Attributes:
        step: the number of steps taken when it first differs; at that of the checkpoint, it was loaded so.
        name: such as ``"parameter layer.weight"``, ``"state exp_avg of layer.weight"`` or
            ``"option lr of group 0"``.
        mismatch: how they differ other than in their elements: a dtype, a shape, a value; missing. Or None.
        largest: the largest absolute difference of the elements; NaN beside a number counts as infinite. None
            if there are none to compare.
        differing: the number of elements that differ, if only in the sign of a zero.
        elements: the number of elements; of a complex tensor, of its real and imaginary parts.
    """

    step: int
    name: str
    mismatch: str | None = None
    largest: float | None = None
    differing: int | None = None
    elements: int | None = None

    def __str__(self) -> str:
        parts = [] if self.mismatch is None else [self.mismatch]
        if self.largest is not None:
            noun = "element" if self.elements == 1 else "elements"
            verb = "differs" if self.differing == 1 and self.elements == 1 else "differ"
            parts.append(f"{self.differing} of {self.elements} {noun} {verb}, by at most {self.largest:.3g}")
        return f"{self.name}: {'; '.join(parts) or 'differs'}"


def compare(step: int, name: str, expected: Any, found: Any) -> Difference:
    """Describe how a value of the resumed run differs from the one expected."""
    if isinstance(found, str) and found == MISSING:
        return Difference(step, name, "missing")
    if isinstance(expected, str) and expected == MISSING:
        return Difference(step, name, "only the resumed run has it")
    if not (isinstance(expected, Tensor) and isinstance(found, Tensor)):
        shown = [
            f"a tensor of {each.dtype}" if isinstance(each, Tensor) else repr(each)
            for each in (found, expected)
        ]
        return Difference(step, name, f"{shown[0]} instead of {shown[1]}")
    if found.shape != expected.shape:
        shapes = f"shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
        return Difference(step, name, shapes)
    mismatch = None if found.dtype == expected.dtype else f"{found.dtype} instead of {expected.dtype}"
    if found.is_complex() != expected.is_complex():
        return Difference(step, name, mismatch)
    ours, theirs = (torch.view_as_real(t) if t.is_complex() else t for t in (found, expected))
    ours, theirs = ours.to(torch.float64), theirs.to(torch.float64)
    same = ((ours == theirs) & (ours.signbit() == theirs.signbit())) | (ours.isnan() & theirs.isnan())
    gap = torch.where(same, 0.0, (ours - theirs).abs().nan_to_num(nan=torch.inf))
    largest = float(gap.max()) if gap.numel() else 0.0
    return Difference(step, name, mismatch, largest, int((~same).sum()), gap.numel())


@dataclass(frozen=True)
class Certificate:
    """The verdict of :func:`steepest.certify`; ``str()`` says it in words.

    Attributes:
        identical: whether the resumed run has every bit of the one that never stopped.
        deterministic: whether two runs that never stopped are the same. If not, the differences are theirs,
            and nothing can be said about resuming.
        differences: by the step at which they begin; parameters before buffers, state and options.
        steps, stop_after: the steps of the training, and those before the checkpoint.
        via: how it was saved: ``"torch.save"``, ``"dcp"``, ``"dcp_flat"``, or ``"own functions"``.
        process: ``"new"``, or ``"same"`` if new objects of this process went on from the checkpoint.
        compared: the number of tensors and options compared at each step.
    """

    identical: bool
    deterministic: bool
    differences: tuple[Difference, ...]
    steps: int
    stop_after: int
    via: str
    process: str
    compared: int

    @property
    def first(self) -> Difference | None:
        """The first of the differences, or None."""
        return self.differences[0] if self.differences else None

    @property
    def causes(self) -> tuple[str, ...]:
        """The usual causes of what differs."""
        return tuple(_causes(self))

    def __str__(self) -> str:
        where = "new process" if self.process == "new" else "new objects in the same process"
        left = self.steps - self.stop_after
        way = f"{self.stop_after} steps, save ({self.via}), {where}, load, {left} steps"
        if self.identical:
            return (
                f"identical: {way} = {self.steps} steps, in every bit of {self.compared} tensors and options"
            )
        if self.deterministic:
            lines = [f"NOT IDENTICAL: {way} differ from {self.steps} steps without stopping"]
        else:
            lines = ["NOT DETERMINISTIC: two runs that never stopped differ, so no resumed one can be judged"]
        step = None
        for each in self.differences[:_SHOWN]:
            if each.step != step:
                step = each.step
                loaded = self.deterministic and step == self.stop_after
                lines.append(f"from step {step} on{', as it is loaded' if loaded else ''}:")
            lines.append(f"  {each}")
        if len(self.differences) > _SHOWN:
            lines.append(f"  and {len(self.differences) - _SHOWN} more")
        lines.append("usual causes:")
        for cause in self.causes:
            lines += textwrap.wrap(cause, _WIDTH, initial_indent="  - ", subsequent_indent="    ")
        return "\n".join(lines)


def _causes(certificate: Certificate) -> list[str]:
    differences, stop = certificate.differences, certificate.stop_after
    if not differences:
        return []
    if not certificate.deterministic:
        shared = (
            "make_model returns a model that the run before has trained: it must make one anew, with values "
            "from torch's and Python's generators alone"
        )
        return [
            *([shared] if differences[0].step == 0 else []),
            "batches or a loss that draw from a generator other than torch's and Python's (NumPy's, the "
            "system's), or that change with each call",
            "kernels that add in any order: torch.use_deterministic_algorithms(True) names them",
        ]
    if stop == 0 and certificate.via.startswith("dcp"):
        return [
            "torch.distributed.checkpoint steps with zero gradients and lr = 0 so that there is state, and "
            "this optimizer takes that for a step of its own: save after the first step"
        ]
    loaded = [each for each in differences if each.step == stop]
    if loaded:
        return _causes_of_loaded(loaded)
    if differences[0].step == stop + 1:
        return [
            "the optimizer, or the model, keeps something on itself that its state dict lacks (a step count, "
            "a buffer), or measures something in its first step, again after loading",
            "batch i depends on what was drawn before it, or on a generator that is not saved (NumPy's)",
            *_dropout(certificate),
            "what make_model draws at random and the model's state dict lacks",
        ]
    later = differences[0].step - stop
    return [
        f"something that happens every few steps and is counted from loading, as it differs {later} steps "
        "later: a counter on the optimizer or on the model, a schedule",
        *_dropout(certificate),
    ]


def _dropout(certificate: Certificate) -> list[str]:
    if certificate.via != "own functions":
        return []
    return ["dropout: the state of torch's generator is part of a checkpoint (torch.get_rng_state)"]


def _causes_of_loaded(loaded: Sequence[Difference]) -> list[str]:
    state = [each for each in loaded if each.name.startswith("state ")]
    causes = []
    if any(each.mismatch is not None and "torch." in each.mismatch for each in state):
        causes.append(
            "torch.optim.Optimizer.load_state_dict casts floating-point state to the dtype of its parameter: "
            "an optimizer with state of another dtype must override it"
        )
    if any(each.mismatch == "missing" for each in state):
        causes.append("the optimizer drops state when it is saved or loaded, or makes it anew")
    if any(each.mismatch is None or "shape" in each.mismatch for each in state):
        causes.append("the optimizer's load_state_dict changes state: it converts, resets or shares it")
    if any(each.name.startswith("parameter ") for each in loaded):
        causes.append("parameters are not saved, or not loaded")
    if any(each.name.startswith("buffer ") for each in loaded):
        causes.append("buffers with persistent=False are not in the model's state dict")
    if any(each.name.startswith("option ") or "scheduler" in each.name for each in loaded):
        causes.append(
            "options of the param groups, or the scheduler, are not saved, or set again after loading"
        )
    return causes
