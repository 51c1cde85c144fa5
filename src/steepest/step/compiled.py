"""One compiled graph over all of a batch's tensors: each is read once and written once."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steepest.step.collect import Batch
from steepest.step.element import Recipe, advance, member_key, shared_scalars, store

__all__ = ["compiler_available", "pays", "run_compiled", "warn_no_compiler", "warn_not_compiled"]

# Compiling takes seconds; below this many elements a step is so short that it would not earn them back.
_PAYS_FROM = 1 << 24

Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class GraphSpec:
    """What one graph is made for: two batches with equal specs share it.

    ``shared`` holds (name, how many numbers; 0 for a plain scalar), ``own`` the per-parameter scalars'
    names, ``layouts`` (shape, strides, dtype) of parameter, gradient and state for each member.
    """

    recipe: Recipe
    shared: tuple[tuple[str, int], ...]
    own: tuple[str, ...]
    state: tuple[str, ...]
    layouts: tuple[tuple[Layout, ...], ...]
    device: torch.device
    guarded: bool


@functools.cache
def compiler_available(device_type: str) -> bool:
    """Whether torch.compile can make code for this device here: a C++ compiler, or Triton."""
    if device_type == "cpu":
        return any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++", "cl") if name)
    return device_type in ("cuda", "xpu") and importlib.util.find_spec("triton") is not None


@functools.cache
def warn_no_compiler(device_type: str) -> None:
    """Say once that ``compile=True`` cannot be had."""
    warnings.warn(
        f"compile=True, but there is no compiler for {device_type!r} here; running eagerly",
        RuntimeWarning,
        stacklevel=4,
    )


@functools.cache
def warn_not_compiled(rule: str) -> None:
    """Say once that ``compile=True`` has no effect on a matrix rule."""
    warnings.warn(
        f"compile=True has no effect on {rule!r}: matrix rules run eagerly, their time is in matmuls",
        RuntimeWarning,
        stacklevel=5,
    )


def pays(batch: Batch) -> bool:
    """Whether compiling this batch earns back its seconds."""
    return sum(member.param.numel() for member in batch.members) >= _PAYS_FROM


def run_compiled(batch: Batch, finite: Tensor | None) -> bool:
    """Step every member of a batch in one graph; False, with nothing changed, if it cannot be compiled."""
    shared = shared_scalars(batch)
    first = batch.members[0]
    recipe = Recipe.of(batch, keep_decay=True)
    names = tuple(batch.element_state)
    rows = [[flat(t) for t in (m.param, m.grad, *(m.state[name] for name in names))] for m in batch.members]
    spec = GraphSpec(
        recipe,
        tuple(
            (name, len(value) if isinstance(value, (tuple, list)) else 0) for name, value in shared.items()
        ),
        tuple(sorted(first.scalars)),
        names,
        tuple(tuple((tuple(t.shape), t.stride(), t.dtype) for t in row) for row in rows),
        batch.device,
        finite is not None,
    )
    numbers = [n for v in shared.values() for n in (v if isinstance(v, (tuple, list)) else (v,))]
    own = [[member.scalars[name] for name in spec.own] for member in batch.members]
    keys = [list(member_key(batch, member)) for member in batch.members] if recipe.noisy else []
    if spec in _broken:
        return False
    inputs = (
        rows,
        _pack([numbers], torch.float64, batch.device)[0],
        _pack(own, torch.float64, batch.device),
        _pack(keys, torch.int64, batch.device),
        finite,
    )
    if spec in _proven:
        _compile(spec)(*inputs)
        return True
    try:
        _compile(spec)(*inputs)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, OSError) as error:
        # A first call fails in compiling (no cache folder, a compiler that does not work, a Python that
        # torch cannot trace), before anything is written.
        _give_up(spec, error)
        return False
    _proven.add(spec)
    return True


def flat(tensor: Tensor) -> Tensor:
    """One dimension where the layout allows it, so that equal sizes make equal code."""
    return tensor.view(-1) if tensor.is_contiguous() else tensor


def _pack(rows: list[list[Any]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers, or 0-dim tensors of a device, as one tensor there."""
    if any(isinstance(value, Tensor) for row in rows for value in row):
        stacked = [torch.stack([torch.as_tensor(v, dtype=dtype, device=device) for v in row]) for row in rows]
        return torch.stack(stacked)
    return torch.tensor(rows, dtype=dtype, device="cpu").to(device, non_blocking=True)


_broken: set[GraphSpec] = set()
_proven: set[GraphSpec] = set()


def _give_up(spec: GraphSpec, error: Exception) -> None:
    _broken.add(spec)
    why = (str(error).strip() or repr(error)).splitlines()[0]
    warnings.warn(
        f"steepest runs {spec.recipe.rule.name!r} without compilation: {why}",
        RuntimeWarning,
        stacklevel=2,
    )


@functools.lru_cache(maxsize=64)
def _compile(spec: GraphSpec) -> Callable[..., None]:
    def graph(
        rows: list[list[Tensor]], numbers: Tensor, own: Tensor, keys: Tensor, finite: Tensor | None
    ) -> None:
        shared: dict[str, Any] = {}
        at = 0
        for name, count in spec.shared:
            shared[name] = numbers[at] if count == 0 else tuple(numbers[at + i] for i in range(count))
            at += max(count, 1)
        for i, (param, grad, *entries) in enumerate(rows):
            scalars = shared | {name: own[i, j] for j, name in enumerate(spec.own)}
            state = dict(zip(spec.state, entries, strict=True))
            key = (keys[i, 0], keys[i, 1]) if spec.recipe.noisy else None

            def index(param: Tensor = param) -> Tensor:
                return torch.arange(param.numel(), device=param.device).view(param.shape)

            stepped, new = advance(spec.recipe, param, grad, state, scalars, key, index)
            store(param, stepped, finite)
            for name, value in new.items():
                store(state[name], value, finite)

    # torch.compile caches, and limits recompilation, per code object: one of its own for each graph
    # keeps optimizers from exhausting one another's limit.
    fresh = types.FunctionType(
        graph.__code__.replace(), graph.__globals__, graph.__name__, graph.__defaults__, graph.__closure__
    )
    return torch.compile(fresh, fullgraph=True, dynamic=False)
