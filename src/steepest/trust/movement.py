"""Note which tensors have moved during some steps, and what kept the others from it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from steepest.distributed.local import is_dtensor
from steepest.optimizer import Optimizer
from steepest.rule import find_rule
from steepest.trust.applied import dense, own_part
from steepest.trust.errors import VerificationError
from steepest.trust.snapshot import Snapshot
from steepest.trust.twin import Twin

__all__ = ["Movement"]


class Movement:
    """Which of an optimizer's tensors have moved so far."""

    def __init__(self) -> None:
        self._seen: set[Tensor] = set()
        self._moved: set[Tensor] = set()
        # Tensors that had a gradient, one that is not zero, and a learning rate that is not.
        self._given: set[Tensor] = set()
        self._pulled: set[Tensor] = set()
        self._paced: set[Tensor] = set()

    def note(self, optimizer: Optimizer, twin: Twin, before: Mapping[Tensor, Snapshot]) -> None:
        """Note what a step moved, from what tensors were ``before`` and the twin's gradients."""
        for group, theirs in zip(optimizer.param_groups, twin.optimizer.param_groups, strict=True):
            moves = find_rule(group["rule"]).moves
            for param in group["params"]:
                gradient = twin.params[param].grad
                changed = before[param].weights_differ(optimizer, param)
                if moves:
                    # Votes gather for many steps before a weight flips.
                    accumulator = optimizer.state.get(param, {}).get("accumulator")
                    changed = changed or (accumulator is not None and bool(accumulator.any()))
                self._seen.add(param)
                self._moved |= {param} if changed else set()
                self._paced |= {param} if moves or float(theirs["lr"]) > 0 else set()
                if gradient is not None:
                    self._given.add(param)
                    self._pulled |= {param} if bool(dense(own_part(gradient)).any()) else set()

    def check(
        self, optimizer: Optimizer, names: Mapping[Tensor, str], may_rest: Collection[str], steps: int
    ) -> None:
        """Raise :class:`VerificationError` if a tensor that requires a gradient, or a group, did not move.

        Args:
            optimizer: the one whose steps were noted.
            names: of its tensors, for messages.
            may_rest: names of tensors that need not have moved.
            steps: how many steps were noted.
        """
        allowed = {*may_rest, *(f"parameter {name!r}" for name in may_rest)}
        for index, group in enumerate(optimizer.param_groups):
            tensors = [param for param in group["params"] if own_part(param).numel() > 0]
            resting = [each for each in tensors if each not in self._moved and names[each] not in allowed]
            if group["rounding"] == "stochastic":  # it may keep a few elements where they are, for a while
                resting = [each for each in resting if each not in self._pulled & self._paced]
            # Whether the rows of another process moved is seen there.
            resting = [each for each in resting if not is_dtensor(each) or each in self._pulled]
            wanted = [param for param in resting if param.requires_grad]
            if wanted:
                raise VerificationError(
                    f"{names[wanted[0]]} did not move in {steps} steps: {self._reason(wanted[0])}; "
                    f"{len(wanted)} of the {len(tensors)} tensors of group {index} did not"
                )
            if not find_rule(group["rule"]).moves:  # their gradients are votes
                still = [each for each in tensors if names[each] not in allowed and not is_dtensor(each)]
                still = [each for each in still if each.requires_grad and each not in self._pulled]
                if still:
                    raise VerificationError(
                        f"{names[still[0]]} moved in {steps} steps by weight decay or old momentum alone: "
                        "its gradient was 0 in all of them"
                    )
            # build() puts all parameters into groups, frozen ones, too.
            if resting and len(resting) == len(tensors) and optimizer.reasons is None:
                raise VerificationError(
                    f"group {index} is dead: none of its {len(tensors)} tensors requires a gradient; "
                    f"the first is {names[resting[0]]}"
                )

    def _reason(self, param: Tensor) -> str:
        if param not in self._seen:
            return "its group was added after the last one"
        if param not in self._given:
            return "it had no gradient"
        if param not in self._paced:
            return "its learning rate is 0"
        if param not in self._pulled:
            return "its gradient is 0"
        return (
            f"its updates are too small for {param.dtype} to represent beside its value (master='split16' or "
            "rounding='stochastic' keep them), or its rule gave none"
        )
