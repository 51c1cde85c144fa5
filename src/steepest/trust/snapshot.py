"""Take a copy of all that a step may change of one tensor: its weights and its state."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from steepest.optimizer import Optimizer
from steepest.trust.applied import own_part, values_of

__all__ = ["Snapshot"]


@dataclass(frozen=True)
class Snapshot:
    """A tensor's weights, the packed ones of a ternary layer for what stands for it, and its state."""

    weights: Tensor
    state: dict[str, Tensor]

    @classmethod
    def of(cls, optimizer: Optimizer, param: Tensor) -> Snapshot:
        """Copy what there is now; of DTensors, the local shards."""
        state = optimizer.state.get(param, {}).items()
        return cls(
            weights_of(optimizer, param).clone(),
            {name: own_part(entry).clone() for name, entry in state if isinstance(entry, Tensor)},
        )

    def weights_differ(self, optimizer: Optimizer, param: Tensor) -> bool:
        """Return whether the weights are other ones now."""
        return not _equal(weights_of(optimizer, param), self.weights)

    def changed_entry(self, optimizer: Optimizer, param: Tensor) -> str | None:
        """Return the name of a state entry that is another one now, or gone; entries may have been added."""
        state = optimizer.state.get(param, {})
        for name, entry in self.state.items():
            now = state.get(name)
            if not isinstance(now, Tensor) or not _equal(own_part(now), entry):
                return name
        return None


def weights_of(optimizer: Optimizer, param: Tensor) -> Tensor:
    target = None if optimizer.targets is None else optimizer.targets.find(param)
    packed: Tensor | None = None if target is None else target.layer.packed
    return values_of(optimizer, param) if packed is None else packed


def _equal(one: Tensor, other: Tensor) -> bool:
    """Return whether all numbers are equal, where NaN is equal to NaN."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())
