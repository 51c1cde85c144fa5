"""Telemetry: measure each tensor's steps on its device, and hand the numbers to a callback."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steepest.engine.collect import describe
from steepest.engine.layout import real_view
from steepest.hyperparameters import integer
from steepest.optimizer import Optimizer
from steepest.optimizer_in_backward import is_released
from steepest.rule import find_rule
from steepest.trust.applied import dense, own_part, values_of
from steepest.trust.nesting import is_nested

__all__ = ["DictCallback", "Measurements", "Telemetry", "TensorBoardCallback", "telemetry"]

Callback = Callable[[int, "Mapping[str, Measurements]"], Any]


class Measurements(NamedTuple):
    r"""What one step did to one tensor, with Δp = p after the step − p before it, weight decay included.

    Attributes:
        update_rms: the root mean square of Δp.
        relative_change: ‖Δp‖/‖p‖ with p before the step; 0 if nothing moved, infinite if only p was 0.
        cosine: of −Δp and the gradient, in [−1, 1]: 1 for steepest descent (−1 with ``maximize``), above 0
            for any descent; 0 if one of them is 0.
        flipped: the fraction of p's elements that changed from above 0 to below, or the opposite. Of a
            complex number the real and the imaginary part count as one element each.
    """

    update_rms: float
    relative_change: float
    cosine: float
    flipped: float


def telemetry(optimizer: Optimizer, callback: Callback, every: int = 1) -> Telemetry:
    """Call back with :class:`Measurements` of every tensor that has a gradient, after steps.

    Nothing is measured until this is called, nor after :meth:`Telemetry.remove`: it works by hooks, and a
    step without them asks nothing. A measured step copies the parameters before, makes a few passes over
    them after, and reads the results of all tensors at once: one transfer from each device.

    Of a sharded parameter (DTensor) each process measures its own shard. Parameters of ternary layers, which
    stand for packed weights, are left out: :meth:`steepest.ternary.TernaryFlip.stats` has theirs. With
    ``master``, p is the master weight.

    Args:
        optimizer: one of this library's; tensors' names are those of its named parameters, followed by
            "of group 1" and the like where several groups use one name.
        callback: called as ``callback(step, {name: Measurements})``; steps count from 1, from now on.
            :class:`DictCallback` and :class:`TensorBoardCallback` are two. What it raises, ``step()`` raises.
        every: measure each so-many-th step, ≥ 1: the first at ``step == every``.

    Returns:
        A handle, also a context manager.

    Raises:
        TypeError: the optimizer is not of this library.
        ValueError: ``every`` is not an integer ≥ 1; the optimizer's gradients are released, so that
            ``step()`` comes after the parameters have moved.

    >>> from steepest import SGD
    >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> optimizer = SGD({"weight": weight}.items(), lr=1.0)
    >>> with telemetry(optimizer, history := DictCallback()):
    ...     weight.grad = torch.tensor([6.0, 0.0])
    ...     optimizer.step()
    >>> {name: round(values[0], 4) for name, values in history["weight"].items()}
    {'update_rms': 4.2426, 'relative_change': 1.2, 'cosine': 1.0, 'flipped': 0.5}
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"telemetry() takes an optimizer of steepest, got {type(optimizer).__name__}")
    integer(low=1).check("telemetry()", "every", every)
    if is_released(optimizer):
        raise ValueError(
            "telemetry(): the gradients are released: parameters are stepped, and their gradients freed, in "
            "the backward pass. Call remove() on the handle of release_gradients() first"
        )
    return Telemetry(optimizer, callback, every)


class Telemetry:
    """The handle that :func:`telemetry` returns, which documents the arguments."""

    def __init__(self, optimizer: Optimizer, callback: Callback, every: int) -> None:
        self._optimizer, self._callback, self._every = optimizer, callback, every
        self._step = 0
        self._before: dict[Tensor, Tensor] | None = None
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def remove(self) -> None:
        """End the telemetry; again is fine."""
        for hook in self._hooks:
            hook.remove()
        self._before = None

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if is_nested(optimizer):
            return
        self._before = None  # of a step that raised
        if (self._step + 1) % self._every == 0:
            self._before = {param: values_of(self._optimizer, param) for param in _measured(self._optimizer)}

    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def _after_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if is_nested(optimizer):
            return
        self._step += 1
        before, self._before = self._before, None
        if before is None:
            return
        # With a closure, the gradients are there only now.
        stepped = {
            param: name
            for param, name in _measured(self._optimizer).items()
            if param in before and param.grad is not None
        }
        sums: dict[torch.device, list[Tensor]] = defaultdict(list)
        for param in stepped:
            after = values_of(self._optimizer, param)
            sums[after.device].append(_sums(*map(real_view, (before[param], after, _gradient(param)))))
        rows = {device: iter(torch.stack(found).tolist()) for device, found in sums.items()}
        found = {name: _measurements(next(rows[before[param].device])) for param, name in stepped.items()}
        self._callback(self._step, found)


class DictCallback(dict[str, dict[str, list[float]]]):
    """A callback that is a plain dict of lists: tensor's name → quantity → values, one a measured step.

    ``steps`` has the numbers of those steps. A tensor that had no gradient in one has NaN there.

    >>> history = DictCallback()
    >>> history(5, {"weight": Measurements(0.1, 0.01, 0.5, 0.0)})
    >>> history, history.steps
    ({'weight': {'update_rms': [0.1], 'relative_change': [0.01], 'cosine': [0.5], 'flipped': [0.0]}}, [5])
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []

    def __call__(self, step: int, measured: Mapping[str, Measurements]) -> None:
        """Append a step's numbers."""
        for name in measured.keys() - self.keys():
            self[name] = {quantity: [float("nan")] * len(self.steps) for quantity in Measurements._fields}
        self.steps.append(step)
        missing = Measurements(*[float("nan")] * len(Measurements._fields))
        for name, lists in self.items():
            for quantity, value in measured.get(name, missing)._asdict().items():
                lists[quantity].append(value)


class TensorBoardCallback:
    """A callback that writes scalars with tags such as ``cosine/layer.weight``.

    Args:
        writer: what has ``add_scalar(tag, value, step)``, such as torch.utils.tensorboard's SummaryWriter.
        quantities: those of :class:`Measurements` to write; all by default.

    Raises:
        ValueError: there is no such quantity.

    >>> class Printer:
    ...     def add_scalar(self, tag, value, step):
    ...         print(step, tag, value)
    >>> TensorBoardCallback(Printer(), ["cosine"])(5, {"weight": Measurements(0.1, 0.01, 0.5, 0.0)})
    5 cosine/weight 0.5
    """

    def __init__(self, writer: Any, quantities: Any = Measurements._fields) -> None:
        self._writer, self._quantities = writer, tuple(quantities)
        for name in self._quantities:
            if name not in Measurements._fields:
                raise ValueError(f"telemetry measures {', '.join(Measurements._fields)}, not {name!r}")

    def __call__(self, step: int, measured: Mapping[str, Measurements]) -> None:
        """Write a step's numbers."""
        for name, numbers in measured.items():
            for quantity in self._quantities:
                self._writer.add_scalar(f"{quantity}/{name}", getattr(numbers, quantity), step)


def _measured(optimizer: Optimizer) -> dict[Tensor, str]:
    """Return the names of the parameters that are stepped as they are, with the group's index if shared."""
    found = [
        (param, index, group["param_names"][at] if "param_names" in group else describe(group, index, at))
        for index, group in enumerate(optimizer.param_groups)
        if not find_rule(group["rule"]).moves
        for at, param in enumerate(group["params"])
        if param.numel() > 0
    ]
    times = Counter(name for _, _, name in found)
    return {param: name if times[name] == 1 else f"{name} of group {index}" for param, index, name in found}


def _gradient(param: Tensor) -> Tensor:
    assert param.grad is not None
    return dense(own_part(param.grad))


def _sums(before: Tensor, after: Tensor, gradient: Tensor) -> Tensor:
    """Return [‖Δp‖, ‖p‖, ‖g‖, ⟨−Δp, g⟩/(‖Δp‖‖g‖), flipped elements, elements], in float64 where it is."""
    wide = torch.float32 if before.device.type == "mps" else torch.float64
    p, g = before.to(wide), gradient.to(wide)
    change = after.to(wide) - p
    norms = [torch.linalg.vector_norm(each) for each in (change, p, g)]
    cosine = -(change * g).sum() / (norms[0] * norms[2])
    flipped = (before.sign() * after.sign() < 0).sum().to(wide)
    return torch.stack([*norms, cosine, flipped, torch.full_like(flipped, before.numel())])


def _measurements(row: list[float]) -> Measurements:
    change, size, gradient, cosine, flipped, count = row
    if count == 0:
        return Measurements(0.0, 0.0, 0.0, 0.0)
    relative = 0.0 if change == 0 else change / size if size else float("inf")
    return Measurements(
        change / count**0.5, relative, 0.0 if 0 in (change, gradient) else cosine, flipped / count
    )
