"""The text task with a model of more than a million parameters, after the same task with 0.27 million.

Each optimizer's lr and weight decay are searched within a factor of four of the best of the smaller model
(benchmarks/evidence/text/500-steps), then trained with other seeds. Run it again to go on where it was
interrupted:

  OMP_NUM_THREADS=1 python benchmarks/larger_model.py [OPTIMIZER …]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from steepest.lab import ranking, sweep
from steepest.lab.experiments.sweep import Space
from steepest.lab.progress.plain import Plain
from steepest.lab.tasks import text_task
from steepest.lab.training.optimizers import OptimizerSpec

SMALLER = Path(__file__).parent / "evidence" / "text" / "500-steps"
TRIALS = 4
SEEDS = 3
NARROW = 4.0


def main() -> None:
    """Run the comparison, or resume it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("optimizers", nargs="*", metavar="OPTIMIZER", default=["adamw", "muon", "signum"])
    parser.add_argument("--out", type=Path, default=Path("runs/text-1m"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    best = {row.optimizer: row.best for row in ranking(SMALLER)}

    def space(spec: OptimizerSpec) -> Space:
        return {name: (value / NARROW, value * NARROW) for name, value in best[spec.label].items()}

    sweep(
        text_task(width=160, depth=4),
        arguments.optimizers,
        space,
        trials=TRIALS,
        seeds=SEEDS,
        steps=500,
        out=arguments.out,
        kind="larger-model",
        title="text, 1.3 M parameters, 500 steps",
        notes=[f"lr and weight decay were searched within a factor of {NARROW:g} of the best at 0.27 M."],
        callback=Plain(),
    )


if __name__ == "__main__":
    main()
