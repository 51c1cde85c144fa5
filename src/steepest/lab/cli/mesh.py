"""Device meshes and their layouts, as words on the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from ..errors import LabError

LayoutOption = Annotated[
    str | None,
    typer.Option(
        metavar="PLACEMENT,…",
        help="replicate or shard(DIM) for each mesh dimension. Default: shard(0) for the last one, replicate "
        "for the others.",
    ),
]
_SHARD = re.compile(r"shard\((\d+)\)")


def parse_mesh(text: str) -> tuple[int, ...]:
    """Return the sizes of a mesh such as 8x64."""
    if not re.fullmatch(r"\d+(x\d+)*", text):
        raise LabError(f"bad --mesh {text!r}: write its sizes, such as 8 or 8x64")
    return tuple(map(int, text.split("x")))


def parse_layout(text: str | None, mesh: Sequence[int]) -> list[str]:
    """Parse a layout; by default the last mesh dimension cuts rows, and the others replicate.

    Example:
        >>> parse_layout("replicate, shard(0)", (8, 64)), parse_layout(None, (8,))
        (['replicate', 'shard(0)'], ['shard(0)'])
    """
    if text is None:
        return ["replicate"] * (len(mesh) - 1) + ["shard(0)"]
    words = [word.strip().lower() for word in text.split(",")]
    for word in words:
        if word != "replicate" and not _SHARD.fullmatch(word):
            raise LabError(
                f"bad placement {word!r} in --layout: write replicate or shard(DIM), separated by commas"
            )
    if len(words) != len(mesh):
        raise LabError(f"--layout has {len(words)} placements for a mesh of {len(mesh)} dimensions")
    return words


def mesh_options(mesh: str, layout: str | None) -> dict[str, Any]:
    """Return the arguments of `plan` and `plan_sharded` that say how parameters lie on a mesh."""
    from torch.distributed.tensor import Replicate, Shard

    sizes = parse_mesh(mesh)
    cuts = [_SHARD.fullmatch(word) for word in parse_layout(layout, sizes)]
    return {"mesh": sizes, "placements": [Replicate() if cut is None else Shard(int(cut[1])) for cut in cuts]}
