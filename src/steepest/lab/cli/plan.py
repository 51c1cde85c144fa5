"""`steepest plan`: the bytes that training a model takes, under one or several optimizers."""

from __future__ import annotations

import pprint
from typing import Annotated, Any

import typer

import steepest

from ..defaults import DTYPES
from ..errors import LabError
from .completion import complete_optimizers
from .mesh import LayoutOption, mesh_options
from .options import DtypeOption, ModelOption, parse_dtype, split_names

_STATES = "|".join([*DTYPES, "int8"])


def plan_command(
    model: ModelOption,
    optimizers: Annotated[
        str,
        typer.Option(
            metavar="NAME,NAME,…",
            help="Optimizers to compare; with --budget in order of preference.",
            autocompletion=complete_optimizers,
        ),
    ] = "adamw, lion, muon",
    dtype: DtypeOption = None,
    state_dtype: Annotated[
        str | None,
        typer.Option(metavar=_STATES, help="Dtype of the optimizer state. Default: the parameters' dtype."),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="least", help="As in steepest.build: store the state in the fewest bytes."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Find the first of the optimizers, and a format for its state, that fits into, say, 22GB.",
        ),
    ] = None,
    mesh: Annotated[
        str | None,
        typer.Option(metavar="SIZExSIZE…", help="Plan for one rank of a device mesh, such as 8x64."),
    ] = None,
    layout: LayoutOption = None,
    rank: Annotated[int, typer.Option(help="The rank to plan for, with --mesh.")] = 0,
    device: Annotated[str, typer.Option(help="Device that the model will be trained on.")] = "cpu",
) -> int:
    """Plan the memory of training: the exact bytes of state, and a bound on a step's temporaries.

    Nothing is allocated. With several optimizers you get a comparison, with one a list of its tensors.
    """
    from ..bench.models import meta_model

    if layout is not None and mesh is None:
        raise LabError("--layout needs --mesh")
    names = split_names(optimizers)
    options: dict[str, Any] = {"rank": rank, "device": device}
    if mesh is not None:
        options |= mesh_options(mesh, layout)
    if state_dtype is not None:
        options["state_dtype"] = "int8" if state_dtype == "int8" else parse_dtype(state_dtype, "int8")
    if memory is not None:
        options["memory"] = memory
    try:
        planned = meta_model(model, None if dtype is None else parse_dtype(dtype))
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
