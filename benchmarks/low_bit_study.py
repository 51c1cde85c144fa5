"""Train the lab's text task with state and weights in every format, and compare the results with float32's.

    python benchmarks/low_bit_study.py [--steps 2000] [--seeds 0 1 2] [--out runs/low_bit]
    python benchmarks/low_bit_study.py --report [--figure docs/low_bit.png]

A format is a dtype of the weights, that of the averages, and a master. bfloat16 weights also compute the
model in bfloat16; the loss is float32. Without a master, and with split8, results are rounded
stochastically. Initial weights, data and learning rates are the same in every format. A finished trial is a
line of small/records.jsonl or large/records.jsonl in the folder, and the command resumes after the last one.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import steepest
from steepest.lab.records import Record, read_records, write_records
from steepest.lab.report.draw import Draw, picture
from steepest.lab.report.theme import config, styles
from steepest.lab.tasks import text_task
from steepest.lab.training.optimizers import OptimizerSpec
from steepest.lab.training.trial import Trial, run_trial

SIZES = {"small": {"width": 64, "depth": 1}, "large": {"width": 96, "depth": 2}}

# Of four each, in float32 with the small model and seed 0: the best of Lion and Muon; of AdamW and SGD-SaI a
# smaller one, 0.02 and 0.1 bits per byte behind the best, where runs differ less by chance.
LRS = {"lion": 3e-4, "adamw": 3e-3, "muon": 1e-2, "sgd_sai": 1e-2}
_FALLBACK_LR = 3e-3
_TERNARY = {
    "votes": "sign",
    "threshold": 24,
    "schedule": "annealed",
    "power": 0.3,
    "max_flip_fraction": 0.001,
}


@dataclass(frozen=True)
class Format:
    """How weights and averages are stored."""

    weights: torch.dtype
    averages: torch.dtype | str
    master: str | None = None
    rounding: str = "stochastic"

    def __str__(self) -> str:
        rounding = " nearest" if self.weights == torch.bfloat16 and self.rounding == "nearest" else ""
        master = rounding if self.master is None else f" + {self.master}"
        return f"{_word(self.weights)}{master}, {_word(self.averages)}"


def _word(dtype: torch.dtype | str) -> str:
    return dtype if isinstance(dtype, str) else str(dtype)[6:].replace("bfloat16", "bf16")


_AVERAGES: tuple[torch.dtype | str, ...] = (torch.float32, torch.bfloat16, "int8")
FORMATS = [
    *(Format(torch.float32, averages) for averages in _AVERAGES),
    *(
        Format(torch.bfloat16, averages, master)
        for master in (None, "split8", "split16")
        for averages in _AVERAGES
    ),
    Format(torch.bfloat16, torch.float32, rounding="nearest"),
]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the cross entropy in float32."""
    inputs, targets = batch
    return F.cross_entropy(model(inputs).flatten(0, 1).float(), targets.flatten())


def build(model: nn.Module, values: Mapping[str, Any], *, name: str, form: Format) -> Any:
    """Convert the model's weights, and return its optimizer."""
    model.to(form.weights)
    options: dict[str, Any] = {"master": form.master} if form.master else {}
    if form.weights == torch.bfloat16:
        options["rounding"] = form.rounding
    if name == "muon":
        options["fallback_lr"] = _FALLBACK_LR
    options |= {"state_dtype": form.averages, "seed": torch.initial_seed()}
    return steepest.build(model, name, lr=values["lr"], **options)


def build_ternary(model: nn.Module, values: Mapping[str, Any], *, steps: int) -> Any:
    """Replace the hidden layers by ternary ones that are trained by votes; AdamW trains the rest."""
    steepest.ternary.ternarize(model)
    ternary = {"total_steps": steps, **_TERNARY}
    options = {"weight_decay": 0.0, "seed": torch.initial_seed(), "ternary": ternary}
    return steepest.build(model, "adamw", lr=values["lr"], **options)


def specs(steps: int) -> Iterator[tuple[str, OptimizerSpec]]:
    """Yield each optimizer's name with its spec in each format."""
    for name, lr in LRS.items():
        for form in FORMATS:
            label = f"{name}: {form}"
            yield name, OptimizerSpec(label, functools.partial(build, name=name, form=form), {"lr": lr})
    builder = functools.partial(build_ternary, steps=steps)
    yield "ternary", OptimizerSpec("ternary votes, adamw", builder, {"lr": 3e-3}, changes_model=True)


def run(out: Path, sizes: list[str], steps: int, seeds: list[int]) -> None:
    """Run the trials that are not in the file yet, seed after seed."""
    torch.set_num_threads(1)
    compiled = torch.compile(loss)
    for seed in seeds:
        for size in sizes:
            records = read_records(out / size)
            done = {(record.optimizer, record.seed) for record in records}
            task = replace(text_task(**SIZES[size]), evaluations=8)
            for name, spec in specs(steps):
                if (spec.label, seed) in done:
                    continue
                own = replace(task, loss=loss if name == "ternary" else compiled)
                trial = Trial(spec.label, "search", seed, {"lr": spec.default_lr}, steps)
                records.append(run_trial(own, spec, trial))
                write_records(out / size, records)
                done_in = f"{bits(records[-1]):.4f}, {records[-1].seconds:.0f} s"
                print(f"{size}, seed {seed}, {spec.label}: {done_in}", flush=True)


def bits(record: Record) -> float:
    """Return the bits per byte after the last step, on validation data."""
    return record.validated("bits per byte")


def by_label(out: Path, size: str) -> dict[str, list[Record]]:
    """Return a size's trials by the optimizer and format, in the order of seeds."""
    found: dict[str, list[Record]] = {}
    for record in sorted(read_records(out / size), key=lambda record: record.seed):
        found.setdefault(record.optimizer, []).append(record)
    return found


def bytes_each(form: Format, records: list[Record]) -> float:
    """Return the bytes per parameter of weights and state."""
    return form.weights.itemsize + records[0].state_bytes / records[0].parameters


def gaps(records: list[Record], others: list[Record]) -> list[float]:
    """Return by how much the metric is above that of others with the same seed."""
    known = {other.seed: bits(other) for other in others}
    return [bits(record) - known[record.seed] for record in records if record.seed in known]


def report(out: Path, sizes: list[str]) -> None:
    """Print a table for each size, of differences to float32 with the same seed."""
    for size in sizes:
        found = by_label(out, size)
        names = [name for name in LRS if f"{name}: {FORMATS[0]}" in found]
        any_record = found[f"{names[0]}: {FORMATS[0]}"][0]
        print(f"\n{size}: {any_record.parameters:,} parameters, {any_record.steps:,} steps\n")
        print(f"| weights, averages | {' | '.join(names)} |")
        print(f"| --- | {' | '.join('---' for _ in names)} |")
        for form in FORMATS:
            cells = []
            for name in names:
                records, reference = found.get(f"{name}: {form}", []), found[f"{name}: {FORMATS[0]}"]
                if form == FORMATS[0]:
                    metrics = [bits(record) for record in records]
                    cells.append(f"{statistics.mean(metrics):.3f} ± {_spread(metrics):.3f}")
                else:
                    own = gaps(records, reference)
                    cells.append(f"{statistics.mean(own):+.3f} ± {_spread(own):.3f}" if own else "")
            print(f"| {form} | {' | '.join(cells)} |")
        for label, records in found.items():
            if label.startswith("ternary"):
                metrics = [bits(record) for record in records]
                print(f"\n{label}: {statistics.mean(metrics):.3f} ± {_spread(metrics):.3f}")


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else float("nan")


def draw(out: Path, sizes: list[str], path: Path) -> None:
    """Draw bytes per parameter against the difference to float32, a panel for each size.

    Hollow marks are weights that are rounded to nearest.
    """
    channels, panels = Draw(styles(LRS)), []
    for size in sizes:
        found = by_label(out, size)
        rows = []
        for name in LRS:
            for form in FORMATS:
                records = found.get(f"{name}: {form}", [])
                if own := gaps(records, found.get(f"{name}: {FORMATS[0]}", [])):
                    mean, spread = statistics.mean(own), _spread(own)
                    rows.append(
                        {
                            "optimizer": name,
                            "bytes": bytes_each(form, records),
                            "gap": mean,
                            "low": mean - spread,
                            "high": mean + spread,
                            "hollow": form.rounding == "nearest",
                        }
                    )
        table = pd.DataFrame(rows)
        base = alt.Chart(table).encode(
            alt.X("bytes:Q", title="bytes per parameter of weights and state"), color=channels.color(table)
        )
        marks = [
            base.transform_filter(f"datum.hollow == {str(hollow).lower()}")
            .mark_point(size=60, filled=not hollow)
            .encode(y="gap:Q", shape=channels.shape(table))
            for hollow in (False, True)
        ]
        spread = base.mark_rule().encode(alt.Y("low:Q", title=None), y2="high:Q")
        title = f"{size}: bits per byte above float32's"
        panels.append(alt.layer(spread, *marks).properties(title=title, width=520, height=320))
    save(alt.hconcat(*panels), LRS, path)


def save(chart: alt.HConcatChart, names: Iterable[str], path: Path) -> None:
    """Write a chart as PNG, with the optimizers' colours on a light page."""
    path.write_bytes(picture({**chart.to_dict(), "config": config(styles(names), "light")}, "png"))


def main() -> None:
    """Run the trials, or report them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--out", type=Path, default=Path("runs/low_bit"))
    parser.add_argument("--report", action="store_true", help="only print the tables")
    parser.add_argument("--figure", type=Path, help="with --report: also draw the figure there")
    options = parser.parse_args()
    if not options.report:
        run(options.out, options.sizes, options.steps, options.seeds)
    report(options.out, options.sizes)
    if options.figure is not None:
        draw(options.out, options.sizes, options.figure)


if __name__ == "__main__":
    main()
