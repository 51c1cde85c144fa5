"""Colours, markers and line styles of the plots, for light and dark backgrounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Mode = Literal["light", "dark"]


@dataclass(frozen=True)
class Theme:
    """The colours for one background."""

    mode: Mode
    background: str
    text: str
    muted: str
    grid: str
    palette: tuple[str, ...]


@dataclass(frozen=True)
class SeriesStyle:
    """The style of one optimizer in every plot; two styles never differ in colour alone."""

    color: str
    marker: str
    dashes: str


# The first colours are Okabe and Ito's, which are distinguishable with all common kinds of colour vision,
# lightened for the dark background. A search found the others: as distinct as possible (see the tests).
LIGHT = Theme(
    "light",
    background="#ffffff",
    text="#1f2328",
    muted="#59636e",
    grid="#e4e8ec",
    palette=(
        *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
        *("#7b4106", "#6d2ce3", "#21112d", "#7fb653"),
    ),
)
DARK = Theme(
    "dark",
    background="#0d1117",
    text="#e6edf3",
    muted="#9198a1",
    grid="#262c36",
    palette=(
        *("#4a9fe0", "#f08a4b", "#2fc49a", "#e29bc6", "#f2b632", "#8fd3f7"),
        *("#f2e19d", "#a04be6", "#7a8f2a", "#e6edf3"),
    ),
)

_MARKERS = "osD^vPX<>*p"
# The line style changes after every five optimizers, so that colour is never the only difference.
_SERIES_PER_DASH = 5
_DASHES = ("-", "--", "-.", ":")


def series_style(theme: Theme, index: int) -> SeriesStyle:
    """Return the style of the `index`-th optimizer in the race, different from all others."""
    colors = len(theme.palette)
    return SeriesStyle(
        theme.palette[index % colors],
        _MARKERS[index % len(_MARKERS)],
        _DASHES[index // _SERIES_PER_DASH % len(_DASHES)],
    )


def style_axes(axes: Axes, theme: Theme, xlabel: str, ylabel: str = "") -> None:
    """Label the axes and apply the theme's colours, with a grid and only the left and bottom spines."""
    axes.set_facecolor(theme.background)
    axes.set_xlabel(xlabel, color=theme.text)
    axes.set_ylabel(ylabel, color=theme.text)
    axes.tick_params(which="both", colors=theme.muted, length=3)
    axes.grid(color=theme.grid, lw=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.muted)
