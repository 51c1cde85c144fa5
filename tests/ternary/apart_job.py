"""What one worker of several does where nobody averages the parameters' gradients: only the votes meet."""

import torch

import steepest

from .models import loss_of, small_model, snapshot

FAULTS = ("none", "retry", "skip", "raise", "changed")


def train(rank, world, fault):
    model = small_model()
    # Without a rate, what is not averaged does not matter.
    nonfinite = "raise" if fault == "raise" else "skip"
    optimizer = steepest.build(
        model, "sgd", lr=0.0, nonfinite=nonfinite, ternary={"threshold": 2, "zero_pull": 0.1}
    )
    seen = {"raised": False}
    for step in range(4):
        if step == 2 and fault == "changed":
            # More votes by magnitude than a byte holds, of which the second worker has none itself.
            optimizer.flip.options["votes"] = "magnitude"
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
    accumulators = {f"a.{name}": a for name, a in optimizer.flip.accumulators.items()}
    saved = {**snapshot(model), **accumulators, "taken": optimizer.flip.taken}
    counted = {"skipped": optimizer.skipped_steps, "flips": optimizer.flip.stats().total_flips, **seen}
    return saved, counted


def failing(batches, finite):
    """What goes wrong in every process, after the workers have met."""
    raise OSError


def unchanged(model, before):
    """Raise if anything has moved."""
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())
