"""Fine-tuning when memory is short: what do optimizers with little state lose to AdamW?

A byte-level GPT of 0.27 million parameters first trains with AdamW for 2,000 steps on the source of Python's
standard library. Every optimizer then fine-tunes these weights on the text of the language reference, which
`help()` shows and the first training has not seen. The learning rate is searched, weight decay is 0 for all.
Run it again to go on where it was interrupted:

  OMP_NUM_THREADS=1 python benchmarks/fine_tuning.py [OPTIMIZER …]
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from copy import deepcopy
from dataclasses import replace
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics

import torch

import steepest
from steepest.lab import Task, ranking, sweep
from steepest.lab.models.gpt import GPT
from steepest.lab.progress.plain import Plain
from steepest.lab.tasks import text_task
from steepest.lab.tasks.corpus import Corpus, from_path
from steepest.lab.tasks.text import Windows
from steepest.lab.training.schedule import Schedule
from steepest.lab.training.seeding import seeded
from steepest.lab.training.trial import evaluate

SCRATCH = Path(__file__).parent / "evidence" / "text" / "2000-steps"
OPTIMIZERS = ("adamw", "adamw_int8=adamw", "adam_mini", "lion", "signum", "sgd_sai", "simba_leaky", "signgsd")
PRETRAINING = 2_000
STEPS = 300
TRIALS = 8
SEEDS = 5


def language_reference() -> Corpus:
    """Return the language reference, split by topic; of a paragraph in several topics, the first copy only.

    Some topics contain others, so held-out text would otherwise be in the training data, too.
    """
    seen: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        for name, text in sorted(topics.items()):
            paragraphs = dict.fromkeys(text.strip().split("\n\n"))
            (Path(folder) / name).write_text("\n\n".join(p for p in paragraphs if p not in seen), "utf-8")
            seen.update(paragraphs)
        return replace(from_path(Path(folder)), source="Python's language reference")


def pretrained(task: Task[Windows], path: Path) -> GPT:
    """Return the model that every optimizer starts from, trained now unless `path` holds its weights."""
    with seeded(0):
        model = task.make(0)
    assert isinstance(model, GPT)
    if path.exists():
        model.load_state_dict(torch.load(path))
        return model
    (best,) = (row.best for row in ranking(SCRATCH) if row.optimizer == "adamw")
    optimizer = steepest.build(model, "adamw", **best)
    scheduler = Schedule().attach(optimizer, PRETRAINING)
    for batch in islice(task.batches(0), PRETRAINING):
        optimizer.zero_grad()
        task.loss(model, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(model.state_dict(), partial)
    partial.replace(path)
    return model


def fine_tuning(model: GPT) -> Task[Windows]:
    """Return the task that starts from the model's weights, whatever the seed, which orders the data."""
    task = text_task(corpus=language_reference(), width=96)
    weights = b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())
    return replace(
        task,
        name="fine-tuning",
        make=lambda seed: deepcopy(model),
        evaluations=8,
        config={**task.config, "weights_fingerprint": hashlib.sha256(weights).hexdigest()[:12]},
    )


def main() -> None:
    """Run the comparison, or resume it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("optimizers", nargs="*", metavar="OPTIMIZER", default=OPTIMIZERS)
    parser.add_argument("--out", type=Path, default=Path("runs/fine-tuning"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    source = text_task(width=96)
    model = pretrained(source, arguments.out / "pretrained.pt")
    task = fine_tuning(model)
    before, on_source = (evaluate(each, model, "test")["bits per byte"] for each in (task, source))
    labels = [entry.partition("=")[0] for entry in arguments.optimizers]
    settings = [f"{label}.weight_decay=0" for label in labels]
    if "adamw_int8" in labels:
        settings.append("adamw_int8.state_dtype=int8")
    sweep(
        task,
        arguments.optimizers,
        settings=settings,
        trials=TRIALS,
        seeds=SEEDS,
        steps=STEPS,
        out=arguments.out,
        kind="fine-tuning",
        title=f"fine-tuning 0.27 M parameters on the language reference, {STEPS} steps",
        notes=[
            f"All runs start from one model, trained with AdamW for {PRETRAINING:,} steps on the source of "
            f"Python's standard library, where it has {on_source:.2f} bits per byte on test data. On the "
            f"test data of the language reference it has {before:.3f} before the first step.",
            "The seeds differ in the order of the data. Weight decay is 0 for all, with the defaults, too.",
        ],
        callback=Plain(),
    )


if __name__ == "__main__":
    main()
