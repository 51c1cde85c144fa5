"""Values that a live group may be given between two steps, and those that a step must refuse."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

__all__ = ["INVALID", "VALID"]

VALID: dict[str, st.SearchStrategy[Any]] = {
    "lr": st.sampled_from([0.0, 1e-3, 0.1, 1, torch.tensor(0.01)]),
    "weight_decay": st.sampled_from([0.0, 0.1]),
    "maximize": st.booleans(),
    "nonfinite": st.sampled_from(["ignore", "skip", "raise"]),
    "seed": st.integers(0, 3),
    "compile": st.just(False),
    "somebody_else_s": st.just([1, 2]),
}
_NOT_A_NUMBER = [float("nan"), float("inf"), "0.1", None, True, 1j, [0.1], ...]
# Ellipsis: the key is deleted.
INVALID: dict[str, st.SearchStrategy[Any]] = {
    "lr": st.sampled_from(
        [*_NOT_A_NUMBER, torch.ones(2), torch.tensor(1j), torch.tensor(True), torch.tensor(torch.nan)]
    ),
    "weight_decay": st.sampled_from([*_NOT_A_NUMBER, -0.1, torch.ones(2)]),
    "momentum": st.sampled_from([*_NOT_A_NUMBER, -0.1]),
    "betas": st.sampled_from([0.9, (0.9,), (0.9, 1.0), ("a", "b"), None, ...]),
    "eps": st.sampled_from([*_NOT_A_NUMBER, -1e-8]),
    "maximize": st.sampled_from([2, None, "no", ...]),
    "nonfinite": st.sampled_from(["skipped", None, True, ["skip"], ...]),
    "rounding": st.sampled_from(["up", None, ...]),
    "state_dtype": st.sampled_from(["float32", torch.int32, 4, ...]),
    "weight_decay_method": st.sampled_from(["L2", None, ["l2"], ...]),
    "seed": st.sampled_from([-1, 1.5, None, 2**64, ...]),
    "rule": st.sampled_from(["lionn", None, ["lion"], ...]),
    "base_lr": st.sampled_from([*_NOT_A_NUMBER, -1.0]),
    "params": st.sampled_from([None, 3, ...]),
    "param_names": st.sampled_from([3, [3, 4], "name"]),
}
