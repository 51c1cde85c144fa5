"""Compare the step times of two checkouts of steepest, which take turns in two processes.

    python benchmarks/versions.py ../before . --only adamw --only muon --pairs 5

Each pair of new processes measures a case in rounds, one checkout after the other; the result of a pair is
the median of its rounds' ratios. The placement of memory differs between processes, which alone changes a
time by 10 to 50 %: look at the spread over the pairs, and at torch's own optimizer, whose true ratio is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

Shapes = list[tuple[int, ...]]
BLOCK: Shapes = [(2304, 768), (2304,), (768, 768), (3072, 768), (3072,), (768, 3072), *[(768,)] * 6]
MATRICES = [shape for shape in BLOCK if len(shape) == 2]

# Name -> rule, shapes, options.
CASES: dict[str, tuple[str, Shapes, dict[str, Any]]] = {
    **{f"{rule}, 150 of 128x128, eager": (rule, [(128, 128)] * 150, {"compile": False})
       for rule in ("adamw", "lion", "sgd_sai", "simba")},
    "adamw, 300 of 64, eager": ("adamw", [(64,)] * 300, {"compile": False}),
    "adamw, 148 of 64, compiled": ("adamw", [(64,)] * 148, {"compile": True}),
    **{f"{rule}, 10000 of 16, eager": (rule, [(16,)] * 10_000, {"compile": False})
       for rule in ("adamw", "sgd")},
    **{f"{rule}, 2048x2048, eager": (rule, [(2048, 2048)], {"compile": False})
       for rule in ("adamw", "lion", "simba", "simba_leaky")},
    **{f"{rule}, 4 blocks of GPT-2, compiled": (rule, BLOCK * 4, {"compile": True})
       for rule in ("signgsd", "signum", "lion", "sgd", "sgd_sai", "adamw", "simba", "simba_leaky")},
    "muon, 2 blocks of GPT-2": ("muon", MATRICES * 2, {}),
    "muon, 40 of 64x64": ("muon", [(64, 64)] * 40, {}),
    **{f"{rule}, 8 of 256x256": (rule, [(256, 256)] * 8, {})
       for rule in ("normuon", "polargrad", "scion", "hyperball")},
    **{f"{rule}, 2 of 768x768": (rule, [(768, 768)] * 2, {}) for rule in ("quad", "procrustes")},
    **{f"{rule}, 20 of 64x64": (rule, [(64, 64)] * 20, {}) for rule in ("quad", "procrustes")},
    "torch's adamw, 150 of 128x128": ("torch", [(128, 128)] * 150, {}),
}  # fmt: skip


def serve(case: str, threads: int) -> None:
    """Read a number of steps from each line of the input, and print their mean time in ms."""
    import steepest

    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    rule, shapes, options = CASES[case]
    params = [torch.nn.Parameter(0.02 * torch.randn(shape)) for shape in shapes]
    for param in params:
        param.grad = 0.01 * torch.randn_like(param)
    optimizer = torch.optim.AdamW(params) if rule == "torch" else steepest.create(rule, params, **options)
    for line in sys.stdin:
        begin = time.perf_counter()
        for _ in range(int(line)):
            optimizer.step()
        print((time.perf_counter() - begin) / int(line) * 1e3, flush=True)


def ask(process: subprocess.Popen[str], steps: int) -> float:
    """Let one checkout take some steps; return ms per step."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{steps}\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def compare(case: str, checkouts: list[Path], threads: int, rounds: int) -> list[float]:
    """Return the medians over one pair of processes: ms before, ms after, after/before."""
    command = [sys.executable, __file__, "--serve", json.dumps([case, threads])]
    processes = [
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(checkout / "src")},
        )
        for checkout in checkouts
    ]
    for process in processes:
        ask(process, 3)
    steps = max(1, int(25 / max(ask(process, 1) for process in processes)))
    times = [[ask(process, steps) for process in processes] for _ in range(rounds)]
    for process in processes:
        process.communicate()
    before, after = (statistics.median(column) for column in zip(*times, strict=True))
    return [before, after, statistics.median(late / early for early, late in times)]


def main() -> None:
    """Run the comparison and print a line per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkouts", nargs="*", type=Path, help="the older one, the newer one")
    parser.add_argument("--only", action="append", help="a part of the cases' names; may be repeated")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(*json.loads(args.serve))
        return
    if len(args.checkouts) != 2:
        parser.error("two checkouts are needed")
    for case in CASES:
        if any(part in case for part in args.only or [""]):
            pairs = [compare(case, args.checkouts, args.threads, args.rounds) for _ in range(args.pairs)]
            before, after, ratio = (statistics.median(column) for column in zip(*pairs, strict=True))
            spread = " ".join(f"{pair[2]:.2f}" for pair in sorted(pairs, key=lambda pair: pair[2]))
            print(f"{case:36s} {before:8.2f} ms {after:8.2f} ms  {ratio:.2f}  ({spread})", flush=True)


if __name__ == "__main__":
    main()
