"""Colours, shapes and dashes: an optimizer has the same colour in every report, chart and theme."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Mode = Literal["light", "dark"]
MODES: tuple[Mode, ...] = ("light", "dark")

# The first six are Okabe and Ito's, lightened for the dark background. A search found the others: for each,
# the pair farthest from those before it in CIELAB, with full colour vision and with one of its cones missing.
_COLORS: tuple[tuple[str, str], ...] = (
    *(("#0072b2", "#4a9fe0"), ("#d55e00", "#f08a4b"), ("#009e73", "#2fc49a"), ("#cc79a7", "#e29bc6")),
    *(("#e69f00", "#f2b632"), ("#56b4e9", "#8fd3f7"), ("#171329", "#7a25e8"), ("#702a07", "#86503f")),
    *(("#1d1abc", "#4a53b7"), ("#ea0250", "#bd1175"), ("#3c2118", "#fbece7"), ("#9751ed", "#8e78f7")),
    *(("#951d7c", "#c0090f"), ("#436634", "#afe29c"), ("#baaa5d", "#a97a50"), ("#233f41", "#047d97")),
    *(("#99125e", "#f949ce"), ("#5f32aa", "#6d509c"), ("#d49ca3", "#e75022"), ("#172df4", "#dfeeff")),
)
# The places in `_COLORS`, fixed for ever: those most often compared have the most different colours.
_KNOWN = (
    *("adamw", "lion", "muon", "soap", "sgdsai", "signum", "signgsd", "simba", "quad", "procrustes"),
    *("normuon", "simbaleaky", "ademamix", "sgd", "scion", "polargrad", "hyperball", "orthogonalized"),
    *("adammini", "adam"),
)
SHAPES = {
    "circle": "M1,0A1,1,0,1,1,-1,0A1,1,0,1,1,1,0Z",
    "square": "M-.89,-.89H.89V.89H-.89Z",
    "triangle": "M0,-1.15L1.05,.75H-1.05Z",
    "diamond": "M0,-1.25L1.05,0L0,1.25L-1.05,0Z",
    "down": "M0,1.15L1.05,-.75H-1.05Z",
    "plus": "M-.4,-1.1H.4V-.4H1.1V.4H.4V1.1H-.4V.4H-1.1V-.4H-.4Z",
    "star": "M0,-1.25L.34,-.4L1.2,-.35L.53,.2L.76,1.05L0,.57L-.76,1.05L-.53,.2L-1.2,-.35L-.34,-.4Z",
    "right": "M1.15,0L-.75,1.05V-1.05Z",
    "hourglass": "M-.95,-1.05H.95L.2,0L.95,1.05H-.95L-.2,0Z",
    "left": "M-1.15,0L.75,1.05V-1.05Z",
}
_DASHES: tuple[tuple[int, ...], ...] = ((1, 0), (6, 3), (2, 2), (9, 3, 2, 3), (12, 4))

_PAGE = {
    "background": ("#ffffff", "#0d1117"),
    "raised": ("#f5f7f9", "#161b22"),
    "text": ("#1f2328", "#e6edf3"),
    "muted": ("#59636e", "#9198a1"),
    "line": ("#d8dee4", "#30363d"),
}
PAGE = {mode: {name: pair[at] for name, pair in _PAGE.items()} for at, mode in enumerate(MODES)}
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif'


@dataclass(frozen=True)
class Style:
    """How one optimizer is drawn."""

    light: str
    dark: str
    shape: str
    """An SVG path around the origin."""
    dash: tuple[int, ...]


def place(name: str) -> int:
    """Return an optimizer's place among the colours: fixed for known names, otherwise by a hash of the name.

    Example:
        >>> place("sgd_sai") == place("SGD_sai"), place("torch.optim:AdamW") == place("adamw")
        (True, True)
    """
    plain = "".join(c for c in name.split(":")[-1].split(".")[-1].lower() if c.isalnum())
    return _KNOWN.index(plain) if plain in _KNOWN else zlib.crc32(plain.encode()) % len(_COLORS)


def styles(names: Iterable[str]) -> dict[str, Style]:
    """Return the styles of the optimizers of one page.

    The colour follows from the name alone. The shape does too, unless another optimizer of the page has it:
    no two have the same shape, or from the eleventh on, the same shape and dash.
    """
    found: dict[str, Style] = {}
    free: list[int] = []
    paths = list(SHAPES.values())
    for count, name in enumerate(sorted(set(names), key=lambda name: (place(name), name))):
        free = free or list(range(len(paths)))
        at = place(name)
        shape = at % len(paths) if at % len(paths) in free else free[0]
        free.remove(shape)
        dash = _DASHES[(shape + count // len(paths)) % len(_DASHES)]
        found[name] = Style(*_COLORS[at], paths[shape], dash)
    return found


def config(styles: Mapping[str, Style], mode: Mode) -> dict[str, Any]:
    """Return Vega-Lite's `config` for a theme; the charts themselves name no colour."""
    page = PAGE[mode]
    labels = {"labelColor": page["text"], "labelFontSize": 12}
    titles = {"titleColor": page["text"], "titleFontSize": 12, "titleFontWeight": "normal"}
    lines = {"gridColor": page["line"], "gridOpacity": 0.7, "domainColor": page["muted"]}
    ticks = {"tickColor": page["muted"], "labelOverlap": True, "labelSeparation": 5}
    title = {"color": page["text"], "fontSize": 13, "fontWeight": 600, "anchor": "start", "offset": 8}
    subtitle = {"subtitleColor": page["muted"], "subtitleFontSize": 12}
    return {
        "background": page["background"],
        "font": FONT,
        "range": {"category": [getattr(style, mode) for style in styles.values()]},
        "axis": labels | titles | lines | ticks,
        "legend": {**labels, "symbolSize": 90, "symbolOpacity": 1},
        "title": title | subtitle,
        "text": {"color": page["text"], "fontSize": 12},
        "view": {"stroke": None},
        "point": {"filled": True},
        "style": {
            "frontier": {"color": page["muted"], "strokeWidth": 1.5, "strokeDash": [5, 4]},
            "outline": {"color": page["text"]},
            "empty": {"color": page["raised"]},
        },
    }
