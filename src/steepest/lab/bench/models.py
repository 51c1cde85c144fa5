"""The models of `bench` and `plan`: known by name, listed in a file, or made by the user's function."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable

import torch
from torch import nn

from steepest.model_shapes import MODELS, model_shapes
from steepest.planning.shapes import model_of

from ..errors import LabError
from ..files import parse_path
from ..training.optimizers import load_factory

Shapes = list[tuple[str, tuple[int, ...]]]
"""Names and shapes of a model's parameters."""


def meta_model(text: str, dtype: torch.dtype | None = None) -> nn.Module:
    """Return a model by name, from a file (see `find_shapes`) or from `package.module:factory`.

    It is on the meta device if possible, with parameters of `dtype` (default: float32, or the factory's own).

    Raises:
        LabError: there is no such model.

    Example:
        >>> meta_model("tiny").wte.weight.shape, meta_model("torch.nn:Identity")
        (torch.Size([128, 32]), Identity())
    """
    if ":" in text:
        return make_model(text).to(dtype)
    return model_of(find_shapes(text), dtype or torch.float32)


def find_shapes(text: str) -> Shapes:
    """Return the shapes of one of `MODELS`, or of a file: JSON ({name: [rows, columns]}) or CSV.

    A line of the CSV is name,ROWSxCOLUMNS.

    Raises:
        LabError: there is neither, or the file cannot be read.
    """
    if text in MODELS:
        return [(tensor.name, tensor.shape) for tensor in model_shapes(text).tensors]
    file = parse_path(text)
    if not file.exists():
        raise LabError(f"{text!r} is neither a file nor one of {', '.join(MODELS)}")
    try:
        content = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            listed = json.loads(content)
            pairs = listed.items() if isinstance(listed, dict) else listed
            return [(str(name), tuple(map(int, shape))) for name, shape in pairs]
        rows = [row for row in csv.reader(content.splitlines()) if row]
        return [(name, tuple(map(int, shape.split("x")))) for name, shape in rows if shape != "shape"]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise LabError(
            f"cannot read {file} as JSON ({{name: [rows, columns]}}) or CSV (name,ROWSxCOLUMNS): {error}"
        ) from error


def make_model(text: str) -> nn.Module:
    """Call a function given as `package.module:factory`, on the meta device if it can, and return its model.

    The working directory is searched first, as by `python -m`.

    Raises:
        LabError: there is no such function, it raised, or it returned no module.
    """
    factory: Callable[[], object] = load_factory(text)
    try:
        try:
            with torch.device("meta"):
                model = factory()
        except Exception:  # for example, the factory loads weights from a file
            model = factory()
    except Exception as error:
        raise LabError(f"{text} cannot make a model: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise LabError(f"{text} returned {type(model).__name__}, not a torch.nn.Module")
    return model
