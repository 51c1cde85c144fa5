"""Note which tensors have moved during some steps, and what kept the others from it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from steepest.distributed.local import is_dtensor
from steepest.optimizer import Optimizer
from steepest.rule import find_rule
from steepest.trust.applied import dense, own_part, values_of
from steepest.trust.errors import VerificationError
from steepest.trust.twin import Twin

__all__ = ["Movement"]


class Movement:
    """Which of an optimizer's tensors have moved so far."""

    def __init__(self) -> None:
        self._moved: set[Tensor] = set()
        # Tensors that had a gradient, one that is not zero, and a learning rate that is not.
        self._given: set[Tensor] = set()
        self._pulled: set[Tensor] = set()
        self._paced: set[Tensor] = set()

    def note(self, optimizer: Optimizer, twin: Twin, before: Mapping[Tensor, Tensor]) -> None:
        """Note what a step moved, from the values that tensors had ``before`` and the twin's gradients."""
        for group, theirs in zip(optimizer.param_groups, twin.optimizer.param_groups, strict=True):
            moves = find_rule(group["rule"]).moves
            for param in group["params"]:
                gradient = twin.params[param].grad
                if moves:
                    # Votes gather for many steps before a weight flips.
                    accumulator = optimizer.state.get(param, {}).get("accumulator")
                    changed = accumulator is not None and bool(accumulator.any())
                else:
                    changed = not torch.equal(values_of(optimizer, param), before[param])
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
            if resting and len(resting) == len(tensors):
                raise VerificationError(
                    f"group {index} is dead: none of its {len(tensors)} tensors requires a gradient, "
                    f"{names[resting[0]]} first"
                )

    def _reason(self, param: Tensor) -> str:
        if param not in self._given:
            return "it had no gradient"
        if param not in self._paced:
            return "its learning rate is 0"
        if param not in self._pulled:
            return "its gradient is 0"
        return (
            f"its updates are smaller than what {param.dtype} can show beside its value (master='split16' or "
            "rounding='stochastic' keep them), or its rule gave none"
        )
