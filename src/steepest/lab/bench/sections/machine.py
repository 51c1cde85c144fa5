"""The machine: how fast it moves the model's tensors, and how fast it multiplies at the model's shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ...clock import now
from ..limits import AXPY, COPY, axpy, axpy_bytes, copy, copy_bytes
from ..material import Material
from ..products import Product
from ..results import Column, Result, Row
from ..section import Setting
from ..shapes import ShapeList
from ..turns import Turn, take_turns
from ..watch import Watcher

_COLUMNS = (
    Column("what", "what"),
    Column("ms", "ms", "ms"),
    Column("rate", "rate", "rate"),
    Column("unit", ""),
)
_NOTE = (
    "Medians of {rounds} rounds in which all of these take turns. axpy is p + a·g over all of the model's "
    "tensors: 12 bytes a float32 parameter, and what the steps below are held against; copy moves 8. "
    "Whether a write first reads what it replaces is the hardware's affair and not counted."
)


class Machine:
    """Bandwidth over the model's tensors; multiplication in float32 and bfloat16."""

    name = "machine"

    def pieces(self, setting: Setting) -> int:
        """One a model."""
        return len(setting.models)

    def run(self, setting: Setting, watcher: Watcher) -> Iterator[Result]:
        """A table a model."""
        for shapes in setting.models:
            watcher.begun(f"the machine, at {shapes.title}'s shapes")
            result = self._of(shapes, setting, watcher)
            watcher.finished()
            yield result

    def _of(self, shapes: ShapeList, setting: Setting, watcher: Watcher) -> Result:
        title = f"The machine at {shapes.title}'s shapes"
        nbytes = setting.dtype.itemsize * shapes.numel
        if 2 * nbytes > setting.memory:
            said = f"skipped: parameters and gradients need {2 * nbytes / 2**30:.1f} GiB, the limit is "
            return Result(self.name, title, _COLUMNS, [], [f"{said}{setting.memory / 2**30:.1f} GiB"])
        device = setting.device
        material = Material.of(shapes.tensors, device, setting.dtype)
        moved = {AXPY: axpy_bytes(material), COPY: copy_bytes(material)}
        products = list(
            dict.fromkeys(p for dtype in (torch.float32, torch.bfloat16) for p in _products(shapes, dtype))
        )
        acts: dict[str, Callable[[], object]] = {
            AXPY: lambda: axpy(material),
            COPY: lambda: copy(material),
        }
        acts |= {str(product): product.rehearse(device) for product in products}
        turns = [Turn(label, act, queued=device.type != "cpu") for label, act in acts.items()]
        total = setting.rounds + 2
        times = take_turns(
            turns, setting.rounds, lambda: now(device), lambda done: watcher.ticked(done / total)
        )
        rows: list[Row] = []
        for label in times.seconds:
            spent = times.median_ms(label)
            row: Row = {"what": label, "ms": spent, "quartiles_ms": times.quartiles_ms(label)}
            if label in moved:
                row |= {"rate": moved[label] / spent / 1e6, "unit": "GB/s", "bytes": moved[label]}
            else:
                flops = next(p.flops for p in products if str(p) == label)
                row |= {"rate": flops / spent / 1e6, "unit": "Gflop/s", "flops": flops}
            rows.append(row)
        failed = [f"{label}: {why}" for label, why in times.failed.items()]
        return Result(self.name, title, _COLUMNS, rows, [_NOTE.format(rounds=setting.rounds), *failed])


def _products(shapes: ShapeList, dtype: torch.dtype) -> list[Product]:
    """For every shape of a hidden matrix m ≤ n: [m×n]·[n×m], and the [m×m]·[m×n] of the same flops."""
    products = []
    for tensor in shapes.hidden(1):
        rows, columns = tensor.shape[0], tensor.numel // tensor.shape[0]
        short, long = min(rows, columns), max(rows, columns)
        products += [
            Product(1, short, long, short, dtype, (False, True)),
            Product(1, short, short, long, dtype),
        ]
    return products
