"""Colours and marks of the pictures, on light and on dark ground."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mode = Literal["light", "dark"]


@dataclass(frozen=True)
class Theme:
    """The colours of one ground."""

    mode: Mode
    ground: str
    ink: str
    faint: str
    grid: str
    series: tuple[str, ...]


@dataclass(frozen=True)
class Mark:
    """How one optimizer is drawn in every picture: colour is never the only difference."""

    color: str
    marker: str
    dashes: str


# First Okabe and Ito's colours, told apart with any common colour vision and lightened where the ground is
# dark; the others were searched for as far from them and each other, for the same eyes (see the tests).
LIGHT = Theme(
    "light",
    ground="#ffffff",
    ink="#1f2328",
    faint="#59636e",
    grid="#e4e8ec",
    series=(
        *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
        *("#7b4106", "#6d2ce3", "#21112d", "#7fb653"),
    ),
)
DARK = Theme(
    "dark",
    ground="#0d1117",
    ink="#e6edf3",
    faint="#9198a1",
    grid="#262c36",
    series=(
        *("#4a9fe0", "#f08a4b", "#2fc49a", "#e29bc6", "#f2b632", "#8fd3f7"),
        *("#f2e19d", "#a04be6", "#7a8f2a", "#e6edf3"),
    ),
)

_MARKERS = "osD^vPX<>*p"
# Neighbours in the race go together; every second handful is dashed, so that colour is never alone.
_HANDFUL = 5
_DASHES = ("-", "--", "-.", ":")


def mark(theme: Theme, index: int) -> Mark:
    """The mark of the optimizer that is `index`-th in the race; all differ in something."""
    colors = len(theme.series)
    return Mark(
        theme.series[index % colors],
        _MARKERS[index % len(_MARKERS)],
        _DASHES[index // _HANDFUL % len(_DASHES)],
    )
