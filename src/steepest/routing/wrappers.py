"""Names of parameters without the parts that wrappers add: DDP, torch.compile, FSDP, checkpointing, PEFT."""

from __future__ import annotations

__all__ = ["spellings", "unwrapped"]

_WRAPPERS = frozenset(
    {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"}
)


def unwrapped(name: str) -> str:
    """Return a parameter's name as the model within its wrappers has it.

    >>> unwrapped("module._orig_mod.layers.0._checkpoint_wrapped_module.fc.weight")
    'layers.0.fc.weight'
    >>> unwrapped("base_model.model.layers.0.q_proj.base_layer.weight")
    'layers.0.q_proj.weight'
    """
    *path, last = name.split(".")
    path = [part for part in path if part not in _WRAPPERS]
    if path[:2] == ["base_model", "model"]:
        path = path[2:]
    return ".".join([*path, last])


def spellings(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return names as they are, and without wrappers, each once."""
    return tuple(dict.fromkeys([*names, *map(unwrapped, names)]))
