"""How the search chooses; `benchmarks/search_samplers.py` compares it with the alternatives."""

from __future__ import annotations

from optuna.samplers import BaseSampler, GPSampler, RandomSampler


def make_sampler(seed: int, number: int, *, anywhere: bool = False) -> BaseSampler:
    """Return a sampler for trial `number` that depends on nothing but its arguments and the finished trials.

    After four trials, at the middle of the ranges and at random, it is a Gaussian process. Made anew for
    every trial, it lets a resumed search go on as if it had never stopped. `anywhere` samples at random: a
    Gaussian process whose best point is a corner of the range repeats itself.
    """
    seed = seed * 100_003 + number
    return RandomSampler(seed) if anywhere else GPSampler(seed=seed, n_startup_trials=4)
