"""What must hold: a refusal is clear and changes nothing, twins are equal, element rules follow float64."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

from reference import baselines, sign
from reference.descent import Reference
from strategies import same

from .world import World

__all__ = ["CLEAR", "Beside", "assert_clear", "assert_twins", "refused"]

CLEAR = (ValueError, TypeError, RuntimeError, FloatingPointError)
# A clear message names the parameter, the group, the option or the entry of the state dict.
_NAMES = re.compile(
    r"parameter|param.groups|params argument|group \d|state dict|\blr\b|unknown rule|views:|must be|"
    r"unexpected keyword|optimizer|non-leaf Tensor|is not iterable|leave them out"
)


def assert_clear(error: BaseException) -> str:
    """The message of an error that says what is wrong."""
    message = f"{type(error).__name__}: {error}"
    assert _NAMES.search(message), f"not clear: {message}"
    return message


def refused(world: World, act: Callable[[], object], words: str = "") -> str | None:
    """The message with which an act was refused, or None if it was done.

    Anything but a clear refusal that leaves everything as it was is a failure.
    """
    before = world.everything()
    try:
        act()
    except CLEAR as error:
        message = assert_clear(error)
        assert re.search(words, message), f"says nothing of {words}: {message}"
        assert world.is_as(before), f"refused and changed something: {message}"
        return message
    return None


def assert_twins(world: World, twin: World) -> None:
    """Equal parameters, state and counts, bit for bit; NaN equals NaN."""
    for at, (param, other) in enumerate(zip(world.params, twin.params, strict=True)):
        assert same(param.detach(), other.detach()), f"parameter {at}"
        state, expected = world.optimizer.state.get(param, {}), twin.optimizer.state.get(other, {})
        assert state.keys() == expected.keys(), f"state of parameter {at}"
        for name in expected:
            assert same(state[name], expected[name]), f"{name} of parameter {at}"
    assert world.optimizer.skipped_steps == twin.optimizer.skipped_steps


REFERENCES: dict[str, Callable[..., Reference]] = {
    "sgd": baselines.SGD,
    "adamw": baselines.AdamW,
    "ademamix": baselines.AdEMAMix,
    "signgsd": sign.SignGSD,
    "signum": sign.Signum,
    "lion": sign.Lion,
}

WIDE = (torch.float32, torch.float64)
_NOT_THE_REFERENCE_S = ("rounding", "state_dtype")


class Beside:
    """Float64 references of the parameters whose rule has one, stepped beside the world.

    A parameter is no longer followed once its numbers stopped being finite, or after options that the
    reference does not know.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.followed: dict[int, Reference] = {}
        self.largest: dict[int, float] = {}
        first = 0
        for case in world.plan.groups:
            for at in range(first, first + len(case.shapes)):
                param = world.params[at]
                base_is_zero = (
                    case.options["lr"] == 0 and case.options["weight_decay_method"] == "independent"
                )
                if case.name in REFERENCES and not base_is_zero and param.dtype in WIDE:
                    options = {k: v for k, v in case.options.items() if k not in _NOT_THE_REFERENCE_S}
                    begin = param.detach().double().flatten().tolist()
                    self.followed[at] = REFERENCES[case.name](begin, **options)
                    self.largest[at] = max(map(abs, begin), default=0.0)
            first += len(case.shapes)

    def option(self, group: int, name: str, value: object) -> None:
        """An option of a group was changed."""
        first = sum(len(case.shapes) for case in self.world.plan.groups[:group])
        for at in range(first, first + len(self.world.plan.groups[group].shapes)):
            if at in self.followed and hasattr(self.followed[at], name):
                setattr(self.followed[at], name, value)

    def rounded(self, at: int) -> None:
        """A parameter was given another dtype, or other numbers."""
        if at in self.followed:
            self.followed[at].p = self.world.params[at].detach().double().flatten().tolist()

    def forget(self) -> None:
        """Something was done that no reference knows."""
        self.followed.clear()

    def step(self) -> None:
        """The step that the world has taken."""
        for at, reference in list(self.followed.items()):
            gradient = self.world.params[at].grad
            if gradient is None:
                continue
            dense = gradient.to_dense() if gradient.layout is not torch.strided else gradient
            huge = dense.numel() > 0 and dense.abs().max() > 1e15
            # The squares of gradients of 1e30 overflow float32, and not the reference's float64.
            squares = isinstance(reference, (baselines.AdamW, baselines.AdEMAMix))
            if not dense.isfinite().all() or (huge and squares):
                del self.followed[at]
                continue
            reference.step(dense.resolve_neg().double().flatten().tolist())

    def check(self) -> None:
        """The parameters are within a few roundings of the references."""
        for at, reference in self.followed.items():
            param = self.world.params[at].detach()
            expected = torch.tensor(reference.p, dtype=torch.float64).reshape(param.shape)
            self.largest[at] = max(self.largest[at], *map(abs, reference.p), 0.0)
            off = (param.double() - expected).abs().max().item() if param.numel() else 0.0
            assert off <= 1e-5 * self.largest[at], f"parameter {at} is {off} from its reference"
