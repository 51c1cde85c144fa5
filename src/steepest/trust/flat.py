"""State dicts as safetensors and its like want them: tensors by name, and the rest as text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["flatten_state_dict", "unflatten_state_dict"]

_KEY = "state_dict"


def flatten_state_dict(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split a state dict into a flat dict of tensors and JSON metadata, as ``safetensors`` stores them.

    The tensors are detached, contiguous, on the device where they were, and named after their place.

    Args:
        state_dict: of any torch optimizer, scheduler or module: dicts, lists and tuples of tensors, dtypes,
            numbers, strings and None.

    Returns:
        The tensors by name, and a dict with one JSON text, from which and the tensors
        :func:`unflatten_state_dict` makes the state dict again.

    Raises:
        TypeError: a value of another type, by its name.
        ValueError: two tensors would have one name, as those at ``1`` and ``"1"``, or at ``"a.b"`` and within
            ``"a"``.

    >>> import steepest
    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = steepest.Lion([weight])
    >>> weight.grad = torch.ones(2)
    >>> optimizer.step()
    >>> tensors, metadata = flatten_state_dict(optimizer.state_dict())
    >>> sorted(tensors)  # safetensors.torch.save_file(tensors, path, metadata)
    ['state.0.exp_avg']
    >>> optimizer.load_state_dict(unflatten_state_dict(tensors, metadata))
    """
    tensors: dict[str, Tensor] = {}
    return tensors, {_KEY: json.dumps(_encoded(state_dict, "", tensors))}


def unflatten_state_dict(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the state dict that :func:`flatten_state_dict` has split; it has the tensors themselves.

    Raises:
        ValueError: the metadata is not that of a state dict; a tensor is missing, or is none of it, by name.
    """
    if _KEY not in metadata:
        raise ValueError(f"the metadata has no {_KEY!r}: it is not what flatten_state_dict returned")
    try:
        encoded = json.loads(metadata[_KEY])
    except ValueError as error:
        raise ValueError(f"the {_KEY!r} of the metadata is not JSON: {error}") from error
    left = dict(tensors)
    state_dict = _decoded(encoded, left)
    if not isinstance(state_dict, dict):
        raise ValueError(f"the {_KEY!r} of the metadata is not a dict: flatten_state_dict did not write it")
    if left:
        raise ValueError(f"tensors that the state dict does not have: {', '.join(map(repr, sorted(left)))}")
    return state_dict


def _encoded(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return a value for JSON: what JSON does not have, as a dict of its kind."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        if name in tensors:
            raise ValueError(f"two tensors of the state dict would have the name {name!r}: rename a key")
        tensors[name] = value.detach().contiguous()
        return {"tensor": name}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    within = name + "." if name else ""
    if isinstance(value, Mapping):
        items = [[key, _encoded(each, f"{within}{key}", tensors)] for key, each in value.items()]
        if all(isinstance(key, (int, str)) for key in value):
            return {"dict": items}  # JSON would make strings of integers
    elif isinstance(value, (list, tuple)):
        items = [_encoded(each, f"{within}{index}", tensors) for index, each in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    raise TypeError(
        f"{name!r} of the state dict is {value!r}, which cannot be written as a tensor or as JSON"
    )


def _decoded(value: Any, left: dict[str, Tensor]) -> Any:
    """Return the value, whose tensors are taken out of those that are left."""
    if isinstance(value, list):
        return [_decoded(each, left) for each in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "dict":
        return {key: _decoded(each, left) for key, each in content}
    if kind == "tuple":
        return tuple(_decoded(each, left) for each in content)
    if kind == "dtype":
        if not isinstance(dtype := getattr(torch, content, None), torch.dtype):
            raise ValueError(f"the dtype {content!r} of the state dict is not a torch dtype")
        return dtype
    if kind != "tensor":
        raise ValueError(f"the state dict has a {kind!r}, which flatten_state_dict does not write")
    if content not in left:
        raise ValueError(f"the tensor {content!r} of the state dict is missing")
    return left.pop(content)
