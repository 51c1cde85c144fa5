"""Draw and print what rounding does to training in bfloat16 alone, from the trials of low_bit_study.py.

    python benchmarks/low_bit_study.py --out runs/low_bit
    python benchmarks/bfloat16_report.py --out runs/low_bit --figure docs/bfloat16.png

Left: a weight of 1 that a step decays by a millionth of itself, averaged over 65,536 elements. The other
panels: bits per byte above float32's with the same seed, while the text task trains.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from low_bit_study import by_label
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import steepest
from steepest.lab.theme import LIGHT, series_style, style_axes

RULES = ("lion", "adamw", "muon")
FORMATS = {"stochastic": "bf16, float32", "nearest": "bf16 nearest, float32"}
DASHES = {"stochastic": "-", "nearest": "--"}
STEPS, DECAY, ELEMENTS = 4000, 1e-6, 1 << 16


def decays(rounding: str) -> list[float]:
    """Return the mean of bfloat16 weights that start at 1 and decay, every 100 steps."""
    weight = torch.nn.Parameter(torch.ones(ELEMENTS, dtype=torch.bfloat16))
    optimizer = steepest.create("sgd", [weight], lr=1.0, weight_decay=DECAY, rounding=rounding)
    weight.grad = torch.zeros_like(weight)
    means = [1.0]
    for step in range(1, STEPS + 1):
        optimizer.step()
        if step % 100 == 0:
            means.append(float(weight.detach().double().mean()))
    return means


def above(out: Path, size: str, rule: str, rounding: str) -> Iterator[tuple[int, float, float]]:
    """Yield (step, mean, standard deviation over the seeds) of bits per byte above float32's."""
    found = by_label(out, size)
    seeds = {record.seed: record for record in found[f"{rule}: float32, float32"]}
    pairs = [(record, seeds[record.seed]) for record in found[f"{rule}: {FORMATS[rounding]}"]]
    for points in zip(
        *(zip(one.validation, other.validation, strict=True) for one, other in pairs), strict=True
    ):
        gaps = [own[-1] - reference[-1] for own, reference in points]
        yield int(points[0][0][0]), statistics.mean(gaps), statistics.stdev(gaps)


def draw(out: Path, path: Path) -> None:
    """Draw the three panels."""
    figure = Figure(figsize=(13, 3.8), dpi=110, facecolor=LIGHT.background, layout="constrained")
    first, *others = figure.subplots(1, 3)
    style_axes(first, LIGHT, "steps")
    first.set_title("a weight of 1, decayed by 1e-6 a step", color=LIGHT.text, fontsize=10, loc="left")
    steps = range(0, STEPS + 1, 100)
    first.plot(
        steps, [(1 - DECAY) ** step for step in steps], color=LIGHT.muted, lw=4, alpha=0.4, label="exact"
    )
    for index, rounding in enumerate(FORMATS):
        means = decays(rounding)
        first.plot(steps, means, color=LIGHT.palette[index], ls=DASHES[rounding], label=rounding)
        print(f"decay, {rounding}: {means[-1]:.6f} after {STEPS} steps; exact {(1 - DECAY) ** STEPS:.6f}")
    first.legend(frameon=False, fontsize=8, labelcolor=LIGHT.text)
    for axes, size in zip(others, ("small", "large"), strict=True):
        _gaps(axes, out, size)
    figure.savefig(path)


def _gaps(axes: Axes, out: Path, size: str) -> None:
    style_axes(axes, LIGHT, "steps")
    axes.set_title(f"{size} model: bits per byte above float32's", color=LIGHT.text, fontsize=10, loc="left")
    for index, rule in enumerate(RULES):
        for rounding in FORMATS:
            steps, means, spreads = zip(*list(above(out, size, rule, rounding))[2:], strict=True)
            style = series_style(LIGHT, index)
            label = f"{rule}, {rounding}"
            axes.errorbar(
                steps,
                means,
                spreads,
                color=style.color,
                ls=DASHES[rounding],
                marker=style.marker,
                ms=4,
                lw=1.2,
                elinewidth=0.7,
                label=label,
            )
            print(f"{size}, {label}: {means[-1]:+.3f} ± {spreads[-1]:.3f}")
    axes.axhline(0, color=LIGHT.text, lw=0.6)
    axes.legend(frameon=False, fontsize=7, labelcolor=LIGHT.text)


def main() -> None:
    """Read the options, draw and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/low_bit"), help="the study's folder")
    parser.add_argument("--figure", type=Path, default=Path("docs/bfloat16.png"))
    options = parser.parse_args()
    draw(options.out, options.figure)


if __name__ == "__main__":
    main()
