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

import altair as alt
import pandas as pd
import torch
from low_bit_study import by_label, save

import steepest
from steepest.lab.report.draw import Draw
from steepest.lab.report.theme import styles

RULES = ("lion", "adamw", "muon")
FORMATS = {"stochastic": "bf16, float32", "nearest": "bf16 nearest, float32"}
METRIC = "bits per byte"
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
        gaps = [own.metrics[METRIC] - reference.metrics[METRIC] for own, reference in points]
        yield points[0][0].step, statistics.mean(gaps), statistics.stdev(gaps)


def draw(out: Path, path: Path) -> None:
    """Draw the three panels."""
    steps = range(0, STEPS + 1, 100)
    means = {"exact": [(1 - DECAY) ** step for step in steps], **{each: decays(each) for each in FORMATS}}
    for each in FORMATS:
        print(f"decay, {each}: {means[each][-1]:.6f} after {STEPS} steps; exact {means['exact'][-1]:.6f}")
    rows = [(name, *point) for name, line in means.items() for point in zip(steps, line, strict=True)]
    decayed = (
        alt.Chart(pd.DataFrame(rows, columns=["weights", "steps", "mean"]))
        .mark_line()
        .encode(
            alt.X("steps:Q"),
            alt.Y("mean:Q", title=None).scale(zero=False),
            alt.Color("weights:N", title=None, sort=[*means]),
            alt.StrokeDash("weights:N", title=None, sort=[*means]),
        )
        .properties(title="a weight of 1, decayed by 1e-6 a step", width=360, height=300)
    )
    panels = [decayed, *(_gaps(out, size) for size in ("small", "large"))]
    alone = {"color": "independent", "shape": "independent", "strokeDash": "independent"}
    save(alt.hconcat(*panels).resolve_scale(**alone), RULES, path)


def _gaps(out: Path, size: str) -> alt.LayerChart:
    rows = []
    for rule in RULES:
        for rounding in FORMATS:
            points = list(above(out, size, rule, rounding))[2:]
            rows += [(rule, rounding, *point) for point in points]
            print(f"{size}, {rule}, {rounding}: {points[-1][1]:+.3f} ± {points[-1][2]:.3f}")
    table = pd.DataFrame(rows, columns=["optimizer", "rounding", "steps", "mean", "spread"])
    table["low"], table["high"] = table["mean"] - table["spread"], table["mean"] + table["spread"]
    channels = Draw(styles(RULES))
    base = alt.Chart(table).encode(alt.X("steps:Q"), color=channels.color(table))
    lines = base.mark_line(strokeWidth=1.5).encode(
        alt.Y("mean:Q", title=None), strokeDash=alt.StrokeDash("rounding:N", title=None, sort=[*FORMATS])
    )
    marks = base.mark_point(size=40).encode(alt.Y("mean:Q"), shape=channels.shape(table))
    spread = base.mark_rule().encode(alt.Y("low:Q"), y2="high:Q")
    title = f"{size} model: bits per byte above float32's"
    return alt.layer(spread, lines, marks).properties(title=title, width=360, height=300)


def main() -> None:
    """Read the options, draw and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/low_bit"), help="the study's folder")
    parser.add_argument("--figure", type=Path, default=Path("docs/bfloat16.png"))
    options = parser.parse_args()
    draw(options.out, options.figure)


if __name__ == "__main__":
    main()
