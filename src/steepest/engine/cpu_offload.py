"""Steps on the host for parameters that live on an accelerator: copies come and go while it computes."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from steepest.engine.collect import ParamBatch, ParamUpdate

__all__ = ["Lanes", "on_host"]

# How many parameters are on their way while one is stepped: enough that the copies never wait for the
# host, few enough that the host's buffers stay small.
_AHEAD = 2

# Devices with streams, which copy from and to pinned memory while they and the host compute.
_STREAMED = ("cuda", "xpu")


class Lanes:
    """Copies between one device and the host, each direction on a stream of its own.

    Args:
        device: the accelerator. One without streams is copied from and to at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._module: Any = torch.get_device_module(device) if device.type in _STREAMED else None
        if self._module is None:
            return
        self._main = self._module.current_stream(device)
        self._down, self._up = (self._module.Stream(device) for _ in range(2))
        # The gradients are computed, and the parameters read for the last time, on the main stream.
        self._down.wait_stream(self._main)
        self._up.wait_stream(self._main)

    def fetch(self, tensors: Iterable[Tensor]) -> tuple[list[Tensor], Callable[[], None]]:
        """Begin to copy tensors to the host; the copies, and a function that waits until they are there."""
        if self._module is None:
            return [tensor.to("cpu", copy=True) for tensor in tensors], lambda: None
        with self._module.stream(self._down):
            copies = [self._copy_down(tensor) for tensor in tensors]
            arrived = self._module.Event()
            arrived.record(self._down)
        return copies, arrived.synchronize

    def _copy_down(self, tensor: Tensor) -> Tensor:
        copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
        # Strides that differ go through temporaries, which an asynchronous copy must not free.
        return copy.copy_(tensor, non_blocking=copy.stride() == tensor.stride())

    def send(self, source: Tensor, target: Tensor) -> None:
        """Begin to copy a tensor from the host over one of the device."""
        if self._module is None:
            target.copy_(source)
            return
        with self._module.stream(self._up):
            target.copy_(source, non_blocking=source.stride() == target.stride())

    def finish(self) -> None:
        """Let the device's later work come after all copies; the host does not wait."""
        if self._module is not None:
            self._main.wait_stream(self._up)
            self._main.wait_stream(self._down)


def on_host(batch: ParamBatch) -> Iterator[ParamBatch]:
    """A batch's parameters one by one, each as a batch in the host's memory whose state is the original's.

    What the caller does to a parameter before it asks for the next one is copied back.
    """
    lanes = Lanes(batch.members[0].param.device)
    waiting: deque[tuple[ParamUpdate, list[Tensor], Callable[[], None]]] = deque()
    coming = iter(batch.members)

    def fetch_next() -> None:
        member = next(coming, None)
        if member is not None:
            waiting.append((member, *lanes.fetch((member.param, member.grad))))

    try:
        for _ in range(_AHEAD):
            fetch_next()
        while waiting:
            fetch_next()
            member, (param, grad), wait = waiting.popleft()
            wait()
            scalars = {
                name: value.cpu() if isinstance(value, Tensor) else value
                for name, value in member.scalars.items()
            }
            columns = [param, grad, *member.columns[2:]]
            near = dataclasses.replace(member, param=param, grad=grad, columns=columns, scalars=scalars)
            yield ParamBatch(batch.config, [near])
            lanes.send(param, member.param)
    finally:
        lanes.finish()
