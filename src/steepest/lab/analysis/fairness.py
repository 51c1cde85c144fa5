"""Check a comparison's records against its rules: conditions and warnings, a sentence each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from ..records import FINAL_PHASES, Experiment, Record
from . import frame
from .ranking import Row, tuned
from .welch import SIGNIFICANT

SHORT = 500
"""Below this many steps a ranking says nothing about longer training."""
MIN_SEEDS = 3


def warnings(experiment: Experiment, records: Sequence[Record], rows: Sequence[Row]) -> list[str]:
    """Return what makes the comparison unfair, incomplete or meaningless, the worst first."""
    trials = frame.trials(experiment, records)
    search, final = trials[trials["phase"] == "search"], trials[trials["phase"].isin(FINAL_PHASES)]
    return [
        *_leaks(experiment, search, final),
        *_inequalities(experiment, search, final),
        *_short(experiment, trials),
        *_unfinished(experiment, trials),
        *_outcome(experiment, rows),
    ]


def _leaks(experiment: Experiment, search: pd.DataFrame, final: pd.DataFrame) -> Iterator[str]:
    seen = {experiment.search_seed} if len(search) or experiment.trials else set()
    leaked = (seen | set(search["seed"])) & ({*experiment.seeds} | set(final["seed"]))
    if leaked:
        yield f"Not fair: the search used the final seed {_list(leaked)}, so it tuned to that seed's luck."
    if tested := {record.optimizer for record in search["record"] if record.test}:
        yield f"Not fair: search trials were evaluated on test data ({_list(tested)})."
    for name, own in final[final["phase"] == "tuned"].groupby("optimizer"):
        if own.groupby("steps")["searched"].agg(lambda s: len({str(sorted(v.items())) for v in s})).max() > 1:
            yield f"Not fair: {name}'s final seeds have different hyper-parameters."


def _inequalities(experiment: Experiment, search: pd.DataFrame, final: pd.DataFrame) -> Iterator[str]:
    searched = [name for name, entry in experiment.optimizers.items() if entry.space]
    counts = search.groupby("optimizer").size().reindex(searched, fill_value=0)
    if counts.nunique() > 1:
        each = ", ".join(f"{name} {count}" for name, count in counts.items())
        yield f"Not fair: the optimizers' searches have different numbers of trials: {each}."
    varied = {name for entry in experiment.optimizers.values() for name in entry.space}
    for name, entry in experiment.optimizers.items():
        # An optimizer may lack a hyper-parameter, but what it has must be searched if the others' is.
        if fixed := varied & set(entry.hyperparameters) - set(entry.space):
            yield f"Not fair: {_list(fixed)} was searched for other optimizers, but not for {name}."
    for column in ("schedule", "parameters"):
        if pd.concat([search, final])[column].nunique() > 1:
            yield f"Not fair: the trials differ in their {column}."


def _short(experiment: Experiment, trials: pd.DataFrame) -> Iterator[str]:
    steps = min([experiment.steps, *trials[trials["phase"] != "decayed"]["steps"]])
    if 0 < steps < SHORT:
        yield f"Too short to mean anything: {steps} steps a trial (fewer than {SHORT})."


def _unfinished(experiment: Experiment, trials: pd.DataFrame) -> Iterator[str]:
    if trials.empty:
        if not experiment.costs:
            yield "Not finished: no trial has ended yet."
        return
    hopeless = {name for name, own in trials.groupby("optimizer") if not own["finished"].any()}
    expected = {"tuned": [*experiment.optimizers]}
    if experiment.kind in ("race", "sweep"):
        expected["default"] = [name for name, entry in experiment.optimizers.items() if entry.space]
    for phase, names in expected.items():
        found = tuned(experiment, trials, phase).groupby("optimizer")["seed"].agg(set)
        missing = {n: {*experiment.seeds} - found.get(n, set()) for n in names if n not in hopeless}
        if each := [f"{name} {_list(left)}" for name, left in missing.items() if left]:
            yield f"Not finished: phase {phase} still lacks these seeds: {'; '.join(each)}."
    if len(experiment.seeds) < MIN_SEEDS:
        yield f"Final seeds: {len(experiment.seeds)}, too few for a significance test to mean much."


def _outcome(experiment: Experiment, rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if row.test.diverged:
            yield f"{row.optimizer} diverged with {row.test.diverged} of {row.test.seeds} final seeds."
        elif row.trials and row.diverged_trials == row.trials:
            yield f"{row.optimizer} diverged in every trial of its search."
    edges = [(row.optimizer, name, row.best[name], edge) for row in rows for name, edge in row.edges.items()]
    if at_edge := [f"{label} {name} {value:.3g} ({edge})" for label, name, value, edge in edges]:
        yield f"Best at the edge of what was tried, so a better value may lie beyond: {'; '.join(at_edge)}."
    for reason in dict.fromkeys(experiment.not_run.values()):
        names = [name for name, why in experiment.not_run.items() if why == reason]
        yield f"Not run: {', '.join(names)}: {reason}"


def conditions(experiment: Experiment, records: Sequence[Record]) -> list[str]:
    """Return the conditions under which the optimizers were compared."""
    if not records and experiment.costs:  # it only measured
        return experiment.notes
    spaces = {name for entry in experiment.optimizers.values() for name in entry.space}
    lines = [
        "With the same seed, all optimizers start from the same weights and see the same data in the same "
        "order.",
        f"A trial takes {experiment.steps:,} steps; schedule: {experiment.schedule}.",
        f"The search tries {experiment.trials} settings of {_list(spaces)} per optimizer, all with seed "
        f"{experiment.search_seed}, and sees validation data only."
        if experiment.trials
        else "Nothing was searched: the hyper-parameters were set by hand.",
        f"The table shows {experiment.metric.name} on test data, with the final seeds "
        f"{_list(experiment.seeds)}; ± is the sample standard deviation over the seeds that did not diverge. "
        "An optimizer with fewer diverged seeds ranks before one with a better mean. Untuned: with the "
        "optimizer's defaults.",
    ]
    if "weight_decay" not in spaces:
        values = {str(entry.hyperparameters.get("weight_decay")) for entry in experiment.optimizers.values()}
        lines.append(
            f"Weight decay was not searched: {_list(values)} for all."
            if len(values) == 1
            else "Weight decay was not searched, and differs between the optimizers (see hyper-parameters)."
        )
    lines.append(
        f"Two rows count as different if Welch's t-test over the seeds has p < {SIGNIFICANT} (unpaired, not "
        "corrected for the number of rows); otherwise they tie. The first row is bold only if it differs "
        "from all others."
    )
    if base := experiment.baseline:
        timed = (
            " Seconds are steps × the time of a training step, measured with all optimizers taking turns, "
            "because trials may share a busy machine. “Rerun to that step” trains again with a schedule that "
            "ends there, because a run in mid-schedule cannot be compared with a finished one."
        )
        reached = f"An optimizer matches {base} where its mean validation curve reaches {base}'s final value."
        lines.append(reached + timed * bool(experiment.costs))
    return [*lines, *experiment.notes]


def _list(values: object) -> str:
    return ", ".join(str(value) for value in sorted(values))  # type: ignore[call-overload]
