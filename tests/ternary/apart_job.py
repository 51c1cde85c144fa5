"""The training of one rank of several whose gradients are not averaged: only the votes are summed."""

import torch

import steepest
from steepest.ternary import flip_stats

from .models import accumulators, loss_of, small_model, snapshot, taken

FAULTS = ("none", "retry", "skip", "raise", "changed")


def train(rank, world, fault):
    model = small_model()
    # With lr = 0, gradients that are not averaged do not matter.
    nonfinite = "raise" if fault == "raise" else "skip"
    optimizer = steepest.build(
        model, "sgd", lr=0.0, nonfinite=nonfinite, ternary={"threshold": 2, "zero_pull": 0.1}
    )
    seen = {"raised": False}
    for step in range(4):
        if step == 2 and fault == "changed":
            # More votes by magnitude than a byte holds, none of them from the second rank.
            optimizer.param_groups[-1]["votes"] = "magnitude"
            for at in range(20 if rank == 0 else 0):
                loss_of(model, 100 + at).backward()
        else:
            loss_of(model, step * world + rank).backward()
        if step == 1 and rank == 1 and fault in ("skip", "raise"):
            model[4].weight.grad[0, 0] = float("nan")
        before = snapshot(model)
        if step == 1 and fault == "retry":
            take, optimizer._take = optimizer._take, failing
            try:
                optimizer.step()
            except OSError:
                seen["raised"] = True
            optimizer._take = take
            unchanged(model, before)
        try:
            optimizer.step()
        except FloatingPointError:
            seen["raised"] = True
        if step == 1 and fault in ("skip", "raise"):
            unchanged(model, before)
        optimizer.zero_grad()
    counters = {f"a.{name}": a for name, a in accumulators(optimizer).items()}
    saved = {**snapshot(model), **counters, "taken": torch.tensor(taken(optimizer))}
    counted = {"skipped": optimizer.skipped_steps, "flips": flip_stats(optimizer).total_flips, **seen}
    return saved, counted


def failing(batches, finite):
    """A failure in every process, after the ranks have synchronized."""
    raise OSError


def unchanged(model, before):
    """Raise if anything has moved."""
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())
