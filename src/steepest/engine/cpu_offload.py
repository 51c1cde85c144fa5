"""Step parameters of an accelerator on the host, with copies in both directions overlapped."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from steepest.engine.collect import ParamBatch, ParamUpdate

__all__ = ["Lanes", "on_host"]

# Number of parameters in transfer while one is stepped: enough that copies never wait for the
# host, few enough that the host's buffers stay small.
_AHEAD = 2

# Devices with streams, which copy pinned memory while they and the host compute.
_STREAMED = ("cuda", "xpu")


class Lanes:
    """Copies between a device and the host, with one stream per direction.

    Args:
        device: the accelerator. Without streams, copies are synchronous.
    """

    def __init__(self, device: torch.device) -> None:
        self._module: Any = torch.get_device_module(device) if device.type in _STREAMED else None
        if self._module is None:
            return
        self._main = self._module.current_stream(device)
        self._down, self._up = (self._module.Stream(device) for _ in range(2))
        # The main stream computes the gradients and reads the parameters.
        self._down.wait_stream(self._main)
        self._up.wait_stream(self._main)

    def fetch(self, tensors: Iterable[Tensor]) -> tuple[list[Tensor], Callable[[], None]]:
        """Start copies to the host; return them and a function that waits for them."""
        if self._module is None:
            return [tensor.to("cpu", copy=True) for tensor in tensors], lambda: None
        with self._module.stream(self._down):
            copies = [self._copy_down(tensor) for tensor in tensors]
            arrived = self._module.Event()
            arrived.record(self._down)
        return copies, arrived.synchronize

    def _copy_down(self, tensor: Tensor) -> Tensor:
        copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
        # Different strides need temporaries, which an asynchronous copy must not free.
        return copy.copy_(tensor, non_blocking=copy.stride() == tensor.stride())

    def send(self, source: Tensor, target: Tensor) -> None:
        """Start to copy a tensor from the host to one on the device."""
        if self._module is None:
            target.copy_(source)
            return
        with self._module.stream(self._up):
            target.copy_(source, non_blocking=source.stride() == target.stride())

    def finish(self) -> None:
        """Order later work on the device after all copies, without waiting on the host."""
        if self._module is not None:
            self._main.wait_stream(self._up)
            self._main.wait_stream(self._down)


def on_host(batch: ParamBatch) -> Iterator[ParamBatch]:
    """Yield a batch's parameters one by one, each as a batch on the host that shares the state.

    The caller steps each one before it asks for the next; the parameter is then copied back.
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
