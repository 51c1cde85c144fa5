"""`steepest plan`: the bytes that training a model takes, under one or several optimizers."""

from __future__ import annotations

import pprint
from typing import Annotated, Any

import typer

import steepest

from ..bench.shapes import MODELS
from ..defaults import DTYPES
from ..errors import LabError
from .completion import complete_models, complete_optimizers
from .mesh import LayoutOption, mesh_options
from .options import DtypeOption, parse_dtype, split_names

_STATES = "|".join([*DTYPES, "int8"])


def plan_command(
    shapes: Annotated[
        str | None,
        typer.Option(
            help=f"A model by its shapes: {', '.join(MODELS)}; or a file of names and shapes, JSON "
            "({name: [rows, columns]}) or CSV (name,ROWSxCOLUMNS).",
            autocompletion=complete_models,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PACKAGE.MODULE:FACTORY",
            help="Instead, a function that returns the model; it is called on the meta device if it can be.",
        ),
    ] = None,
    optimizers: Annotated[
        str,
        typer.Option(
            help="Optimizers to compare; with --budget from the best to the last resort.",
            autocompletion=complete_optimizers,
        ),
    ] = "adamw,lion,muon",
    dtype: DtypeOption = None,
    state_dtype: Annotated[
        str | None,
        typer.Option(metavar=_STATES, help="How state is stored. Default: as parameters."),
    ] = None,
    memory: Annotated[str | None, typer.Option(metavar="least", help="build()'s memory.")] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Choose among the optimizers, and among formats of the state, what fits into e.g. 22GB.",
        ),
    ] = None,
    mesh: Annotated[
        str | None,
        typer.Option(metavar="SIZExSIZE…", help="Plan for a rank of a device mesh."),
    ] = None,
    layout: LayoutOption = None,
    rank: Annotated[int, typer.Option(help="The rank to plan for.")] = 0,
    device: Annotated[str, typer.Option(help="Where the model will be trained.")] = "cpu",
) -> int:
    """Plan the memory of training: state to the byte, and a bound on the temporaries of a step.

    Nothing is allocated. Several optimizers are compared; for a single one, the tensors are listed.
    """
    from ..bench.models import make_model, meta_model

    if (shapes is None) == (model is None):
        raise LabError("give --shapes or --model")
    if layout is not None and mesh is None:
        raise LabError("--layout needs --mesh")
    names = split_names(optimizers)
    options: dict[str, Any] = {"rank": rank, "device": device}
    if mesh is not None:
        options |= mesh_options(mesh, layout)
    if state_dtype is not None:
        options["state_dtype"] = "int8" if state_dtype == "int8" else parse_dtype(state_dtype)
    if memory is not None:
        options["memory"] = memory
    wide = None if dtype is None else parse_dtype(dtype)
    planned = meta_model(shapes, wide) if shapes is not None else make_model(str(model)).to(wide)
    try:
        if budget is not None:
            found = steepest.plan(planned, rules=names, budget=budget, **options)
            print(found)
            arguments = pprint.pformat(dict(found.arguments), width=110, sort_dicts=False)
            print(f"steepest.build(model, **{arguments})")
        elif len(names) == 1:
            print(steepest.plan(planned, names[0], **options))
        else:
            print(steepest.compare_plans(planned, names, **options))
    except (ValueError, TypeError, RuntimeError) as error:
        raise LabError(str(error)) from error
    return 0
