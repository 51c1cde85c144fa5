"""What to watch while packed weights train: flips per step and the fraction of zeros."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FlipStats", "LayerStats"]


@dataclass(frozen=True)
class LayerStats:
    """The statistics of one layer: ``flips`` and ``zeros`` are those of :class:`FlipStats`.

    >>> LayerStats("0", weights=64, flips=3, zeros=0.25).flips
    3
    """

    name: str
    weights: int
    flips: int
    zeros: float


@dataclass(frozen=True)
class FlipStats:
    """The statistics of all layers together, and of each.

    Attributes:
        step: steps taken.
        threshold: τ of the next step; infinite where nothing flips any more.
        weights: number of packed weights.
        flips: how many moved in the last step.
        total_flips: how many have moved since the trainer was made or loaded.
        zeros: fraction of the weights that are 0; always 0 for binary ones.
        layers: the same for each layer, by its ``name`` in the model.

    >>> print(FlipStats(10, 24.0, 64, 3, 9, 0.25, (LayerStats("0", 64, 3, 0.25),)))
    step 10: 3 of 64 weights flipped (9 so far), 25.0% are 0, threshold 24
      0            64           3 flips   25.0% zeros
    """

    step: int
    threshold: float
    weights: int
    flips: int
    total_flips: int
    zeros: float
    layers: tuple[LayerStats, ...]

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        head = (
            f"step {self.step}: {self.flips:,} of {self.weights:,} weights flipped "
            f"({self.total_flips:,} so far), {self.zeros:.1%} are 0, threshold {self.threshold:.3g}"
        )
        rows = (
            f"  {each.name:{width}}  {each.weights:>12,}  {each.flips:>10,} flips  {each.zeros:6.1%} zeros"
            for each in self.layers
        )
        return "\n".join((head, *rows))
