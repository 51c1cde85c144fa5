"""The element pass: one rule, one piece of memory at a time, written once for eager and compiled runs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steepest.engine.collect import ParamBatch, ParamUpdate
from steepest.engine.layout import flat
from steepest.engine.multi_tensor import row_of, run_together
from steepest.engine.temporaries import peak_bytes
from steepest.engine.update import cast, decay_strength, descend, hyper_of, narrowed
from steepest.random import Key, Words, derive_key, element_words, stream_bits, stream_uniform
from steepest.rule import Rule, Scalar

__all__ = ["UpdateConfig", "advance", "member_key", "run_eager", "shared_scalars", "store"]

# What the temporaries of a piece may take together. On a CPU 1 MiB is 2**15 to 2**17 elements. Pieces of
# 2**18 take several MiB: where malloc gives that back to the system and fetches it anew, a step takes two to
# four times as long; where it keeps it, two threads are up to 1.8 times as fast (twice, in bfloat16), since
# they are called together less often.
# An accelerator waits for the host where an operation is over before the next is launched, after some 5 µs;
# at 3 TB/s that is a million elements, and a piece should be a few times as long. (Reckoned, not measured.)
_ROOM_ON_CPU = 1 << 20
_ROOM_ELSEWHERE = 1 << 27

# Besides what grows with the piece: numbers, and what an operation takes within itself.
_SPARE = 1 << 12

# Pieces begin at a multiple of this, so that vectors in memory are aligned.
_GRAIN = 256

# No rule comes near so many bytes an element: what is smaller than such a piece is one, unmeasured.
_MOST_BYTES_PER_ELEMENT = 256

_ROUNDING_STREAM = 7  # apart from the streams that rules use


@dataclass(frozen=True)
class UpdateConfig:
    """All that is fixed about a batch: what a compiled graph is specialized on besides shapes.

    ``method`` is None where nothing decays. Results are computed in ``compute``: float32, or float64
    where a parameter or its state is that wide.
    """

    rule: Rule
    fixed: tuple[tuple[str, Any], ...]
    method: str | None
    maximize: bool
    rounding: str
    noisy: bool
    compute: torch.dtype

    @classmethod
    def of(cls, batch: ParamBatch, *, keep_decay: bool) -> UpdateConfig:
        """Read it off a batch; with ``keep_decay`` a decay of 0 stays in, since it may be scheduled."""
        group, rule = batch.group, batch.rule
        decays = (keep_decay or group["weight_decay"] != 0) and not rule.decays_itself(group)
        compute = torch.promote_types(torch.float32, batch.members[0].param.dtype)
        # A rule whose algebra or state is float64 must not get it rounded to float32 on the way.
        if torch.float64 in (group["state_dtype"], group.get("dtype")):
            compute = torch.float64
        return cls(
            rule,
            tuple([(name, group[name]) for name in _taken(rule, traced=False)]),
            group["weight_decay_method"] if decays else None,
            group["maximize"],
            "stochastic" if batch.rounds_stochastically else "nearest",
            batch.noisy,
            compute,
        )


def shared_scalars(batch: ParamBatch) -> dict[str, Any]:
    """The numbers that all of a batch's members share: lr, decay, and the rule's float hyper-parameters."""
    group, rule = batch.group, batch.rule
    lr: Scalar = group["lr"]
    if isinstance(lr, Tensor):
        on_host = "cpu" in (lr.device.type, batch.device.type) and not group["capturable"]
        # Apple's GPUs have no float64.
        wide = torch.float32 if batch.device.type == "mps" else torch.float64
        lr = float(lr) if on_host else lr.detach().reshape(()).to(batch.device, wide)
    decay = decay_strength(group["weight_decay_method"], lr, group["weight_decay"], group["base_lr"])
    return {"lr": lr, "decay": decay} | {name: group[name] for name in _taken(rule, traced=True)}


@functools.cache
def _taken(rule: Rule, *, traced: bool) -> tuple[str, ...]:
    """The hyper-parameters that a rule's ``update`` names and that are, or are not, data of compiled code."""
    own = (name for name, hyper in rule.hyper.items() if hyper.traced == traced)
    return tuple(sorted(name for name in own if name in rule.takes and name != "lr"))


def member_key(batch: ParamBatch, member: ParamUpdate) -> Key:
    """The key of a parameter's noise in this step."""
    if member.key is not None:
        return member.key
    return derive_key(batch.group["seed"], member.place.ordinal, int(member.step))


def advance(
    recipe: UpdateConfig,
    param: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    scalars: Mapping[str, Any],
    key: Key | None,
    index: Callable[[], Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """One step of one piece: (new parameter, new state), each in the dtype it had.

    Args:
        recipe: what is fixed.
        param, grad: of one shape; ``state`` entries too.
        scalars: shared and per-parameter numbers by name, floats or 0-dim tensors.
        key, index: of the noise: the parameter's key, and the elements' places in the logical tensor.
    """
    rule, wide = recipe.rule, recipe.compute
    given = dict(recipe.fixed) | hyper_of(rule.takes, scalars)
    mixed: list[Words] = []

    def words() -> Words:
        # What all streams share is half of the work, and mixed when it is first asked for.
        if not mixed:
            assert key is not None
            mixed.append(element_words(key, index()))
        return mixed[0]

    if "noise" in rule.takes:
        given["noise"] = lambda stream: stream_uniform(words(), stream).to(wide)
    if "key" in rule.takes:
        given |= hyper_of(rule.takes, {"key": key, "index": index, "grad_dtype": grad.dtype})

    def direct(g: Tensor, p: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return rule.update(g, p, **{name: cast(entry, wide) for name, entry in state.items()}, **given)

    stepped, new = descend(
        cast(param, wide),
        cast(grad, wide),
        direct,
        rule.retract,
        lr=scalars["lr"],
        decay=scalars["decay"],
        method=recipe.method,
        maximize=recipe.maximize,
    )
    return (
        narrowed(stepped, param.dtype, recipe.rounding, lambda: stream_bits(words(), _ROUNDING_STREAM)),
        {name: cast(value, state[name].dtype) for name, value in new.items()},
    )


def store(old: Tensor, new: Tensor, finite: Tensor | None) -> None:
    """Write ``new`` over ``old``, unless the device finds that the step must be skipped."""
    old.copy_(new if finite is None else torch.where(finite, new, old))


def run_eager(batch: ParamBatch, members: Sequence[ParamUpdate], finite: Tensor | None) -> None:
    """Step these members of a batch, piece by piece so that temporaries stay small, small ones together."""
    recipe = UpdateConfig.of(batch, keep_decay=False)
    shared = shared_scalars(batch)
    names = tuple(batch.element_state)
    small: dict[Any, list[list[Tensor]]] = {}
    ends: dict[int, int] = {}
    late: list[tuple[ParamUpdate, list[Tensor]]] = []
    for member in members:
        tensors = [member.param, member.grad, *[member.state[name] for name in names]]
        if _reaches_back(member.param, ends):
            late.append((member, tensors))
        elif (kind := _kind(recipe, member, tensors)) and (row := row_of(tensors)):
            small.setdefault(kind, []).append(row)
        else:
            _step_alone(batch, recipe, names, member, tensors, shared, finite)
    for (own, _), rows in small.items():
        _step_together(recipe, names, rows, shared | dict(own), finite)
    for member, tensors in late:
        _step_alone(batch, recipe, names, member, tensors, shared, finite)


def _reaches_back(param: Tensor, ends: dict[int, int]) -> bool:
    """Whether a parameter may lie in the memory of one before it, and has to see what that one wrote.

    ``ends`` says how far those before it reach, storage by storage.
    """
    storage, first = param.untyped_storage()._cdata, int(param.storage_offset())
    end: int = first + param.numel()
    if end > first and not param.is_contiguous():
        steps = zip(param.shape, param.stride(), strict=True)
        end = first + 1 + int(sum((size - 1) * stride for size, stride in steps))
    before = ends.get(storage, 0)
    ends[storage] = max(before, end)
    return first < before


def _kind(recipe: UpdateConfig, member: ParamUpdate, tensors: list[Tensor]) -> Any:
    """What members must share to be stepped as one tensor; None for one that must be alone.

    That is one with noise, whose key is its own, or with numbers that only a device knows.
    """
    if recipe.noisy or any(isinstance(value, Tensor) for value in member.scalars.values()):
        return None
    return tuple(member.scalars.items()), tuple([tensor.dtype for tensor in tensors])


def _step_alone(
    batch: ParamBatch,
    recipe: UpdateConfig,
    names: tuple[str, ...],
    member: ParamUpdate,
    tensors: list[Tensor],
    shared: Mapping[str, Any],
    finite: Tensor | None,
) -> None:
    key = member_key(batch, member) if recipe.noisy else None
    scalars = {**shared, **member.scalars}
    limit = piece_length(recipe, names, tensors, scalars, finite)
    for piece, index in pieces(tensors, limit, ordered=recipe.noisy):
        _step_piece(recipe, names, piece, scalars, key, index, finite)


def _step_together(
    recipe: UpdateConfig,
    names: tuple[str, ...],
    rows: list[list[Tensor]],
    scalars: Mapping[str, Any],
    finite: Tensor | None,
) -> None:
    def step(piece: list[Tensor]) -> None:
        _step_piece(recipe, names, piece, scalars, None, no_index, finite)

    def no_index() -> Tensor:
        raise AssertionError("without noise nobody asks for places")

    if len(rows) == 1:
        step(rows[0])
        return
    limit = piece_length(recipe, names, rows[0], scalars, finite, joined=True)
    run_together(rows, limit, step, [at for at in range(len(rows[0])) if at != 1])


def _step_piece(
    recipe: UpdateConfig,
    names: Sequence[str],
    piece: Sequence[Tensor],
    scalars: Mapping[str, Any],
    key: Key | None,
    index: Callable[[], Tensor],
    finite: Tensor | None,
) -> None:
    # A function of its own: a loop's variables would hold one piece's results while the next is computed.
    param, grad, *entries = piece
    state = dict(zip(names, entries, strict=True))
    stepped, new = advance(recipe, param, grad, state, scalars, key, index)
    store(param, stepped, finite)
    for name, value in new.items():
        store(state[name], value, finite)


def piece_length(
    recipe: UpdateConfig,
    names: tuple[str, ...],
    tensors: Sequence[Tensor],
    scalars: Mapping[str, Any],
    finite: Tensor | None,
    *,
    joined: bool = False,
) -> int:
    """How many elements a piece of these tensors may have so that its temporaries find room.

    ``joined`` says that the piece itself is one: it is put together of several tensors.
    """
    room = _ROOM_ON_CPU if tensors[0].device.type == "cpu" else _ROOM_ELSEWHERE
    if not joined and tensors[0].numel() * _MOST_BYTES_PER_ELEMENT <= room:
        return room // _MOST_BYTES_PER_ELEMENT
    sizes = tuple((name, len(v) if isinstance(v, (tuple, list)) else 0) for name, v in scalars.items())
    dtypes = tuple(tensor.dtype for tensor in tensors)
    each = _bytes_per_element(recipe, names, dtypes, tensors[0].device, sizes, finite is not None)
    each += joined * sum(dtype.itemsize for dtype in dtypes)
    return max(1, (room - _SPARE) // each // _GRAIN) * _GRAIN


@functools.lru_cache(maxsize=256)
def _bytes_per_element(
    recipe: UpdateConfig,
    names: tuple[str, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    scalars: tuple[tuple[str, int], ...],
    guarded: bool,
) -> int:
    """Bytes of temporaries for each element of a piece: measured on a small one of zeros.

    So no rule need say it, and it is right for every combination of options, dtypes and decay.
    """
    count = 1 << 10
    piece = [torch.zeros(count, dtype=dtype, device=device) for dtype in dtypes]
    numbers = {name: (0.5,) * size if size else 0.5 for name, size in scalars}
    key = (1, 2) if recipe.noisy else None
    index = _indices(piece[0].shape, 0, device)
    finite = torch.ones((), dtype=torch.bool, device=device) if guarded else None
    step = functools.partial(_step_piece, recipe, names, piece, numbers, key, index, finite)
    return -(-peak_bytes(step) // count)


def pieces(
    tensors: Sequence[Tensor], limit: int, *, ordered: bool = True
) -> Iterator[tuple[list[Tensor], Callable[[], Tensor]]]:
    """Cut tensors of one shape into views of at most ``limit`` elements, with their element indices.

    Tensors that lie in memory alike are cut anywhere, others along their dimensions. Indices count in
    logical (row-major) order, whatever the strides, unless nobody asks for them: ``ordered`` False.
    """
    if tensors[0].numel() == 0:
        return
    device = tensors[0].device
    for cut, first in _cut(flat(tensors, ordered=ordered) or list(tensors), limit, 0):
        yield cut, _indices(cut[0].shape, first, device)


def _cut(tensors: list[Tensor], limit: int, start: int) -> Iterable[tuple[list[Tensor], int]]:
    """The pieces, and the index of the first element of each; ``start`` is that of the first of all."""
    shape, numel = tensors[0].shape, tensors[0].numel()
    if numel <= limit:
        return [(tensors, start)]
    row = numel // shape[0]
    if row > limit:
        parts = zip(*(tensor.unbind() for tensor in tensors), strict=True)
        return (each for at, part in enumerate(parts) for each in _cut(list(part), limit, start + at * row))
    # Of equal length, or the last would be short: calls for little.
    count = -(-shape[0] // (limit // row))
    rows = -(-shape[0] // count)
    if row == 1 and limit >= _GRAIN:
        rows = -(-rows // _GRAIN) * _GRAIN
    return (
        ([tensor[first : first + rows] for tensor in tensors], start + first * row)
        for first in range(0, shape[0], rows)
    )


def _indices(shape: torch.Size, start: int, device: torch.device) -> Callable[[], Tensor]:
    end = start + math.prod(shape)
    dtype = torch.int32 if end <= 1 << 31 else torch.int64
    return lambda: torch.arange(start, end, dtype=dtype, device=device).view(shape)
