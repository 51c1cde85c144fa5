"""The settings of a run, the same for all sections."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from steepest.lab.training.timing import Timing, interleave
from steepest.model_shapes import ModelShapes

from .groups import Group


@dataclass(frozen=True)
class BenchConfig:
    """The settings of a run.

    Args:
        models: The models whose parameter shapes are used.
        groups: The benchmark groups.
        device: The device.
        dtype: Dtype of parameters and gradients.
        rounds: Rounds per measurement.
        blocks: Number of a model's blocks whose hidden matrices the matrix rules update; None for all.
        memory: Bytes that the cases of a group may take together.
        full: Include slow measurements with little new information; otherwise a note lists the omissions.
    """

    models: Sequence[ModelShapes]
    groups: Sequence[Group]
    device: torch.device
    dtype: torch.dtype
    rounds: int
    blocks: int | None
    memory: int
    full: bool = False

    @property
    def toy(self) -> bool:
        """Whether all models are toys; sections then use toy sizes everywhere."""
        return all(model.name == "tiny" for model in self.models)

    def time(
        self,
        calls: Mapping[str, Callable[[], object]],
        setup: Mapping[str, Callable[[], object]] | None = None,
    ) -> dict[str, Timing]:
        """Time calls in turns."""
        return interleave(calls, device=self.device, rounds=self.rounds, setup=setup)

    def to_json(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        return {
            "models": [model.name for model in self.models],
            "optimizers": sorted({e.rule for f in self.groups for e in f.cases if e.ours}),
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "rounds": self.rounds,
            "blocks": self.blocks,
            "memory_bytes": self.memory,
            "full": self.full,
        }


def log(text: str) -> None:
    """Say on standard error what is being measured."""
    print(text, file=sys.stderr, flush=True)
