from __future__ import annotations

from pathlib import Path

import pytest
import torch

from steepest.lab import race
from steepest.lab.tasks import digits_task
from steepest.lab.tasks.digits import load


def test_the_split_is_fixed_stratified_and_complete() -> None:
    (images, labels), (test_images, test_labels) = load()
    assert images.shape == (1437, 1, 8, 8)
    assert test_images.shape == (360, 1, 8, 8)
    assert (images.min(), images.max()) == (0, 1)
    shares = torch.bincount(test_labels) / torch.bincount(torch.cat((labels, test_labels)))
    assert shares.sub(0.2).abs().max() < 0.01
    assert torch.equal(test_images, load()[1][0])


def test_an_epoch_contains_no_digit_twice() -> None:
    task = digits_task(batch=100)
    shown = torch.cat([images for images, _ in task.batches(3)])
    assert len(shown) == 1400
    (images, _), _ = load()
    # A few digits are identical pixel by pixel, so allow as many duplicates as the data has.
    assert len(shown.unique(dim=0)) >= 1400 - (len(images) - len(images.unique(dim=0)))


@pytest.mark.parametrize("model", ["mlp", "convnet"])
def test_adamw_learns_to_classify_digits(model: str, tmp_path: Path) -> None:
    task = digits_task(model)  # type: ignore[arg-type]
    result = race(task, ["adamw"], trials=2, seeds=1, steps=250, out=tmp_path, report=False)
    assert result.rows[0].metric > 90
    assert result.records[0].validation[0][2] < 30


def test_an_unknown_model_is_rejected() -> None:
    with pytest.raises(ValueError, match="'mlp' or 'convnet'"):
        digits_task("transformer")  # type: ignore[arg-type]
