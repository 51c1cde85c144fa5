"""Run an optimizer beside its reference and compare parameters and state after every step."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from reference.descent import Reference
from reference.gradients import hard_gradients, start
from steepest import create

STEPS = 60
SHAPE = (8, 6)

# Relative to the element's largest magnitude so far. In float64 the two differ by the order in which a few
# products are rounded: a few 1e-16 per step. In float32 every step rounds an element about three times
# (decay, scaled direction, difference): at most 180 half ulps (6e-8) in 60 steps.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}

MakeReference = Callable[..., Reference]


def halving(lr: float) -> Callable[[int], float]:
    """Return a schedule from lr down to lr/2, so that formulas that differ in η give different results."""
    return lambda t: lr * (1 - t / (2 * STEPS))


def assert_follows(
    name: str,
    reference: MakeReference,
    options: dict,
    *,
    dtype: torch.dtype = torch.float64,
    gradients: Sequence[Tensor] | None = None,
    begin: Tensor | None = None,
    schedule: Callable[[int], float] | None = None,
    tolerance: float | None = None,
    **reference_only,
) -> None:
    """Step ``create(name, **options)`` and ``reference(**options)`` side by side, eagerly.

    The reference sees the gradients and the start as rounded to ``dtype``.
    """
    gradients = hard_gradients(SHAPE, STEPS) if gradients is None else gradients
    begin = (start(tuple(gradients[0].shape)) if begin is None else begin).to(dtype)
    param = torch.nn.Parameter(begin.clone())
    optimizer = create(name, [param], compile=False, **options)
    expected = reference(begin.double().flatten().tolist(), **reference_options(options), **reference_only)
    close = Closeness(TOLERANCE[dtype] if tolerance is None else tolerance)
    for t, gradient in enumerate(gradients):
        if schedule is not None:
            optimizer.param_groups[0]["lr"] = expected.lr = schedule(t)
        param.grad = gradient.to(dtype)
        optimizer.step()
        expected.step(param.grad.double().flatten().tolist())
        close.check(f"parameter after step {t + 1}", "parameter", param.detach(), expected.p)
        for entry, values in expected.state().items():
            close.check(f"{entry} after step {t + 1}", entry, optimizer.state[param][entry], values)


def reference_options(options: dict) -> dict:
    """Drop the options that have no meaning for plain numbers."""
    return {name: value for name, value in options.items() if name not in ("counter_dtype", "seed")}


class Closeness:
    """Check each element to within ``tolerance`` times its largest magnitude so far, and integers exactly."""

    def __init__(self, tolerance: float):
        self.tolerance = tolerance
        self.largest: dict[str, Tensor] = {}

    def check(self, what: str, entry: str, ours: Tensor, expected: Sequence[float] | float) -> None:
        wanted = torch.tensor(expected, dtype=torch.float64).reshape(ours.shape)
        if not ours.dtype.is_floating_point:
            assert torch.equal(ours.double(), wanted), what
            return
        largest = self.largest[entry] = torch.maximum(self.largest.get(entry, wanted.abs()), wanted.abs())
        off = (ours.double() - wanted).abs() > self.tolerance * largest
        assert not off.any(), f"{what}: {ours[off].tolist()} where the reference has {wanted[off].tolist()}"
        assert not ours.isnan().any(), what
