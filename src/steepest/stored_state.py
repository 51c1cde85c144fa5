"""Formats of saved state, codes or floats, with or without corrections: check them, convert to this run's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steepest.distributed.local import is_dtensor, local_part
from steepest.engine.layout import real_view
from steepest.engine.state import STEP
from steepest.engine.storage import CORRECTION, SCALE
from steepest.formats.blocks import block_size
from steepest.formats.int8 import DTYPES
from steepest.formats.load import block_of, convert_correction, decode, encode, reblock
from steepest.formats.master import CORRECTIONS
from steepest.hyperparameters import is_int8
from steepest.rule import STATE_FORMAT, VERSION, Group, StateSpec, find_rule

__all__ = [
    "check_filled",
    "check_state_format",
    "check_state_numbers",
    "check_stored",
    "check_structure",
    "convert_stored",
    "is_beside",
    "keep_formats",
]


def check_structure(loaded: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for a state dict that is not built as :meth:`Optimizer.state_dict` builds it."""
    groups, states = loaded.get("param_groups"), loaded.get("state")
    keys = (int, str)
    if not isinstance(groups, Sequence) or not all(
        isinstance(group, Mapping)
        and isinstance(group.get("params"), Sequence)
        and all(isinstance(key, keys) for key in group["params"])
        for group in groups
    ):
        raise ValueError(
            "param_groups of the state dict must be a list of dicts, each with a list of numbers as params; "
            "nothing was loaded"
        )
    if not isinstance(states, Mapping) or not all(
        isinstance(state, Mapping) and all(isinstance(name, str) for name in state)
        for state in states.values()
    ):
        raise ValueError("state of the state dict must be a dict of dicts by name; nothing was loaded")


def is_beside(name: str, state: Mapping[str, Any]) -> bool:
    """Return whether an entry is a correction, or the scales of another entry of this state."""
    return name == CORRECTION or (name.endswith(SCALE) and name.removesuffix(SCALE) in state)


def check_state_format(index: int, saved: Group) -> None:
    """Raise ``ValueError`` for a group that a later version of this library saved."""
    version = saved.get(STATE_FORMAT, VERSION)
    if version != VERSION:
        raise ValueError(
            f"group {index} of the state dict has {STATE_FORMAT} {version!r}; this version of steepest "
            f"knows {VERSION}"
        )


def keep_formats(ours: Group, loaded: dict[str, Any]) -> None:
    """Set the options of a loaded group that stay this run's: where state lies, and in which format.

    Float dtypes stay the checkpoint's, unless it is coded and this run is not.
    """
    loaded["state_device"], loaded["master"] = ours["state_device"], ours["master"]
    if is_int8(ours["state_dtype"]) or is_int8(loaded.get("state_dtype")):
        loaded["state_dtype"] = ours["state_dtype"]


def check_stored(
    who: str, param: Tensor, group: Group, saved: Mapping[str, Any], expected: Mapping[str, Tensor]
) -> None:
    """Raise ``ValueError`` for codes, scales and corrections that :func:`convert_stored` could not convert.

    Args:
        who: the parameter, for messages.
        param, group: the parameter, and its group with the options that it is about to have.
        saved: its state in the state dict.
        expected: its state with these options, of which only dtypes and shapes count.
    """
    for name, value in saved.items():
        if isinstance(value, Tensor) and (
            value.layout is not torch.strided or (value.is_meta and not param.is_meta)
        ):
            what = "no data" if value.is_meta else f"layout {value.layout}"
            raise ValueError(f"state {name!r} of {who} has {what} in the state dict")
    specs = find_rule(group["rule"]).state_specs(group)
    for name in specs:
        if name + SCALE in saved and name not in saved:
            raise ValueError(f"the state of {who} has {name + SCALE!r} but no {name!r}")
    for name, codes in saved.items():
        if is_beside(name, saved):
            continue
        kind = specs[name].range if name in specs else None
        scale = saved.get(name + SCALE)
        if scale is None:
            if kind is not None and isinstance(codes, Tensor) and codes.dtype in DTYPES.values():
                raise ValueError(
                    f"state {name!r} of {who} has codes of {codes.dtype} but not the scales "
                    f"{name + SCALE!r}, which decoding needs"
                )
            continue
        if name in specs and kind is None:
            raise ValueError(f"the state of {who} has {name + SCALE!r}, but {name!r} is never coded")
        dtypes = DTYPES.values() if kind is None else [DTYPES[kind]]
        if not (isinstance(codes, Tensor) and codes.dtype in dtypes):
            has = f"dtype {codes.dtype}" if isinstance(codes, Tensor) else f"type {type(codes).__name__}"
            raise ValueError(
                f"state {name!r} of {who} has scales and {has} in the state dict; its codes are "
                f"{' or '.join(map(str, dtypes))}"
            )
        if name in expected and codes.shape != expected[name].shape:
            continue  # which is an error with or without scales
        if is_dtensor(codes) != is_dtensor(scale):
            raise ValueError(
                f"state {name!r} of {who} and its scales must both be DTensors in the state dict, or neither"
            )
        try:
            if not isinstance(scale, Tensor):
                raise ValueError(f"scales are a tensor, not a {type(scale).__name__}")
            block_of(codes, scale)
        except ValueError as error:
            raise ValueError(f"state {name + SCALE!r} of {who}: {error}") from None
    if CORRECTION in saved:
        correction, shape = saved[CORRECTION], real_view(param).shape
        if not isinstance(correction, Tensor):
            differs = f"is a {type(correction).__name__}"
        elif correction.dtype not in CORRECTIONS.values():
            differs = f"has dtype {correction.dtype}, which is neither torch.int8 nor torch.int16,"
        elif correction.shape != shape:
            differs = f"has shape {tuple(correction.shape)}, the parameter {tuple(shape)},"
        else:
            return
        raise ValueError(f"state {CORRECTION!r} of {who} {differs} in the state dict")


def check_state_numbers(who: str, saved: Mapping[str, Any], specs: Mapping[str, StateSpec]) -> None:
    """Raise ``ValueError`` for numbers that no step could have left, where a spec says what they may be."""
    for name, spec in {**specs, "step": STEP}.items():
        value = saved.get(name)
        # A DTensor's numbers lie on other processes.
        if spec.numbers is not None and value is not None and not is_dtensor(value):
            for number in value.flatten().tolist() if isinstance(value, Tensor) else [value]:
                spec.numbers.check(f"the state of {who}", name, number)


def check_filled(who: str, group: Group, saved_group: Group, saved: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for codes that torch.distributed.checkpoint put into floats, without scales.

    It fills the entries that the loading optimizer has, and casts to their dtypes, so that only the values
    show what they are.
    """
    if not is_int8(saved_group.get("state_dtype")):
        return
    for name, spec in find_rule(group["rule"]).state_specs(group).items():
        value = saved.get(name)
        if spec.range is None or name + SCALE in saved or not isinstance(value, Tensor):
            continue
        if not value.is_floating_point() or block_size(value.shape) is None:
            continue
        nonzero, others = _count_codes(value)
        if nonzero > 0 and others == 0:
            raise ValueError(
                f"state {name!r} of {who} holds one-byte codes without their scales: it was saved with "
                "state_dtype='int8', and torch.distributed.checkpoint gives an optimizer only what its own "
                "state dict asks for. Load it into one with state_dtype='int8' that is sharded so that its "
                "blocks stay whole, and load that one's state_dict() here"
            )


def _count_codes(value: Tensor) -> list[int]:
    """Count the elements that are not 0, and those that no code could be; for a DTensor, in all shards."""
    own = local_part(value) if is_dtensor(value) else value
    is_code = (own == own.round()) & (own.abs() <= 255)
    counts = torch.stack([own.count_nonzero(), (~is_code).count_nonzero()])
    if is_dtensor(value):
        from torch.distributed.tensor import DTensor, Partial

        mesh = value.device_mesh
        # All processes must say the same.
        counts = DTensor.from_local(counts, mesh, [Partial()] * mesh.ndim, run_check=False).full_tensor()
    return counts.tolist()


def convert_stored(
    param: Tensor, group: Group, saved: Mapping[str, Any], expected: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Return a parameter's saved state in the formats of this run; entries that have them are not copied.

    ============================ ================= ==============================================
    saved                        here              result
    ============================ ================= ==============================================
    floats                       codes             encoded; nonnegative ones to nearest, at least 1
    codes                        floats            decoded to float32, then the dtype of this run
    codes with another block     codes             decoded and encoded
    a correction                 no master         without
    none, or of another width    a master          zeros; rounded to int8, or exact in int16
    ============================ ================= ==============================================

    Args:
        param, group, saved, expected: as :func:`check_stored` has accepted them.
    """
    state = {name: value for name, value in saved.items() if not is_beside(name, saved)}
    rule = find_rule(group["rule"])
    takes, specs = rule.takes, rule.state_specs(group)
    coded = any(name + SCALE in expected for name in expected)
    for name in list(state):
        scale, new_scale = saved.get(name + SCALE), expected.get(name + SCALE)
        if name not in expected:
            # The present options do not ask for it. Should they later, it would have to be stored as all is.
            if scale is not None or (coded and name in takes):
                del state[name]
        elif new_scale is not None:
            block = block_of(expected[name], new_scale)
            if scale is None:
                nonnegative = expected[name].dtype == DTYPES["nonnegative"]
                coded_now = encode(state[name].detach(), block, nonnegative=nonnegative)
            else:
                coded_now = reblock(state[name].detach(), scale.detach(), block)
            state[name], state[name + SCALE] = coded_now
        elif scale is None:
            if is_int8(group["state_dtype"]) and name in specs and specs[name].range is not None:
                # What is not coded has float32, whatever the checkpoint has.
                state[name] = state[name].detach().to(expected[name].dtype)
        else:
            numbers, blank = decode(state[name].detach(), scale.detach()), expected[name]
            if is_dtensor(blank):
                state[name] = numbers.to(blank.dtype)
            else:  # with the parameter's strides
                state[name] = torch.empty_like(blank, device=numbers.device).copy_(numbers)
    if CORRECTION in expected and saved:
        correction, width = saved.get(CORRECTION), expected[CORRECTION].dtype
        if correction is None or correction.dtype != width:
            correction = convert_correction(correction, real_view(param), width)
        state[CORRECTION] = correction
    return state
