from __future__ import annotations

import pytest
import torch

from steepest.lab.tasks.digits import digits_task, load
from steepest.lab.training.optimizers import resolve_optimizers
from steepest.lab.training.trial import Trial, run_trial


def test_the_split_is_fixed_stratified_disjoint_and_complete() -> None:
    from sklearn.datasets import load_digits

    parts = load()
    assert [images.shape for images, _ in parts] == [(1079, 1, 8, 8), (359, 1, 8, 8), (359, 1, 8, 8)]
    everything = torch.cat([images for images, _ in parts]).flatten(1).mul(16).long()
    original = torch.from_numpy(load_digits().data).long()
    # A few digits are identical pixel by pixel, so compare all with their numbers of occurrences.
    for ours, theirs in zip(
        everything.unique(dim=0, return_counts=True), original.unique(dim=0, return_counts=True), strict=True
    ):
        assert torch.equal(ours, theirs)
    whole = torch.bincount(torch.cat([labels for _, labels in parts]))
    for _, labels in parts[1:]:
        assert (torch.bincount(labels) / whole).sub(0.2).abs().max() < 0.01
    for first, second in zip(parts, load(), strict=True):
        assert torch.equal(first[0], second[0])


def test_an_epoch_contains_no_digit_twice_and_none_that_is_held_out() -> None:
    shown = torch.cat([images for images, _ in digits_task(batch=83).batches(3)])
    (images, _), *_ = load()
    assert len(shown) == len(images) == 13 * 83
    assert torch.equal(shown.flatten(1).sort(0).values, images.flatten(1).sort(0).values)


@pytest.mark.parametrize("model", ["mlp", "convnet"])
def test_adamw_learns_to_classify_digits(model: str) -> None:
    task = digits_task(model)  # type: ignore[arg-type]
    (spec,) = resolve_optimizers("adamw", task.make(0))
    record = run_trial(task, spec, Trial("adamw", "tuned", 1, {"lr": 1e-2}, 200))
    assert record.validation[0].metrics["accuracy"] < 30
    assert record.test is not None
    assert record.test["accuracy"] > 90
    assert record.test["cross-entropy"] < 0.4


def test_an_unknown_model_is_rejected() -> None:
    with pytest.raises(ValueError, match="'mlp' or 'convnet'"):
        digits_task("transformer")  # type: ignore[arg-type]
