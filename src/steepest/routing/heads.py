"""Find the rows of query and key projections that are a head's, for rules with the option ``blocks``."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from steepest.routing.roles import Role
from steepest.routing.tensors import Routed
from steepest.views import is_interleaved, is_transposed

__all__ = ["find_heads"]

_QUERY_OR_KEY = re.compile(
    r"(w_?|to_|linear_)?(q|k|query|key)s?(_?(proj|projection|linear|layer))?(_weight)?", re.IGNORECASE
)
_KEY = re.compile(r"(w_?|to_|linear_)?k", re.IGNORECASE)
# Interleaves query, key and value head by head, as GPT-NeoX and Falcon do.
_INTERLEAVED = re.compile(r"query_key_value", re.IGNORECASE)
_FUSED = re.compile(r"(w_?)?qkv(_?proj)?|c_attn|in_proj", re.IGNORECASE)
_ATTENTION = re.compile(r"att(entio)?n", re.IGNORECASE)
_HEADS = ("num_heads", "n_heads", "n_head", "heads", "nhead", "num_attention_heads")
_KEY_HEADS = ("num_key_value_heads", "n_kv_heads", "num_kv_heads", "kv_heads", "n_query_groups")
_WIDTHS = ("head_dim", "head_size", "attention_head_size", "d_head", "dim_head")


def find_heads(model: nn.Module, tensor: Routed, role: Role) -> tuple[tuple[int, int], ...] | None:
    """Return pairs (number of blocks, rows of each) of a query or key projection, also a fused one; or None.

    Rows are those of the matrix [out, in]. A fused projection's rows are queries, keys, values; each row of
    the values is a block. Attributes of the attention module, or of its ``config``, give the heads; if there
    are none, or they do not fit, this is None.

    >>> from steepest.routing.roles import find_roles
    >>> from steepest.routing.tensors import find_tensors
    >>> model = nn.MultiheadAttention(8, num_heads=2)
    >>> tensor = find_tensors(model)[0]
    >>> find_heads(model, tensor, find_roles(model, [tensor])[0])
    ((4, 4), (8, 1))
    """
    owner, param = tensor.owners[0], tensor.param
    if role.kind not in ("linear", "attention") or param.dim() != 2:
        return None
    rows, columns = param.shape[::-1] if is_transposed(role.view) else param.shape
    parent, _, name = owner.path.rpartition(".")
    if role.kind == "attention":
        module, name = owner.module, owner.local
    else:
        module = model.get_submodule(parent)
    heads, key_heads = _number(module, _HEADS), _number(module, _KEY_HEADS)
    width = _number(module, _WIDTHS)
    if _QUERY_OR_KEY.fullmatch(name):
        count = rows // width if width else (key_heads if key_heads and _KEY.match(name) else heads)
        return ((count, rows // count),) if count and rows % count == 0 else None
    inside = _ATTENTION.search(type(module).__name__) is not None and rows == 3 * columns
    fused = _FUSED.fullmatch(name) or inside or name == "in_proj_weight"
    if not fused or _INTERLEAVED.search(name) or is_interleaved(role.view) or not heads:
        return None
    key_heads = key_heads or heads
    width = width or rows // (heads + 2 * key_heads)
    if (heads + 2 * key_heads) * width != rows:
        return None
    return ((heads + key_heads, width), (key_heads * width, 1))


def _number(module: Any, names: tuple[str, ...]) -> int:
    """Return the first attribute, of the module or its config, that is a positive integer; 0 if none is."""
    for holder in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(holder, name, None)
            if type(value) is int and value > 0:
                return value
    return 0
