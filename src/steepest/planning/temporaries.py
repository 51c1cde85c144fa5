"""Bound what a step holds beside parameters, gradients and state: chunks of elements, buckets of matrices.

Matrices are transformed by the rules themselves, on the meta device, while a dispatch mode counts the bytes
of the tensors that are alive.
"""

from __future__ import annotations

import copy
import itertools
import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from steepest.engine.batches import ParamBatch, ParamUpdate
from steepest.engine.blocks import MatrixBlock, blocks_of
from steepest.engine.chunks import chunk_bytes
from steepest.engine.matrices import MatrixRun, buckets
from steepest.engine.multi_tensor import SMALL
from steepest.engine.owners import cut_into_waves
from steepest.engine.step_count import count_steps
from steepest.engine.sums import working_bytes as summing_bytes
from steepest.engine.units import Sharding, Unit
from steepest.engine.update import UpdateConfig
from steepest.engine.waves import sends_param
from steepest.scratch import KEPT_BYTES
from steepest.ternary.chunks import LARGE, row_chunks

__all__ = ["temporary_bytes"]

# Steps that are tried on the meta device: the first, a usual one, one that balances PSGD's factors, and those
# that a rule's integer options name, such as SOAP's precondition_frequency.
_STEPS = (1, 2, 100)
# Parameters in transfer to the host at a time: see steepest.engine.cpu_offload.
_IN_TRANSFER = 3


@torch.no_grad()
def temporary_bytes(
    batches: Iterable[ParamBatch], sharding: Sharding | None, device: torch.device
) -> tuple[int, int]:
    """Return bounds on the temporaries of a step, eager or compiled: (on the device, in host memory).

    The batches of a step run one after the other, so the largest counts. Host memory is counted for groups
    with ``state_device="cpu"`` and an accelerator.

    Args:
        batches: of parameters on the meta device, with their states.
        sharding: of the optimizer that has made them.
        device: where the step will run.
    """
    here = on_host = kept = 0
    units: list[tuple[UpdateConfig, Unit, ParamUpdate]] = []
    for batch in batches:
        config = copy.copy(batch.config)
        config.device = device
        if config.rule.moves:
            here = max(here, *[_flip_bytes(member, device) for member in batch.members])
            continue
        if config.group["state_device"] == "cpu" and device.type != "cpu":
            config.device = torch.device("cpu")
            each = max(member.param.nbytes + member.grad.nbytes for member in batch.members)
            on_host = max(on_host, _IN_TRANSFER * each + _element_bytes(config, batch.members))
            continue
        summed = 0
        if config.measures:
            summed = summing_bytes(max(member.param.numel() for member in batch.members), device)
        if not config.rule.transforms:
            here = max(here, summed, _element_bytes(config, batch.members))
            continue
        alone = [member for member in batch.members if member.units is None]
        units += [(batch.config, unit, member) for member in batch.members for unit in member.units or ()]
        here, stacks = _matrix_bytes(batch.config, config, alone, max(here, summed))
        kept += stacks
    if sharding is not None and units:
        here = max(here, _exchange_bytes(units))
    # On a CPU, stacks are kept for the next step: see steepest.scratch.
    return here + (min(kept, KEPT_BYTES) if device.type == "cpu" else 0), on_host


def _element_bytes(config: UpdateConfig, members: Sequence[ParamUpdate]) -> int:
    dtypes = [column.dtype for column in members[0].columns]
    apart = config.noisy or config.storage.block is not None
    small = [member.param.numel() for member in members if not apart and member.param.numel() <= SMALL]
    large = max((n for n in (member.param.numel() for member in members) if apart or n > SMALL), default=0)
    joined = chunk_bytes(config, dtypes, sum(small), joined=True)
    return max(chunk_bytes(config, dtypes, large), joined)


def _matrix_bytes(
    config: UpdateConfig, real: UpdateConfig, members: Sequence[ParamUpdate], most: int
) -> tuple[int, int]:
    """Return what a bucket takes at most, or ``most``, and the bytes of the stacks that a CPU keeps."""
    blocks = [block for member in members for block in blocks_of(real, member)]
    found = {(len(each), each[0].kind.shape): each for each in buckets(real, blocks)}
    stacks = 0
    for (count, shape), bucket in found.items():
        inputs = config.inputs * count * math.prod(shape) * config.compute.itemsize
        stacks += inputs
        numel = bucket[0].columns[0].numel()
        small = numel <= SMALL and count > 1
        dtypes = [column.dtype for column in bucket[0].columns]
        chunk = chunk_bytes(real, dtypes, numel * (count if small else 1), joined=small)
        # The last pass has the direction beside the inputs.
        most = max(most, inputs + inputs // config.inputs + chunk)
    return _most_transformed(config, found.values(), most), stacks


def _most_transformed(
    config: UpdateConfig, found: Iterable[list[MatrixBlock]], most: int = 0, *, params: bool = False
) -> int:
    """Return the larger of ``most`` and the peak of transforming one of these buckets.

    ``params`` says that their parameters travel with them.
    """
    # The rules' own bounds, by which buckets are cut, are several times too large, but cost nothing.
    bounded = [(len(bucket) * bucket[0].kind.numel * config.working_bytes, bucket) for bucket in found]
    for bound, bucket in sorted(bounded, key=lambda each: -each[0]):
        if bound > most:
            most = max(most, _transform_bytes(config, bucket, params))
    return most


def _transform_bytes(config: UpdateConfig, bucket: list[MatrixBlock], params: bool) -> int:
    """Return the peak of transforming and retracting a bucket, with its input, on the meta device."""
    try:
        return max(_peak(config, bucket, step, params) for step in _steps(config))
    except (NotImplementedError, RuntimeError):  # the rule reads a number that the meta device does not have
        return len(bucket) * bucket[0].kind.numel * config.working_bytes


def _steps(config: UpdateConfig) -> list[int]:
    """Return steps that differ in what the rule's scalars switch on and off."""
    own = {value for value in config.hyper.values() if type(value) is int and 1 < value < 10**6}
    found: dict[str, int] = {}
    for step in sorted({*_STEPS, *own, *(value + 1 for value in own)}):
        numbers = config.rule.scalars(float(step), **config.hyper)
        found.setdefault(str({name: value for name, value in numbers.items() if value in (0, 1)}), step)
    return list(found.values())


def _peak(config: UpdateConfig, bucket: list[MatrixBlock], step: int, params: bool) -> int:
    members = list({id(block.member): block.member for block in bucket}.values())
    for member in members:
        if "step" in member.state:
            member.state["step"].fill_(step - 1)
    count_steps(ParamBatch(config, members))
    run = MatrixRun(config, config.numbers(), None, _no_pass)
    shape = (len(bucket), *bucket[0].kind.shape)
    stacks = [torch.empty(shape, dtype=config.compute, device="meta") for _ in range(config.inputs + params)]
    given = stacks.pop() if params else None
    with _LiveBytes() as live:
        for each in stacks if given is None else [*stacks, given]:
            live.add(each)
        del each
        direction, new = run.directions(bucket, None, stacks, given)
        if config.rule.retracts and given is None:
            run.finish(bucket, direction, new)
        elif config.rule.retracts:
            assert given is not None
            run.retracted(given, direction, new)
    return int(live.most)


def _no_pass(*args: Any) -> None:
    """Stand for an element pass, whose chunks are counted apart."""


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of the storages on the meta device that were made in this context and still live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held: int = 0
        self.most: int = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor) and each.is_meta]
        known = {each.untyped_storage()._cdata for each in given}
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, Tensor) and each.is_meta and each.untyped_storage()._cdata not in known:
                self.add(each)
        if "linalg" in str(func) and "norm" not in str(func):
            # LAPACK is given a copy in its own order, and a workspace.
            self.most = max(self.most, self.held + 2 * sum(each.nbytes for each in given))
        return out

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage as long as it lives."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def gone(_: Any) -> None:
            del self._seen[key]
            self.held -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.held += size
        self.most = max(self.most, self.held)


def _exchange_bytes(units: Sequence[tuple[UpdateConfig, Unit, ParamUpdate]]) -> int:
    """Return the most that two waves' parcels and a bucket of the own matrices take."""
    by_team: dict[int, list[tuple[UpdateConfig, Unit, ParamUpdate]]] = {}
    for each in units:
        by_team.setdefault(id(each[1].team), []).append(each)
    most = 0
    for shared in by_team.values():
        waves = cut_into_waves([(config, unit) for config, unit, _ in shared])
        parcels = [sum(_parcel_bytes(*shared[at][:2]) for at in wave) for wave in waves]
        transformed = 0
        for wave in waves:
            mine: dict[int, tuple[UpdateConfig, list[MatrixBlock]]] = {}
            for config, unit, member in (shared[at] for at in wave):
                block = MatrixBlock(member, unit.suffix, unit.kind, unit.shape, [], unit.extent, unit.rows)
                mine.setdefault(id(config), (config, []))[1].extend([block] * unit.is_mine)
            for config, blocks in mine.values():
                sends = sends_param(config.rule)
                found = {(len(each), each[0].kind.shape): each for each in buckets(config, blocks)}
                transformed = _most_transformed(config, found.values(), transformed, params=sends)
        most = max(most, transformed + max(a + b for a, b in itertools.pairwise([0, *parcels, 0])))
    return most


def _parcel_bytes(config: UpdateConfig, unit: Unit) -> int:
    """Return the bytes that a unit has in parcels here, on the way to its owner and back."""
    part, whole = math.prod(unit.own_part.shape), math.prod(unit.kind.shape) * unit.is_mine
    sent = config.inputs + sends_param(config.rule)
    # Parts that are sent, and results that come. At the owner also matrices that arrive, directions, and
    # directions as they are sent.
    return config.compute.itemsize * (part * (sent + 2) + whole * (sent + 2))


def _flip_bytes(member: ParamUpdate, device: torch.device) -> int:
    """Return what a chunk of ternary weights takes: counters as words, their masks, and a pull's noise."""
    group, (rows, columns) = member.group, member.target.shape
    chunk = row_chunks(rows, columns, device, LARGE)[0]
    each = 4 * group["accumulator"].itemsize + 8 * (group["zero_pull"] > 0)
    return int(chunk.stop - chunk.start) * int(columns) * int(each)
