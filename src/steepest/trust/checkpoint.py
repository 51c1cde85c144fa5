"""Checkpoints that a crash cannot lose: the last good one is kept until the next is whole."""

from __future__ import annotations

import copy
import io
import os
import pickle
import random
import re
import secrets
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_crc32_options, set_crc32_options
from torch.utils._pytree import keystr, tree_leaves_with_path, tree_map_only

from steepest.distributed.local import is_dtensor

__all__ = ["generator_states", "load_checkpoint", "save_checkpoint", "set_generators"]

_FORMAT = "steepest.save_checkpoint"
_VERSION = 1
_SHOWN = 5


def save_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: torch.nn.Module | Mapping[str, Any] | None = None,
    optimizer: torch.optim.Optimizer | Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    rng: bool = True,
) -> None:
    """Write a checkpoint so that there is a loadable one at every moment, even if the process is killed.

    The new file is written beside ``path`` and flushed to the disk. Then the present one is renamed to
    ``path`` + ``".previous"``, and the new one to ``path``. If saving raises, the present file stays, and
    nothing is left of the new one. What a killed process has left, the next call removes.

    One process, and of it one thread at a time, saves to a path: another would remove the file that this one
    is writing. Tensors must be whole; torch.distributed.checkpoint saves shards.

    Args:
        path: the file, in a directory that exists; or a symbolic link to one, which stays.
        model: saved by its ``state_dict()``; or a state dict.
        optimizer: any torch optimizer, by its ``state_dict()``; or a state dict.
        extra: whatever else training goes on from, by name. Objects with a ``state_dict()`` (schedulers, a
            ``GradScaler``, samplers) are saved by it; the rest is plain data: numbers, strings, tensors,
            dtypes, and lists, tuples and dicts of those.
        rng: also save the state of torch's generators, CPU and CUDA, and of Python's ``random``, from which
            dropout and shuffling go on.

    Raises:
        TypeError: ``extra`` is no dict.
        ValueError: a value that ``torch.load(weights_only=True)`` would refuse, or a DTensor, by name.
        OSError: the file could not be written.

    >>> import tempfile, steepest
    >>> model = torch.nn.Linear(2, 2)
    >>> optimizer = steepest.Lion(model.parameters())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_checkpoint(folder + "/run.pt", model=model, optimizer=optimizer, extra={"step": 7})
    ...     load_checkpoint(folder + "/run.pt", model=model, optimizer=optimizer)
    {'step': 7}
    """
    _check_extra(extra)
    path = Path(path).resolve()
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; save_checkpoint writes a file")
    content: dict[str, Any] = {"format": _FORMAT, "version": _VERSION}
    parts = {"model": model, "optimizer": optimizer}
    for name, value in {name: value for name, value in parts.items() if value is not None}.items():
        content[name] = _packed(name, value)
    content["extra"] = {name: _packed(f"extra[{name!r}]", value) for name, value in (extra or {}).items()}
    if rng:
        content["rng"] = generator_states()
    leftover = re.compile(re.escape(path.name) + r"\.[0-9a-f]{8}\.tmp")
    for each in path.parent.iterdir():
        if leftover.fullmatch(each.name):
            each.unlink(missing_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        _write(temporary, content)
        # A damaged file must not take the place of the last good one.
        if zipfile.is_zipfile(path):
            path.replace(_previous(path))
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush_directory(path.parent)


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: torch.nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    extra: Mapping[str, Any] | None = None,
    rng: bool = True,
) -> dict[str, Any]:
    """Load what :func:`save_checkpoint` wrote, all of it or nothing.

    If the file is missing or damaged (its checksums are compared), this warns and loads the one before it.

    Args:
        path: the file.
        model: takes the checkpoint's tensors. Names, shapes and dtypes must be the same.
        optimizer: takes the checkpoint's state; without one, it is left alone. Those of this library compare
            rule, entries, shapes, and floats with integers; float state keeps the checkpoint's dtype, and a
            parameter may have no state at all, as before its first step. ``torch.optim``'s compare only the
            numbers of groups and parameters, and take state of any shape.
        extra: the objects with a ``load_state_dict()`` among the ``extra`` that was saved, by name. What they
            check is theirs.
        rng: together with an optimizer, also set the generators to the states that were saved, if they were.

    Returns:
        The ``extra`` that no object has taken: plain data, and state dicts. Tensors are on the CPU.

    Raises:
        TypeError: ``model``, ``optimizer`` or one of ``extra`` has no ``load_state_dict()``.
        FileNotFoundError: there is neither the file nor the one before it.
        ValueError: both are damaged; the file is no such checkpoint, or a later version's, or lacks a part;
            the model or the optimizer does not fit. Nothing was loaded, unless the message names an object
            that also refused the state it had before.
    """
    _check_extra(extra)
    parts = {"model": model, "optimizer": optimizer}
    takers: dict[str, Any] = {name: taker for name, taker in parts.items() if taker is not None}
    # The model goes first: an optimizer may look at the values of its parameters.
    takers |= {f"extra[{name!r}]": taker for name, taker in (extra or {}).items()}
    for name, taker in takers.items():
        if not (hasattr(taker, "state_dict") and hasattr(taker, "load_state_dict")):
            raise TypeError(
                f"{name} is of type {type(taker).__name__}, which has no load_state_dict(): leave plain "
                "data out, load_checkpoint returns it. Nothing was loaded"
            )
    path = Path(path).resolve()
    content = _newest(path)
    states = {name: content[name] for name in parts if name in content}
    states |= {f"extra[{name!r}]": state for name, state in content["extra"].items()}
    if missing := [name for name in takers if name not in states]:
        raise ValueError(
            f"{path} has no {', '.join(missing)}; it has {', '.join(states) or 'nothing'}. Nothing was loaded"
        )
    _load_all(path, takers, states)
    if rng and optimizer is not None and "rng" in content:
        set_generators(content["rng"])
    return {name: value for name, value in content["extra"].items() if name not in (extra or {})}


def _check_extra(extra: Any) -> None:
    if extra is not None and not isinstance(extra, Mapping):
        raise TypeError(f"extra must be a dict of what to save or load by name, got a {type(extra).__name__}")


def _packed(name: str, value: Any) -> Any:
    """Return a state dict or plain data; raise ``ValueError`` for what could not be loaded."""
    if isinstance(value, torch.nn.Module):
        _check_whole(name, dict(value.named_parameters()))  # before anything is gathered
    value = value.state_dict() if hasattr(value, "state_dict") else value
    buffer = io.BytesIO()
    try:
        _check_whole(name, value)
        # Without the elements, which take time and can always be loaded.
        torch.save(tree_map_only(_is_plain_tensor, lambda _: torch.empty(0), value), buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError, RuntimeError) as error:
        # torch's advice goes on for lines.
        reason = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
        reason = reason.strip().partition(" was not an allowed global")[0].partition("\n")[0]
        if isinstance(error, RecursionError):
            reason = "it contains itself, or is nested too deeply"
        raise ValueError(
            f"{name} is not plain data that torch.load(weights_only=True) accepts: {reason}. "
            "Nothing was saved"
        ) from error
    return value


def _is_plain_tensor(value: Any) -> bool:
    return type(value) in (Tensor, torch.nn.Parameter)


def _check_whole(name: str, tree: Any) -> None:
    for where, leaf in tree_leaves_with_path(tree):
        if is_dtensor(leaf):
            raise ValueError(
                f"{name}{keystr(where)} is a DTensor, of which this process has a shard: save with "
                "torch.distributed.checkpoint, or gather full state dicts and save those on one process. "
                "Nothing was saved"
            )


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("xb") as file:
        # load_checkpoint compares the checksums.
        before = get_crc32_options()
        set_crc32_options(True)
        try:
            torch.save(content, file)
        finally:
            set_crc32_options(before)
        file.flush()
        os.fsync(file.fileno())


def _flush_directory(path: Path) -> None:
    """Wait until the disk has the names of a directory's files; other systems than POSIX cannot be asked."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _previous(path: Path) -> Path:
    return path.with_name(path.name + ".previous")


class _DamagedError(Exception):
    """A file that is not as it was written. The message completes a sentence that begins with its name."""


def _newest(path: Path) -> dict[str, Any]:
    """Return the content of the file, or, with a warning, of the one before it."""
    previous = _previous(path)
    try:
        return _read(path)
    except (FileNotFoundError, _DamagedError) as error:
        fault = "does not exist" if isinstance(error, FileNotFoundError) else str(error)
        if not previous.exists():
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"{path} {fault}, and there is no {previous.name}") from error
    try:
        content = _read(previous)
    except _DamagedError as error:
        raise ValueError(f"{path} {fault}, and {previous.name} {error}") from error
    warnings.warn(f"{path} {fault}: loading {previous.name} instead", UserWarning, stacklevel=3)
    return content


def _read(path: Path) -> dict[str, Any]:
    """Load a file after comparing its checksums, which torch does not.

    Raises:
        _DamagedError: they differ, or the file ends early.
        ValueError: another program wrote it, or a later version of this one.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (FileNotFoundError, PermissionError, IsADirectoryError, MemoryError):
        raise
    except Exception as error:  # damaged headers raise nearly anything
        raise _DamagedError(f"is truncated or damaged ({error})") from error
    if broken is not None:
        raise _DamagedError(f"is damaged (a wrong checksum of {broken})")
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except RuntimeError as error:
        if "PytorchStreamReader" not in str(error):
            raise
        raise _DamagedError(f"is damaged ({error})") from error
    is_ours = isinstance(content, dict) and content.get("format") == _FORMAT and "version" in content
    is_newer = is_ours and content["version"] != _VERSION  # whose content may be another
    if not is_ours or not (is_newer or isinstance(content.get("extra"), dict)):
        raise ValueError(
            f"{path} is not a checkpoint of steepest.save_checkpoint: load it with torch.load. "
            "Nothing was loaded"
        )
    if is_newer:
        raise ValueError(
            f"{path} has version {content['version']}; this version of steepest knows {_VERSION}. "
            "Nothing was loaded"
        )
    ours: dict[str, Any] = content
    return ours


def _load_all(path: Path, takers: Mapping[str, Any], states: Mapping[str, Any]) -> None:
    """Load every state dict, or raise ``ValueError`` and give every object the state that it had."""
    for name, taker in takers.items():
        if isinstance(taker, torch.nn.Module):
            _check_dtypes(f"{path}: {name}", taker.state_dict(), states[name])
    # A loaded optimizer has new tensors in its state, so that those in this dict stay as they are.
    before = {
        name: taker.state_dict()
        if isinstance(taker, torch.optim.Optimizer)
        else copy.deepcopy(taker.state_dict())
        for name, taker in takers.items()
    }
    done: list[str] = []
    try:
        for name, taker in takers.items():
            done.append(name)
            taker.load_state_dict(states[name])
    except BaseException as error:
        changed = []
        for name in done:
            try:
                takers[name].load_state_dict(before[name])
            except Exception:
                changed.append(name)
        if not isinstance(error, Exception):
            raise
        reason = str(error) if "nothing was loaded" in str(error) else f"{error}; nothing was loaded"
        if changed:
            reason += f", but {', '.join(changed)} could not be restored and may be changed"
        raise ValueError(f"{path}: {done[-1]}: {reason}") from error


def _check_dtypes(what: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Refuse dtypes that torch would cast. It checks names and shapes itself."""
    differing = [
        f"{name!r} is {theirs[name].dtype} there and {value.dtype} here"
        for name, value in ours.items()
        if isinstance(value, Tensor)
        and isinstance(theirs.get(name), Tensor)
        and theirs[name].dtype != value.dtype
    ]
    if differing:
        more = "" if len(differing) <= _SHOWN else f", and {len(differing) - _SHOWN} more"
        raise ValueError(f"{what}: {', '.join(differing[:_SHOWN])}{more}. Nothing was loaded")


def generator_states() -> dict[str, Any]:
    """Return the states of torch's default generators and of Python's; CUDA's if it is in use."""
    states: dict[str, Any] = {"cpu": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def set_generators(states: Mapping[str, Any]) -> None:
    """Set the generators; of the GPUs those that there are."""
    torch.set_rng_state(states["cpu"])
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    if torch.cuda.is_available():
        for index, state in enumerate(states.get("cuda", [])[: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, index)
