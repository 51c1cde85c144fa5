"""The original Simba study, repeated: SASRec with Lion, Simba and rules between them, and a reversal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch

from ...analysis.target import steps_to_target
from ...analysis.welch import SIGNIFICANT, welch
from ...defaults import SASREC_OPTIMIZERS, SASREC_VARIANTS, InteractionFormat
from ...errors import LabError
from ...files import parse_path
from ...records import Experiment, Record
from ...tasks.sasrec.interactions import read_interactions
from ...tasks.sasrec.metrics import baselines
from ...tasks.sasrec.synthetic import Synthetic, generate
from ...tasks.sasrec.task import next_item_task, reversal_task
from ...tasks.task import Task
from ...training.schedule import Schedule
from ..sweep import Result, sweep

SETTINGS = (
    "simba_sign_m.memory=momentum",
    "simba_lions_choice.choice=lion",
    "simba_always_m.memory=momentum",
    "simba_always_m.choice=memory",
)


class Original(NamedTuple):
    """A row of the original study's table."""

    hits: float
    ndcg: float
    loss: float


ORIGINAL = {
    "lion": Original(0.0690, 0.0381, 0.1451),
    "signgsd": Original(0.0420, 0.0213, 0.6655),
    "simba": Original(0.0195, 0.0094, 0.8730),
    "simba_sign_m": Original(0.0693, 0.0378, 0.1457),
    "simba_lions_choice": Original(0.0296, 0.0152, 0.5787),
    "simba_always_m": Original(0.0667, 0.0358, 0.1427),
}
ORIGINAL_MARGIN = 2 * math.sqrt(2) * 0.001
"""Two standard deviations of the difference of two HR@10, if each has the 0.001 seen on Amazon Beauty."""

RECOVERED = 0.9
"""The share of NDCG@10 before the reversal that counts as recovered."""

Scores = Mapping[str, Sequence[float]]
"""A test metric by optimizer, a value per final seed."""


def run(
    out: str | Path,
    data: Path | None = None,
    *,
    format: InteractionFormat | None = None,
    core: int = 5,
    seeds: int = 5,
    steps: int | None = None,
    reversal: bool = True,
    optimizers: Iterable[str] = SASREC_OPTIMIZERS,
    device: str | torch.device = "cpu",
    **options: Any,
) -> list[Result]:
    """Run the study, or resume it.

    Each optimizer has the same search of lr and weight decay, then final seeds. With the best
    hyper-parameters and a constant learning rate, each then trains on synthetic data whose successor tables
    are reversed after half of the steps.

    Args:
        out: The folder; its subfolders are `comparison` and `reversal`.
        data, format, core: See `read_interactions`; by default synthetic interactions.
        optimizers: Labels of `SASREC_OPTIMIZERS`.
        seeds, steps, options: See `steepest.lab.sweep`.

    Returns:
        The comparison, whose experiment has what comes out among its notes, and the `reversal`, if wanted.

    Raises:
        LabError: the file cannot be read, an optimizer is unknown, or `out` holds another experiment.
    """
    out = parse_path(out)
    found = generate() if data is None else read_interactions(data, format, core)
    task = next_item_task(found, device=device)
    optimizers = [*optimizers]
    if unknown := set(optimizers) - {*SASREC_OPTIMIZERS}:
        raise LabError(
            f"the study has no {', '.join(sorted(unknown))}: it has {', '.join(SASREC_OPTIMIZERS)}"
        )
    measured = baselines(found)

    def compare(task: Task[Any], part: str, labels: Sequence[str], *space: Any, **more: Any) -> Result:
        own = [setting for setting in SETTINGS if setting.partition(".")[0] in labels]
        return sweep(
            task,
            [f"{label}=simba" if label in SASREC_VARIANTS else label for label in labels],
            *space,
            seeds=seeds,
            out=out / part,
            name=f"{out.name}-{part}",
            kind="sasrec",
            **{**options, **more, "settings": [*own, *more.get("settings", ())]},
        )

    title = f"SASRec with sign memories: {task.config['data']}"
    result = compare(task, "comparison", optimizers, steps=steps, title=title)
    results = [result]
    best = {record.optimizer: record.searched for record in result.records if record.phase == "tuned"}
    if reversal and best:
        second = compare(
            reversal_task(steps=steps or task.steps, device=device),
            "reversal",
            [*best],
            {},
            title="SASRec: successor tables reversed in mid-training",
            settings=[f"{label}.{name}={v}" for label, values in best.items() for name, v in values.items()],
            schedule=Schedule("constant"),
            timing_seconds=0,
            notes=["The hyper-parameters are those that the comparison's search found best."],
        )
        results.append(second)
    notes = [
        *describe_data(found, measured),
        *compare_with_original(result.records),
        *compare_with_popularity(result.records, measured["popularity"]["HR@10"], int(task.config["users"])),
        *(note for each in results[1:] for note in compare_recoveries(each.experiment, each.records)),
    ]
    # Only the file has these notes, not the database: they change as optimizers and seeds are added.
    results[0] = replace(result, experiment=result.experiment.model_copy(update={"notes": notes}))
    results[0].experiment.save(result.directory)
    return results


def describe_data(data: object, measured: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """Yield the sentences on the data, rankings without training, and the original study's figures."""
    if isinstance(data, Synthetic):
        yield (
            "The data are synthetic, so only the optimizers' order can be compared with the original "
            "study's, not the figures."
        )
    rankings = "; ".join(f"{name} {m['NDCG@10']:.4f}, {m['HR@10']:.4f}" for name, m in measured.items())
    yield f"NDCG@10 and HR@10 of rankings without training, on the test data: {rankings}."
    rows = "; ".join(f"{label} {p.hits:.4f}, {p.ndcg:.4f}, {p.loss:.4f}" for label, p in ORIGINAL.items())
    yield (
        f"The original study's HR@10, NDCG@10 and loss: {rows}. It names no data set; on the nearest, Amazon "
        "Beauty, a tuned SASRec with Adam has HR@10 0.065 ± 0.001 and NDCG@10 0.034."
    )


def compare_with_original(records: Sequence[Record]) -> Iterator[str]:
    """Yield the sentences on the original study's ordering and on what makes the difference."""
    # A single seed has no spread to test with.
    scores = {label: values for label, values in tuned_scores(records).items() if len(values) > 1}
    known = sorted(ORIGINAL.keys() & scores.keys(), key=lambda label: -ORIGINAL[label].hits)
    agree: list[str] = []
    opposite: list[str] = []
    ties: list[str] = []
    for a, b in combinations(known, 2):
        if ORIGINAL[a].hits - ORIGINAL[b].hits > ORIGINAL_MARGIN:
            change, p = difference(scores, b, a)
            found = ties if not p < SIGNIFICANT else agree if change > 0 else opposite
            found.append(f"{a} above {b}")
    if total := len(agree) + len(opposite) + len(ties):
        yield (
            f"Of {total} pairs whose HR@10 in the original study differ by more than {ORIGINAL_MARGIN:.4f}, "
            f"{len(agree)} come out in its order by NDCG@10 (p < {SIGNIFICANT}), {len(opposite)} in the "
            f"opposite order, and {len(ties)} cannot be told apart."
        )
    if opposite:
        yield f"In the original study, but the opposite here: {'; '.join(opposite)}."
    if ties:
        yield f"In the original study, but not told apart here: {'; '.join(ties)}."
    yield from _what_matters(scores)
    if {"simba", "simba_leaky"} <= scores.keys():
        change, p = difference(scores, "simba", "simba_leaky")
        yield f"Simba-leaky instead of Simba changes NDCG@10 by {change:+.4f} (p = {p:.2g})."


def _what_matters(scores: Scores) -> Iterator[str]:
    replacements = {
        "the momentum's sign instead of the counts', with the same threshold": ("simba", "simba_sign_m"),
        "Lion's choice instead of the threshold, with the same counts": ("simba", "simba_lions_choice"),
        "no choice instead of the threshold, with the same momentum": ("simba_sign_m", "simba_always_m"),
    }
    changes = []
    for text, (a, b) in replacements.items():
        if {a, b} <= scores.keys():
            change, p = difference(scores, a, b)
            changes.append((change, p))
            theirs = f"{ORIGINAL[b].ndcg - ORIGINAL[a].ndcg:+.4f} in the original study"
            yield f"Taking {text}, changes NDCG@10 by {change:+.4f} (p = {p:.2g}); {theirs}."
    if len(changes) < len(replacements):
        return
    (memory, p), *choices = changes
    choice = max((abs(change) for change, q in choices if q < SIGNIFICANT), default=0.0)
    if not p < SIGNIFICANT:
        verdict = "the choice matters, not the momentum's sign" if choice else "neither can be seen to matter"
    elif not choice:
        verdict = "the momentum's sign matters, not the choice"
    else:
        verdict = f"both matter, {'the momentum' if abs(memory) > choice else 'the choice'} more"
    yield f"So here {verdict}; the original study says that the momentum's sign matters."


def compare_with_popularity(records: Sequence[Record], popularity: float, users: int) -> Iterator[str]:
    """Yield the sentence on which tuned optimizers beat popularity by more than three standard errors."""
    below = []
    for label, values in tuned_scores(records, "HR@10").items():
        share = fmean(values)
        error = math.sqrt((share * (1 - share) + popularity * (1 - popularity)) / users)
        if share - popularity <= 3 * error:
            below.append(label)
    if below:
        yield f"Not three standard errors (over the users) above popularity's HR@10: {', '.join(below)}."
    else:
        yield "Every tuned optimizer's HR@10 is three standard errors (over the users) above popularity's."


def compare_recoveries(experiment: Experiment, records: Sequence[Record]) -> Iterator[str]:
    """Yield the sentence on how long each optimizer needs to recover from the reversal."""
    switch = int(experiment.config["reversed_after"])
    parts = []
    for label in experiment.optimizers:
        own = [r for r in records if r.optimizer == label and r.finished]
        if not own:
            parts.append(f"{label} diverged")
            continue
        before, after = (
            fmean(at_reversal(r, switch)[name] for r in own) for name in ("NDCG@10 before", "NDCG@10")
        )
        times = [steps for record in own if (steps := recovery(record, switch)) is not None]
        if len(times) < len(own):
            text = f"{len(own) - len(times)} of {len(own)} seeds not within {experiment.steps - switch}"
        else:
            text = f"{fmean(times):.0f}" + (f" ± {stdev(times):.0f}" if len(times) > 1 else "")
        parts.append(f"{label} {before:.3f} → {after:.3f}, {text}")
    yield (
        f"Reversal after step {switch}, at the tuned hyper-parameters, but with a constant learning rate: "
        f"NDCG@10 before → after it, and the steps until it is again {RECOVERED:.0%} of what it was before: "
        f"{'; '.join(parts)}."
    )


def tuned_scores(records: Sequence[Record], metric: str = "NDCG@10") -> dict[str, list[float]]:
    """Return a test metric by optimizer, for the tuned trials that did not diverge."""
    scores: dict[str, list[float]] = {}
    for record in records:
        if record.phase == "tuned" and record.test is not None:
            scores.setdefault(record.optimizer, []).append(record.test[metric])
    return scores


def difference(scores: Scores, a: str, b: str) -> tuple[float, float]:
    """Return the mean of `b` minus that of `a`, and the p-value of Welch's test."""
    return fmean(scores[b]) - fmean(scores[a]), welch(scores[a], scores[b])


def at_reversal(record: Record, switch: int) -> dict[str, float]:
    """Return the metrics at the last evaluation before the reversal."""
    return next(each for each in reversed(record.validation) if each.step <= switch).metrics


def recovery(record: Record, switch: int) -> float | None:
    """Return the steps from the reversal until NDCG@10 has recovered; None if it has not."""
    curve = [(each.step - switch, -each.metrics["NDCG@10"]) for each in record.validation]
    last = max(step for step, _ in curve if step <= 0)
    target = -RECOVERED * at_reversal(record, switch)["NDCG@10 before"]
    steps = steps_to_target([point for point in curve if point[0] >= last], target)
    return None if steps is None else max(0.0, steps)
