"""Names of parameters without the parts that wrappers add: DDP, torch.compile, FSDP, checkpointing, PEFT."""

from __future__ import annotations

import re

__all__ = ["spellings", "unwrapped"]

_WRAPPERS = frozenset(
    {
        "module",
        "_orig_mod",
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
        "base_layer",
        "original_module",
    }
)
# PEFT holds one trained copy of a module, and one pair of factors, for each adapter, under its name.
_COPY = re.compile(r"(?<![^.])modules_to_save\.[^.]+\.")
_FACTOR = re.compile(r"(?<![^.])(lora_(?:[AB]|magnitude_vector)(?=\.[^.]+\.)|lora_embedding_[AB])\.[^.]+")


def unwrapped(name: str) -> str:
    """Return a parameter's name as the model within its wrappers has it.

    >>> unwrapped("module._orig_mod.layers.0._checkpoint_wrapped_module.fc.weight")
    'layers.0.fc.weight'
    >>> unwrapped("base_model.model.layers.0.q_proj.base_layer.weight")
    'layers.0.q_proj.weight'
    >>> unwrapped("base_model.model.lm_head.modules_to_save.default.weight")
    'lm_head.weight'
    >>> unwrapped("base_model.model.layers.0.q_proj.lora_A.default.weight")
    'layers.0.q_proj.lora_A.weight'
    """
    *path, last = _FACTOR.sub(r"\1", _COPY.sub("", name)).split(".")
    path = [part for part in path if part not in _WRAPPERS]
    if path[:2] == ["base_model", "model"]:
        path = path[2:]
    return ".".join([*path, last])


def spellings(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return names as they are, and without wrappers, each once."""
    return tuple(dict.fromkeys([*names, *map(unwrapped, names)]))
