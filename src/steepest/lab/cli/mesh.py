"""Device meshes and their layouts, as words on the command line."""

from __future__ import annotations

import re
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


def mesh_options(mesh: str, layout: str | None) -> dict[str, Any]:
    """Return the arguments of `plan` and `plan_sharded` for a mesh such as 8x64 and a layout.

    By default the last mesh dimension cuts rows, and the others replicate.
    """
    from torch.distributed.tensor import Replicate, Shard

    if not re.fullmatch(r"\d{1,9}(x\d{1,9})*", mesh):
        raise LabError(f"bad --mesh {mesh!r}: write its sizes, such as 8 or 8x64")
    sizes = tuple(map(int, mesh.split("x")))
    words = ["replicate"] * (len(sizes) - 1) + ["shard(0)"]
    if layout is not None:
        words = [word.strip().lower() for word in layout.split(",")]
    if len(words) != len(sizes):
        raise LabError(f"--layout has {len(words)} placements for a mesh of {len(sizes)} dimensions")
    placements = []
    for word in words:
        cut = re.fullmatch(r"shard\((\d{1,9})\)", word)
        if word != "replicate" and not cut:
            raise LabError(
                f"bad placement {word!r} in --layout: write replicate or shard(DIM), separated by commas"
            )
        placements.append(Shard(int(cut[1])) if cut else Replicate())
    return {"mesh": sizes, "placements": placements}
