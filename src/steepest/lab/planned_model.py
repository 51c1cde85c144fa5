"""The models that the command line plans for: by name, from a file, or made by the user's function."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch
from torch import nn

from .bench.shapes import PLANNED_MODELS, planned_shapes
from .errors import LabError
from .plan_sharded import Shapes, read_shapes


def load_shapes(text: str) -> Shapes:
    """Return names and shapes of a model that is known by name, or of the tensors that a file lists.

    Raises:
        LabError: neither is there, or the file cannot be read.

    Example:
        >>> load_shapes("gpt2-124m")[0]
        ('wte.weight', (50257, 768))
    """
    if text in PLANNED_MODELS:
        return [(tensor.name, tensor.shape) for tensor in planned_shapes(text).tensors]
    if not Path(text).exists():
        raise LabError(f"{text!r} is neither a file nor one of {', '.join(PLANNED_MODELS)}")
    return read_shapes(Path(text))


def make_model(text: str) -> nn.Module:
    """Call a function given as ``package.module:factory`` on the meta device, and return its model.

    The working directory is searched first, as by ``python -m``.

    Raises:
        LabError: there is no such function, it raised, or it returned no module.

    Example:
        >>> make_model("torch.nn:Identity")
        Identity()
    """
    path, _, name = text.partition(":")
    if not path or not name:
        raise LabError(f"no factory {text!r}: give package.module:factory")
    sys.path.insert(0, "")
    try:
        factory = importlib.import_module(path)
        for part in name.split("."):
            factory = getattr(factory, part)
        with torch.device("meta"):
            model = factory()  # type: ignore[operator]
    except Exception as error:
        raise LabError(f"{text} cannot make a model: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove("")
    if not isinstance(model, nn.Module):
        raise LabError(f"{text} returned {type(model).__name__}, not a torch.nn.Module")
    return model
