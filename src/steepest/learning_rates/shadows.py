"""Shadow a running optimizer: measure what other rules would do with its gradients, without doing it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from steepest.distributed.local import is_dtensor
from steepest.engine.update import decay_strength, decayed, initial_lr
from steepest.optimizer import Optimizer
from steepest.routing.roles import Role
from steepest.rule import find_rule

__all__ = ["Shadow", "ShadowReport", "ShadowRow", "shadow"]

Place = tuple[int, str]
"""A param group's index and a role."""
Squares = dict[Place, Tensor]
"""The sum of the squares of one step's update, over the square of its learning rate."""

# The roles of tensors that no build() has looked at.
_MATRIX, _VECTOR = "matrix", "vector"
# How many steps a report rests on at most, unless it is told.
_RECENT = 50
# How many steps are remembered.
_KEPT = 1000


def shadow(optimizer: Optimizer, candidates: Iterable[str | Mapping[str, Any]]) -> Shadow:
    r"""Run candidates on the gradients of a running optimizer, and report which learning rates match it.

    Every step of ``optimizer`` is followed by one of each candidate, on copies of the parameters that are
    discarded. Both updates are measured without weight decay, for each role of tensors (``"linear"``,
    ``"embedding"``, ``"norm"``, …, as :func:`steepest.build` found them; ``"matrix"`` and ``"vector"`` in
    groups made by hand). With :math:`u` the rms of an update over its learning rate, a candidate moves a
    role as far as the running optimizer does at

    .. math:: \eta_c = \eta\,\frac{u}{u_c}, \qquad \lambda_c = \lambda\,\frac{\eta}{\eta_c}

    where :math:`\lambda_c` keeps the product of learning rate and weight decay. Equal rms is not an equally
    good learning rate (docs/learning_rates.md): it is a place to start from.

    Parameters, state, gradients and random generators of the run stay untouched, bit for bit. While it runs,
    a shadow costs one copy of the parameters, in float32 at least, and the state of all candidates, and each
    step as much more as the candidates' steps take. A candidate for hidden matrices gets only those. It sees
    a group's views if the running rule has them; otherwise give ``{"rule": "muon", "views": {...}}``.

    Not measured: parameters that have no gradient in ``step()`` (:func:`steepest.release_gradients` frees
    them before); groups added later; ternary weights. Decay that is part of the direction (``"l2"``,
    SignGSD's) is not taken out. If parameters are bfloat16 or float16, rounding is part of the running
    optimizer's update.

    Args:
        optimizer: an optimizer of this library.
        candidates: names of rules, or dicts of group options with a ``"rule"``, without lr and weight decay.

    Returns:
        A handle, also a context manager, with :meth:`~Shadow.report` and :meth:`~Shadow.remove`.

    Raises:
        TypeError: ``optimizer`` is not of this library; a candidate is neither a name nor a dict; an unknown
            option.
        ValueError: no candidates; an unknown rule; a value out of range; a learning rate or a weight decay,
            which are to be found; a candidate that takes none of the tensors; sharded parameters.

    >>> from steepest import SGD
    >>> weight = Parameter(torch.tensor([3.0, -4.0]))
    >>> optimizer = SGD([weight], lr=0.5, weight_decay=0.1, weight_decay_method="decoupled")
    >>> with shadow(optimizer, ["signgsd"]) as shadowed:
    ...     weight.grad = torch.tensor([0.6, -0.8])
    ...     optimizer.step()
    >>> row, = shadowed.report().rows
    >>> round(row.lr, 4), round(row.weight_decay, 4)  # the gradient's rms is √½, that of signs 1
    (0.3536, 0.1414)
    """
    return Shadow(optimizer, candidates)


@dataclass(frozen=True)
class ShadowRow:
    """A candidate's match for the tensors of one role in one param group.

    Attributes:
        candidate: the rule's name, with its options.
        role: ``"linear"``, ``"embedding"``, …; ``"matrix"`` or ``"vector"`` in groups made by hand.
        group: the index of the param group.
        lr: the learning rate at which the update's rms is the running optimizer's; NaN if nothing moved.
        weight_decay: at that learning rate, it shrinks parameters as fast; 0 for a rule that has none.
        multiplier: ``lr`` over the running optimizer's learning rate; it stays the same under a schedule.
        parameters: number of elements.
        state_bytes: bytes of the candidate's state for them.
        running_state_bytes: bytes of the running optimizer's.
    """

    candidate: str
    role: str
    group: int
    lr: float
    weight_decay: float
    multiplier: float
    parameters: int
    state_bytes: int
    running_state_bytes: int


@dataclass(frozen=True)
class ShadowReport:
    """The rows of all candidates; ``str()`` makes a table.

    Attributes:
        rows: a row for each candidate, group and role.
        steps: the number of steps that the learning rates rest on.
    """

    rows: tuple[ShadowRow, ...]
    steps: int

    def table(self) -> str:
        """Format the rows as a table with aligned columns."""
        cells = [("candidate", "role", "group", "lr", "× lr", "decay", "parameters", "state", "now")]
        for row in self.rows:
            cells.append(
                (
                    row.candidate,
                    row.role,
                    str(row.group),
                    f"{row.lr:.3g}",
                    f"{row.multiplier:.3g}",
                    f"{row.weight_decay:.3g}",
                    f"{row.parameters:,}",
                    f"{row.state_bytes:,} B",
                    f"{row.running_state_bytes:,} B",
                )
            )
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        pads = [str.ljust, str.ljust, *[str.rjust] * 7]
        lines = [
            "  ".join(pad(cell, width) for pad, cell, width in zip(pads, line, widths, strict=True)).rstrip()
            for line in cells
        ]
        return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])

    def __str__(self) -> str:
        return self.table()


@dataclass
class _Tensors:
    """The parameters of one role in one group, with their copies and, if they have any, names."""

    params: list[Tensor] = field(default_factory=list)
    copies: list[Tensor] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def stepped(self) -> list[tuple[Tensor, Tensor]]:
        """Return the parameters that have a gradient, and their copies."""
        pairs = zip(self.params, self.copies, strict=True)
        return [pair for pair in pairs if pair[0].grad is not None]


@dataclass
class _Candidate:
    """A candidate's optimizer over copies of the roles that it takes, and the rms it has measured.

    A rule that holds its parameters on a set keeps copies of its own there; the others share theirs, which
    follow the running optimizer.
    """

    label: str
    optimizer: Optimizer
    copies: dict[Place, list[Tensor]]
    follows: bool
    squares: deque[Squares] = field(default_factory=lambda: deque(maxlen=_KEPT))


class Shadow:
    """The handle returned by :func:`shadow`, which documents the arguments and errors."""

    def __init__(self, optimizer: Optimizer, candidates: Iterable[str | Mapping[str, Any]]) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                "shadow() takes an optimizer of steepest, "
                f"got {type(optimizer).__module__}.{type(optimizer).__name__}"
            )
        if isinstance(candidates, (str, Mapping)):
            candidates = [candidates]
        given = [_options(each) for each in candidates]
        if not given:
            raise ValueError("shadow() needs a candidate, such as 'lion'; steepest.list_optimizers() has all")
        self._optimizer = optimizer
        self._tensors = _by_place(optimizer)
        self._squares: deque[Squares] = deque(maxlen=_KEPT)
        self._candidates = [self._build(each) for each in given]
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def __enter__(self) -> Shadow:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Stop measuring; the report remains."""
        for handle in self._handles:
            handle.remove()

    def report(self, last: int | None = None) -> ShadowReport:
        """Return the learning rates that match in the ``last`` steps.

        By default these are the latter half, but no more than 50: early on a candidate's averages are short,
        and the running optimizer's rms changes as training goes on. The last 1,000 steps are remembered.

        Raises:
            ValueError: no step has been taken, or ``last`` is not positive.
        """
        seen = len(self._squares)
        if not seen:
            raise ValueError("shadow: there is nothing to report before the optimizer's first step")
        if last is not None and last < 1:
            raise ValueError(f"shadow: last must be a positive number of steps, got {last!r}")
        last = min((seen + 1) // 2, _RECENT) if last is None else min(seen, last)
        rows = []
        for candidate in self._candidates:
            for place, copies in candidate.copies.items():
                index, role = place
                ratio = _ratio(self._squares, candidate.squares, last, place)
                group, tensors = self._optimizer.param_groups[index], self._tensors[place]
                rows.append(
                    ShadowRow(
                        candidate.label,
                        role,
                        index,
                        ratio * float(group["lr"]),
                        _matched_decay(candidate.optimizer, group, ratio),
                        ratio,
                        sum(param.numel() for param in tensors.params),
                        _state_bytes(candidate.optimizer, copies),
                        _state_bytes(self._optimizer, tensors.params),
                    )
                )
        return ShadowReport(tuple(rows), last)

    def _build(self, options: dict[str, Any]) -> _Candidate:
        rule = find_rule(options.pop("rule"))
        label = " ".join([rule.name, *(f"{name}={value}" for name, value in options.items())])
        places = [
            place
            for place in self._tensors
            if not rule.hidden_only or place[1] == _MATRIX or Role(place[1], "").hidden
        ]
        if not places:
            raise ValueError(f"shadow: candidate {label!r} takes none of the optimizer's tensors")
        views = options.pop("views", None) or {}
        copies = {place: self._tensors[place].copies for place in places}
        if rule.retracts:
            copies = {place: [Parameter(each.clone()) for each in own] for place, own in copies.items()}
        groups = []
        for place, own in copies.items():
            running, tensors = self._optimizer.param_groups[place[0]], self._tensors[place]
            group = {name: running[name] for name in ("maximize", "nonfinite")}
            group["params"] = list(zip(tensors.names, own, strict=True)) if tensors.names else own
            if "views" in rule.hyper:
                known = {**(running.get("views") or {}), **views}
                group["views"] = {name: known[name] for name in tensors.names if name in known}
            if "view" in rule.hyper and rule.hyper["view"].accepts(running.get("view")):
                group["view"] = running["view"]
            groups.append({**group, **options})
        if "weight_decay" in rule.hyper:
            options["weight_decay"] = 0.0
        if not rule.retracts:  # other steps are linear in the learning rate, and large ones round least
            options["lr"] = 1.0
        return _Candidate(label, Optimizer(groups, rule=rule.name, **options), copies, not rule.retracts)

    @torch.no_grad()
    def _before(self, *_: Any) -> None:
        for tensors in self._tensors.values():
            torch._foreach_copy_(tensors.copies, tensors.params)

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        squares: Squares = {}
        for place, tensors in self._tensors.items():
            group, lr = self._optimizer.param_groups[place[0]], self._optimizer.param_groups[place[0]]["lr"]
            moved = [_moved(param, copy, group) for param, copy in tensors.stepped()]
            if moved and (isinstance(lr, Tensor) or lr > 0):
                squares[place] = _sum_of_squares(moved) / lr**2
        self._squares.append(squares)
        for candidate in self._candidates:
            candidate.squares.append(self._step(candidate))

    def _step(self, candidate: _Candidate) -> Squares:
        """Step the candidate's copies with the running gradients, and return how far they moved."""
        before = {}
        for place, copies in candidate.copies.items():
            params = self._tensors[place].params
            if candidate.follows:
                torch._foreach_copy_(copies, params)
            before[place] = params if candidate.follows else [each.clone() for each in copies]
            for param, each in zip(params, copies, strict=True):
                each.grad = None if param.grad is None else param.grad.to(each.dtype)
        candidate.optimizer.step()
        squares: Squares = {}
        for place, copies in candidate.copies.items():
            pairs = zip(copies, before[place], strict=True)
            moved = [after - start for after, start in pairs if after.grad is not None]
            if moved:
                squares[place] = _sum_of_squares(moved) / candidate.optimizer.param_groups[0]["lr"] ** 2
        candidate.optimizer.zero_grad()
        return squares


def _options(candidate: str | Mapping[str, Any]) -> dict[str, Any]:
    """Return a candidate's options, with its ``"rule"``."""
    options = {"rule": candidate} if isinstance(candidate, str) else candidate
    if not isinstance(options, Mapping):
        raise TypeError(f"shadow: a candidate is a rule's name or a dict of options, got {candidate!r}")
    if "rule" not in options:
        raise ValueError(f"shadow: candidate {dict(options)!r} names no rule")
    for name in ("lr", "weight_decay"):
        if name in options:
            raise ValueError(f"shadow: leave {name} out of {dict(options)!r}: the report determines it")
    return dict(options)


def _by_place(optimizer: Optimizer) -> dict[Place, _Tensors]:
    """Return the trainable parameters by group and role, with a copy of each."""
    why = {} if optimizer.reasons is None else optimizer.reasons.why
    found: dict[Place, _Tensors] = {}
    for index, group in enumerate(optimizer.param_groups):
        names = group.get("param_names", [None] * len(group["params"]))
        for name, param in zip(names, group["params"], strict=True):
            ternary = optimizer.targets is not None and optimizer.targets.find(param) is not None
            if ternary or not param.requires_grad:
                continue
            if is_dtensor(param):
                raise ValueError(f"shadow: parameter {name!r} is sharded; only plain tensors can be shadowed")
            # build() gives "kind: reason", or "override: patterns, otherwise kind: reason".
            reason = why.get(name, "").rpartition("otherwise ")[2]
            role = reason.partition(":")[0] or (_MATRIX if param.dim() > 1 else _VECTOR)
            tensors = found.setdefault((index, role), _Tensors())
            wide = torch.promote_types(param.dtype, torch.float32)
            tensors.params.append(param)
            tensors.copies.append(Parameter(param.detach().to(wide, copy=True)))
            if name is not None:
                tensors.names.append(name)
    return found


def _moved(param: Tensor, before: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Return how far a parameter moved, but for its weight decay."""
    method, weight_decay, after = group["weight_decay_method"], group["weight_decay"], param.to(before.dtype)
    if weight_decay == 0 or method == "l2" or find_rule(group["rule"]).decays_itself(group):
        return after - before
    strength = decay_strength(method, group["lr"], weight_decay, initial_lr(group))
    if method != "cautious":
        return after - decayed(before, strength, method)
    # It decays where both pull the parameter toward zero.
    return after - torch.where((before - after) * before > 0, before * strength, before)


def _sum_of_squares(tensors: list[Tensor]) -> Tensor:
    norms = torch._foreach_norm(tensors)
    return torch.stack([norm.to(norms[0].device) for norm in norms]).square().sum()


def _ratio(running: Iterable[Squares], candidate: Iterable[Squares], last: int, place: Place) -> float:
    """Return the candidate's learning rate over the running one; steps that are not finite are left out."""
    pairs = [
        (ours[place], theirs[place])
        for ours, theirs in list(zip(running, candidate, strict=True))[-last:]
        if place in ours and place in theirs
    ]
    if not pairs:
        return math.nan
    sums = torch.stack([torch.stack([one.double(), other.double()]) for one, other in pairs])
    one, other = sums[sums.isfinite().all(1)].sum(0).tolist()
    return math.sqrt(one / other) if other > 0 else math.nan


def _matched_decay(candidate: Optimizer, running: Mapping[str, Any], ratio: float) -> float:
    """Return the weight decay at which the candidate shrinks parameters as fast as the running group."""
    lr, weight_decay, method = (
        float(running["lr"]),
        float(running["weight_decay"]),
        running["weight_decay_method"],
    )
    if weight_decay == 0:
        return 0.0
    strength = decay_strength(method, lr, weight_decay, initial_lr(running))
    shrinks = strength if method == "sign" else math.nan if method == "l2" else 1 - strength
    matched = float(shrinks) / (lr * ratio) if lr > 0 else math.nan
    group = candidate.param_groups[0]
    try:
        find_rule(group["rule"]).check("shadow", {**group, "weight_decay": matched})
    except ValueError:  # a rule without weight decay
        return 0.0 if math.isfinite(matched) else matched
    return matched


def _state_bytes(optimizer: Optimizer, params: Iterable[Tensor]) -> int:
    entries = [entry for param in params for entry in optimizer.state.get(param, {}).values()]
    return sum(entry.nbytes for entry in entries if isinstance(entry, Tensor))
