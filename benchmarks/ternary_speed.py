"""How long a ternary layer takes beside a dense one, and packing and flipping beside a copy.

    OMP_NUM_THREADS=1 python benchmarks/ternary_speed.py

Everything that is compared is interleaved; medians. One line of JSON for each comparison.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from steepest.ternary import TernaryFlip, TernaryLinear, pack, unpack
from steepest.ternary.flipping import flip_layer


class UnpackThenMatmul(nn.Module):
    """What a ternary layer costs without an operation of its own: the weight is made dense in the graph."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.layer = TernaryLinear.from_linear(linear)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [..., in] to [..., out]."""
        values = unpack(self.layer.packed, self.layer.in_features, x.dtype)
        return nn.functional.linear(x, values * self.layer.scale[:, None])


def medians(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each call, interleaved."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if round_:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in times.items()}


def layers(columns: int, rows: int, batch: int, repeats: int = 9) -> dict[str, float]:
    """Forward and backward of ternary layers, as ratios to ``nn.Linear`` of the same shape.

    Returns:
        Seconds of the dense layer, and the ratios: of unpacking and multiplying in the graph, of a layer
        whose weights stay, and of layers that vote by sign and by magnitude.
    """
    dense = nn.Linear(columns, rows, bias=False)
    modules = {
        "dense": dense,
        "unpack_then_matmul": UnpackThenMatmul(dense),
        "frozen": TernaryLinear.from_linear(dense),
        "sign": TernaryLinear.from_linear(dense),
        "magnitude": TernaryLinear.from_linear(dense),
    }
    trainers = {
        "sign": TernaryFlip(modules["sign"]),
        "magnitude": TernaryFlip(modules["magnitude"], votes="magnitude", compile=False),
    }
    x = torch.randn(batch, columns, requires_grad=True)

    def call(name: str) -> Callable[[], None]:
        def run() -> None:
            modules[name](x).sum().backward()
            if name in trainers:
                trainers[name].zero_grad()

        return run

    seconds = medians({name: call(name) for name in modules}, repeats)
    base = seconds.pop("dense")
    return {"dense_seconds": base} | {name: each / base for name, each in seconds.items()}


def passes(columns: int, rows: int, repeats: int = 9) -> dict[str, float]:
    """Nanoseconds a weight of packing, unpacking, flipping, AdamW's fused step, and a copy of bytes."""
    values = torch.randint(-1, 2, (rows, columns), dtype=torch.int8)
    votes, a = torch.randint(-1, 2, (rows, columns), dtype=torch.int8), torch.zeros_like(values)
    packed, other = pack(values), torch.empty_like(values)
    weight = nn.Parameter(torch.randn(rows, columns))
    weight.grad = torch.randn(rows, columns)
    adamw = torch.optim.AdamW([weight], fused=True)

    def flip() -> None:
        flip_layer(packed, a, votes, threshold=16, outward="cancel", zero_pull=0.0, at_most=None, key=(1, 2))

    seconds = medians(
        {
            "copy": lambda: other.copy_(values),
            "pack": lambda: pack(values),
            "unpack": lambda: unpack(packed, columns),
            "flip": flip,
            "adamw_fused": adamw.step,
        },
        repeats,
    )
    return {name: 1e9 * each / (rows * columns) for name, each in seconds.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    for columns, rows, batch in ((1024, 1024, 64), (1024, 1024, 256), (1024, 1024, 1024), (2048, 2048, 256)):
        result = {name: round(each, 4) for name, each in layers(columns, rows, batch).items()}
        print(json.dumps({"in": columns, "out": rows, "batch": batch, **result}), flush=True)
    result = {name: round(each, 3) for name, each in passes(4096, 4096).items()}
    print(json.dumps({"in": 4096, "out": 4096, "ns_per_weight": result}))


if __name__ == "__main__":
    main()
