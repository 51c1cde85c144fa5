from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from steepest.lab.errors import LabError
from steepest.lab.tasks.load import load_task
from steepest.lab.tasks.sasrec.interactions import Interactions
from steepest.lab.tasks.sasrec.metrics import HeldOut, baselines
from steepest.lab.tasks.sasrec.model import SASRecConfig
from steepest.lab.tasks.sasrec.synthetic import SyntheticConfig, generate
from steepest.lab.tasks.sasrec.task import (
    TrainingData,
    next_item_task,
    reversal_task,
    sasrec_task,
)

DATA = SyntheticConfig(users=300, items=60, clusters=3, max_length=14)
LARGER = SyntheticConfig(users=400, items=90, clusters=3, max_length=12)
MODEL = SASRecConfig(width=16, blocks=1, dropout=0.1)


def test_training_never_sees_a_held_out_item() -> None:
    # No item of a user is another user's, so a leak would be seen.
    lengths = torch.tensor([3, 9, 4, 30, 12])
    data = Interactions(torch.arange(1, 59), lengths, 58, "no item twice")
    held_out = {int(item) for back in (1, 2) for item in data.held_out(back)}
    shown: dict[int, int] = {}
    for histories, targets, _ in islice(TrainingData(data, 10, 2, "cpu").batches(0), 40):
        assert histories.shape == targets.shape == (2, 10)
        assert not held_out & {*histories.unique().tolist(), *targets.unique().tolist()}
        real = histories > 0
        assert torch.equal(targets[real], histories[real] + 1)
        shown |= dict(zip(histories[real].tolist(), targets[real].tolist(), strict=True))
    # Everything else is shown, but of user 3, with 28 training items, only the last 11.
    starts = lengths.cumsum(0) - lengths
    expected = [
        item
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)
        for item in range(start + max(0, length - 2 - 11) + 1, start + length - 2)
    ]
    assert sorted(shown) == expected


def test_a_test_history_ends_with_the_validation_item() -> None:
    data = generate(DATA).interactions
    (validation,), (test,) = (list(HeldOut(data, back, 50)) for back in (2, 1))
    assert torch.equal(test.histories[:, -1], validation.targets)
    assert torch.equal(test.histories[:, :-1], validation.histories[:, 1:])
    assert test.seen.gather(1, validation.targets.unsqueeze(1)).all()


def test_negatives_are_uniform_over_what_the_user_has_not_seen() -> None:
    data = generate(DATA).interactions
    stream = TrainingData(data, 50, 4, "cpu")
    users = torch.arange(4)
    negatives = torch.stack([stream._negatives(users, torch.Generator().manual_seed(s)) for s in range(300)])
    for user in users.tolist():
        own = data.histories(2, 14)[user]
        counts = torch.bincount(negatives[:, user].flatten(), minlength=61)[1:].double()
        unseen = torch.ones(60, dtype=torch.bool)
        unseen[own[own > 0] - 1] = False
        # Three redraws leave at most (12 / 60)⁴ of the draws.
        assert counts[~unseen].sum() / counts.sum() < 2 * (len(own[own > 0]) / 60) ** 4 + 1e-3
        mean = counts[unseen].mean()
        assert (counts[unseen] - mean).abs().max() < 5 * mean.sqrt()


def test_batches_follow_the_seed_and_cover_an_epoch() -> None:
    data = generate(DATA).interactions
    task = next_item_task(data, MODEL, batch=100)
    first, again, other = (list(islice(iter(task.batches(seed)), 3)) for seed in (5, 5, 6))
    for (a, b, c), (x, y, z) in zip(first, again, strict=True):
        assert torch.equal(a, x)
        assert torch.equal(b, y)
        assert torch.equal(c, z)
    assert not torch.equal(first[0][0], other[0][0])
    shown = torch.cat([histories for histories, _, _ in first])
    everyone = data.histories(2, shown.shape[1] + 1)[:, :-1]
    assert sorted(shown.tolist()) == sorted(everyone.tolist())


def test_training_beats_popularity_and_follows_a_reversal() -> None:
    task = reversal_task(LARGER, replace(MODEL, width=32), batch=50, steps=300)
    popularity = baselines(generate(LARGER))["popularity"]["NDCG@10"]
    margin = 3 * 0.5 / 400**0.5  # three standard errors, at most, of a mean over 400 users
    torch.manual_seed(0)
    model = task.make(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batches = iter(task.batches(0))
    measured = []
    for _ in range(2):
        for batch in islice(batches, 150):
            optimizer.zero_grad()
            task.loss(model.train(), batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            measured.append(task.evaluate(model.eval(), "test"))
    middle, end = measured
    assert middle["NDCG@10 before"] > max(popularity, middle["NDCG@10"]) + margin
    assert end["NDCG@10"] > max(popularity, end["NDCG@10 before"]) + margin


def test_the_config_tells_data_apart() -> None:
    config = next_item_task(generate(DATA), MODEL).config
    other = next_item_task(generate(replace(DATA, seed=1)), MODEL).config
    assert config["fingerprint"] != other["fingerprint"]
    assert (config["users"], config["items"], config["width"]) == (300, 60, 16)


def test_the_task_by_name_reads_a_file_or_generates(tmp_path: Path) -> None:
    made = load_task("sasrec", {"users": "40", "items": "28", "width": "8"}).config
    assert (made["data"], made["users"], made["items"], made["width"]) == (
        "synthetic data, seed 0",
        40,
        28,
        8,
    )
    path = tmp_path / "own.csv"
    path.write_text("".join(f"{item},{user},5,{item}\n" for user in range(6) for item in range(7)))
    read = load_task("sasrec", {"data": str(path), "format": "amazon-2018", "batch": "4"})
    assert (read.config["data"], read.config["users"], read.config["items"]) == ("own.csv", 6, 7)
    assert read.steps == 1200
    with pytest.raises(LabError, match="width 9 is not a multiple of heads 2"):
        sasrec_task(width=9, heads=2)
    with pytest.raises(LabError, match="do not fill 4 clusters"):
        sasrec_task(items=41)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_metrics_are_the_ones_promised(split: str) -> None:
    task = next_item_task(generate(DATA), MODEL)
    model = task.make(0).eval()
    with torch.no_grad():
        measured = task.evaluate(model, split)  # type: ignore[arg-type]
    assert list(measured) == [metric.name for metric in task.metrics]
    assert task.metric.name == "NDCG@10"
    assert not task.metric.lower_is_better
    assert measured["loss"] == pytest.approx(1.386, abs=0.02)
