"""A section of the benchmark: one kind of measurement, with its own tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .families import Family
from .results import Result
from .shapes import TOYS, ShapeList
from .watch import Watcher


@dataclass(frozen=True)
class Setting:
    """What all sections are asked for.

    Args:
        models: The models whose shapes are stepped.
        families: Who takes turns with whom.
        device: Where.
        dtype: Of parameters and gradients.
        rounds: Of every measurement.
        blocks: Matrix rules step the hidden matrices of so many of a model's blocks; None: of all.
        memory: Bytes that a group of contestants may take.
        full: Measure what takes long and says little new too; a section says what it leaves out.
    """

    models: Sequence[ShapeList]
    families: Sequence[Family]
    device: torch.device
    dtype: torch.dtype
    rounds: int
    blocks: int | None
    memory: int
    full: bool = False

    @property
    def toy(self) -> bool:
        """Whether only toys are asked for: then sizes that a section chooses itself are toys too."""
        return all(model.name in TOYS for model in self.models)

    def plain(self) -> dict[str, Any]:
        """The setting as JSON."""
        return {
            "models": [model.name for model in self.models],
            "optimizers": sorted({e.rule for f in self.families for e in f.entries if e.ours}),
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "rounds": self.rounds,
            "blocks": self.blocks,
            "memory_bytes": self.memory,
            "full": self.full,
        }


class Section(Protocol):
    """One kind of measurement. A new one is a class like this, listed in `sections.SECTIONS`."""

    name: str

    def pieces(self, setting: Setting) -> int:
        """How many pieces of work `run` will tell the watcher of."""

    def run(self, setting: Setting, watcher: Watcher) -> Iterator[Result]:
        """Measure, and give each table as soon as it stands: an interrupted run keeps what it has."""
