"""The interface of a section: one kind of measurement with its own tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .callbacks import Callback
from .groups import Group
from .results import Result
from .shapes import TOY_MODELS, ModelShapes


@dataclass(frozen=True)
class BenchConfig:
    """The settings of a run, the same for all sections.

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
        return all(model.name in TOY_MODELS for model in self.models)

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


class Section(Protocol):
    """One kind of measurement. To add one, implement this interface and list it in `sections.SECTIONS`."""

    name: str

    def work_units(self, config: BenchConfig) -> int:
        """Return the number of work units that `run` reports to the callback."""

    def run(self, config: BenchConfig, callback: Callback) -> Iterator[Result]:
        """Measure and yield each table as soon as it is complete, so that an interrupted run keeps it."""
