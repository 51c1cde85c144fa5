"""Hyperparameters as data: the allowed values, the error for all others, and the common options.

The constructors' signatures hold the other defaults.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypedDict, get_args

import torch

from steepest.formats.master import Master

StateDtype: TypeAlias = "torch.dtype | Literal['int8'] | None"

__all__ = [
    "COMMON_DEFAULTS",
    "COMMON_OPTIONS",
    "CommonOptions",
    "Hyperparameter",
    "StateDtype",
    "at_least",
    "betas",
    "choice",
    "count",
    "finite",
    "flag",
    "floating_dtype",
    "fraction",
    "integer",
    "is_finite",
    "is_int8",
    "learning_rate",
    "make_plain",
    "near_miss",
    "optional",
    "plain",
    "positive",
    "rate",
    "state_dtype",
]


@dataclass(frozen=True)
class Hyperparameter:
    """One hyperparameter of a rule.

    Args:
        accepts: whether a value is allowed.
        allowed: a description of the allowed values, for the error message.
        traced: whether compiled code takes it as an argument, so that a schedule never recompiles.
    """

    accepts: Callable[[Any], bool]
    allowed: str
    traced: bool = False

    def check(self, owner: str, name: str, value: Any) -> None:
        """Raise ``ValueError`` naming ``owner``, ``name`` and ``value`` unless the value is allowed."""
        with contextlib.suppress(TypeError, ValueError, RuntimeError, OverflowError):
            if self.accepts(value):
                return
        hint = ""
        with contextlib.suppress(TypeError, ValueError, RuntimeError, OverflowError):
            if self.accepts(_from_text(value)):
                hint = ", which is text: pass a number (YAML takes 1.0e-3 for one, but not 1e-3)"
        raise ValueError(f"{owner}: {name} must be {self.allowed}, got {value!r}{hint}")


def _from_text(value: Any) -> Any:
    """Return the numbers that a string, or each string of a sequence, spells."""
    if isinstance(value, str):
        return int(value) if value.lstrip("+-").isdecimal() else float(value)
    return [*map(_from_text, value)] if isinstance(value, (list, tuple)) else value


def is_finite(value: Any) -> bool:
    """Return whether a value is a real number that is finite as a float.

    >>> is_finite(0.5), is_finite(10**400), is_finite("0.5")
    (True, False, False)
    """
    with contextlib.suppress(OverflowError):
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    return False


def plain(value: Any) -> Any:
    """Convert other libraries' values and sequences to Python's, which load with ``weights_only=True``.

    >>> plain([range(2), 0.5])
    [(0, 1), 0.5]
    """
    if isinstance(value, (bool, bytes, type, torch.Tensor)):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if hasattr(value, "tolist"):  # arrays, also of no dimension, and their numbers
        value = value.tolist()
    if isinstance(value, Mapping):
        return {plain(key): plain(each) for key, each in value.items()}
    # Subclasses such as numpy's float64 are converted too.
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # the check refuses what no float can hold
            return int(value) if isinstance(value, numbers.Integral) else float(value)
    if isinstance(value, Sequence):
        return [*map(plain, value)] if isinstance(value, list) else tuple(map(plain, value))
    return value


def make_plain(options: dict[str, Any], names: Iterable[str]) -> None:
    """Make these options :func:`plain` in place; those that are stay the same objects.

    >>> options = {"lr": range(1), "name": range(2)}
    >>> make_plain(options, ["lr", "eps"])
    >>> options
    {'lr': (0,), 'name': range(0, 2)}
    """
    for name in options.keys() & set(names):
        if not _is_plain(value := options[name]):
            options[name] = plain(value)


def _is_plain(value: Any) -> bool:
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def learning_rate() -> Hyperparameter:
    """Accept a finite number ≥ 0, or a tensor of one element (not read on a device, which would sync)."""

    def accepts(value: Any) -> bool:
        if isinstance(value, torch.Tensor):
            return value.numel() == 1 and (value.device.type != "cpu" or bool(0 <= value < math.inf))
        return is_finite(value) and value >= 0

    return Hyperparameter(accepts, "a finite number ≥ 0 or a 1-element tensor", traced=True)


def _real(accepts: Callable[[Any], bool], allowed: str) -> Hyperparameter:
    return Hyperparameter(lambda value: is_finite(value) and accepts(value), allowed, traced=True)


def finite() -> Hyperparameter:
    """Accept a finite number."""
    return _real(lambda value: True, "a finite number")


def at_least(low: float) -> Hyperparameter:
    """Accept a finite number ≥ ``low``."""
    return _real(lambda value: value >= low, f"a finite number ≥ {low:g}")


def positive() -> Hyperparameter:
    """Accept a finite number > 0."""
    return _real(lambda value: value > 0, "a finite number > 0")


def fraction(*, closed: bool = False) -> Hyperparameter:
    """Accept a number in [0, 1), or in [0, 1] if ``closed``."""
    if closed:
        return _real(lambda value: 0 <= value <= 1, "a number in [0, 1]")
    return _real(lambda value: 0 <= value < 1, "a number in [0, 1)")


def rate() -> Hyperparameter:
    """Accept a number in (0, 1]."""
    return _real(lambda value: 0 < value <= 1, "a number in (0, 1]")


def betas(count: int) -> Hyperparameter:
    """Accept ``count`` numbers in [0, 1)."""
    each = fraction()

    def accepts(value: Any) -> bool:
        return isinstance(value, Sequence) and len(value) == count and all(map(each.accepts, value))

    return Hyperparameter(accepts, f"{count} numbers in [0, 1)", traced=True)


def integer(low: int, high: int | None = None) -> Hyperparameter:
    """Accept an integer ≥ ``low`` (and ≤ ``high``, by default the largest one of 64 bits)."""
    most = 2**63 - 1 if high is None else high

    def accepts(value: Any) -> bool:
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        return whole and low <= int(value) <= most

    return Hyperparameter(accepts, f"an integer ≥ {low}" + ("" if high is None else f" and ≤ {high}"))


def count() -> Hyperparameter:
    """Accept an integer ≥ 0, or a tensor of one (not read on a device, which would sync)."""
    whole = integer(low=0)

    def accepts(value: Any) -> bool:
        if isinstance(value, torch.Tensor):
            integral = not (value.is_floating_point() or value.is_complex())
            return value.numel() == 1 and integral and (value.device.type != "cpu" or int(value) >= 0)
        return whole.accepts(value)

    return Hyperparameter(accepts, "an integer ≥ 0")


def choice(*values: Any) -> Hyperparameter:
    """Accept one of ``values``."""

    def accepts(value: Any) -> bool:
        # Compare types too: 1 == True, but is not a valid flag.
        return any(type(value) is type(known) and value == known for known in values)

    return Hyperparameter(accepts, f"one of {', '.join(map(repr, values))}")


def flag() -> Hyperparameter:
    """Accept a bool."""
    return Hyperparameter(lambda value: isinstance(value, bool), "True or False")


def floating_dtype() -> Hyperparameter:
    """Accept None or a floating point dtype with a sign and a zero."""

    def accepts(value: Any) -> bool:
        # Some narrow formats hold only exponents, or two numbers per byte.
        signed = value not in (torch.float8_e8m0fnu, torch.float4_e2m1fn_x2)
        return isinstance(value, torch.dtype) and value.is_floating_point and signed

    return optional(Hyperparameter(accepts, "a signed torch floating point dtype"))


class _StateDtype(Hyperparameter):
    def check(self, owner: str, name: str, value: Any) -> None:
        """Say why there is no state of 4 bits, which other libraries have."""
        if isinstance(value, (str, torch.dtype)) and str(value).removeprefix("torch.") in ("int4", "uint4"):
            raise ValueError(
                f"{owner}: {name}={value!r} is not supported: with 4 bits, directions were 40 to 50 % off "
                'and Muon lost 0.08 bits per byte; use "int8"'
            )
        super().check(owner, name, value)


def state_dtype() -> Hyperparameter:
    """Accept None, a floating point dtype with a sign and a zero, or "int8", which torch.int8 becomes."""
    floating = floating_dtype()
    return _StateDtype(lambda value: is_int8(value) or floating.accepts(value), f'"int8", {floating.allowed}')


def is_int8(value: StateDtype) -> bool:
    """Return whether a ``state_dtype`` asks for codes; a live group may say so with a dtype."""
    return value in ("int8", torch.int8)


def optional(hyper: Hyperparameter) -> Hyperparameter:
    """Accept None as well. Compiled code is specialized to the value, since None is not a number."""
    return Hyperparameter(lambda value: value is None or hyper.accepts(value), f"None or {hyper.allowed}")


# What other libraries call options, where the letters do not show which is meant.
_OTHER_NAMES = {"learning_rate": "lr", "wd": "weight_decay"}


def near_miss(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Return ``" (did you mean 'lion'?)"`` for a known name that is close or means the same, else ``""``.

    ``cutoff`` is difflib's: how alike they must be, from 0 to 1.
    """
    name, known = str(name).lower(), list(known)
    other = _OTHER_NAMES.get(name)
    close = [other] if other in known else difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f" (did you mean {close[0]!r}?)" if close else ""


WeightDecayMethod: TypeAlias = Literal["decoupled", "independent", "untied", "l2", "palm", "sign", "cautious"]


class CommonOptions(TypedDict, total=False):
    """Keyword-only options of every optimizer here; each may also be set per param group.

    - ``weight_decay_method``: how λ = ``weight_decay`` acts at the learning rate η:

      - ``"decoupled"``: p ← p − η·λ·p
      - ``"independent"``: p ← p − λ·p·(η / η₀), with η₀ the learning rate that the group is made with, or
        that its scheduler starts from (``"initial_lr"``), or OneCycleLR's peak: λ does not depend on the
        learning rate, but follows its schedule (Loshchilov and Hutter, 2019). If all of these are 0, every
        step with η > 0 decays by λ, and the constructor warns
      - ``"untied"``: p ← p − λ·p wherever η > 0, whatever the schedule. Emerging-Optimizers'
        WeightDecayMixin calls this "independent", and so does OrthogonalizedOptimizer; its subclasses
        here (Muon and its variants) use the names of this list
      - ``"l2"``: g ← g + λ·p, in a copy, never in ``p.grad``; numbers that a rule measures over whole
        tensors (SGDSaI's scale, SimbaLeaky's rms) are those of the gradient alone
      - ``"palm"``: p ← p − λ·η²·p
      - ``"sign"``: p moves by η·λ toward 0 and stops there
      - ``"cautious"``: decoupled, only where direction·p ≥ 0
    - ``state_dtype``: dtype of momentum and the like; None means the parameter's. An average in bfloat16
      stops growing when its increments fall below half a unit in the last place: at 0.8 of the mean
      with β = 0.99, at a quarter with β = 0.999. Use float32 for slow averages such as AdamW's second.
      ``"int8"`` stores averages of matrices as codes of one byte with a float32 scale for 64 elements, and
      leaves vectors and small tensors in float32 (docs/memory.md).
    - ``master``: what a bfloat16 or float16 parameter keeps of the bits that it drops, so that small updates
      are not lost and no float32 copy exists: ``"split8"`` one byte, 24 bits in all, ``"split16"`` two, all
      32 bits of a float32. None keeps nothing. Wider parameters need none.
    - ``rounding``: how a result is rounded into a bfloat16 or float16 parameter, with ``"split8"`` into its
      24 bits: to ``"nearest"``, or ``"stochastic"``, up or down with a probability that makes the
      expectation exact. ``"split16"`` rounds nothing.
    - ``state_device``: None keeps state with its parameter. ``"cpu"`` keeps it in host memory and takes
      the step there, for parameters on an accelerator, and copies parameters and gradients back and forth
      meanwhile. Matrix rules refuse it: their products belong on the accelerator.
    - ``nonfinite``: the response to an infinite or NaN gradient: ``"ignore"`` computes with it, ``"skip"``
      leaves parameters, state and step counts unchanged and adds 1 to ``optimizer.skipped_steps`` (no
      host sync on an accelerator), ``"raise"`` raises ``FloatingPointError`` with the parameter's name
      (this waits for the device). A finite gradient up to the largest number is taken as in float64,
      except by AdamW, AdEMAMix and SOAP, which square it, SGD's momentum, which sums, and
      ``literal=True`` in PSGD.
    - ``agree``: which processes skip a step together, or raise, if one has an infinite or NaN gradient:
      with None those that hold parts of the same tensors, with ``"all"`` all of them, as the stages of a
      pipeline need to (docs/sharding.md). Without ``nonfinite`` no process skips any.
    - ``maximize``: ascend instead of descend.
    - ``compile``: True and False force it; None compiles where it pays: 2²² elements or more, if there is a
      compiler. Compiled code depends on the rule, its options and the dtypes, not on the model: the first
      step of a rule takes four to six seconds on a new machine, about one when torch's cache has it.
      Matrix rules compile the elementwise passes around their products.
    - ``capturable``: compute every number of a step, step counts too, on the parameters' device, so that a
      CUDA graph can capture and replay it (docs/cuda_graphs.md). Without a graph this is slower.
    - ``seed``: key of the noise of stochastic rounding and stochastic rules. The noise is a function of
      (seed, parameter, step, element): it resumes exactly, and the global generator is never touched. A
      parameter is known by its name, or by its number in the optimizer if it has none.
    """

    weight_decay_method: WeightDecayMethod
    state_dtype: StateDtype
    master: Master | None
    state_device: Literal["cpu"] | None
    rounding: Literal["nearest", "stochastic"]
    nonfinite: Literal["ignore", "skip", "raise"]
    agree: Literal["all"] | None
    maximize: bool
    compile: bool | None
    capturable: bool
    seed: int


_COMMON: dict[str, tuple[Hyperparameter, Any]] = {
    "weight_decay_method": (choice(*get_args(WeightDecayMethod)), "decoupled"),
    "state_dtype": (state_dtype(), None),
    "master": (choice(None, *get_args(Master)), None),
    "state_device": (choice(None, "cpu"), None),
    "rounding": (choice("nearest", "stochastic"), "nearest"),
    "nonfinite": (choice("ignore", "skip", "raise"), "ignore"),
    "agree": (choice(None, "all"), None),
    "maximize": (flag(), False),
    "compile": (choice(None, True, False), None),
    "capturable": (flag(), False),
    "seed": (integer(low=0, high=2**64 - 1), 0),
}
COMMON_OPTIONS = {name: hyper for name, (hyper, _) in _COMMON.items()}
COMMON_DEFAULTS = {name: default for name, (_, default) in _COMMON.items()}
