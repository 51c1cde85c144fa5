"""The sasrec task: recommend the next item; the metrics are NDCG@10 and HR@10."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...defaults import InteractionFormat
from ...records import Metric
from ..task import Split, Task
from .interactions import Interactions, read_interactions
from .metrics import HeldOut, evaluate
from .model import SASRec, SASRecConfig
from .synthetic import Synthetic, SyntheticConfig, generate

Sequences = tuple[Tensor, Tensor, Tensor]
"""Histories, targets and negatives, each of shape (batch, positions)."""

METRICS = (
    Metric(name="NDCG@10", lower_is_better=False),
    Metric(name="HR@10", lower_is_better=False),
    Metric(name="loss"),
)
_REDRAWS = 3
_STEPS = 1200
_EPOCHS = 100


def sasrec_task(
    data: Path | None = None,
    *,
    format: InteractionFormat | None = None,
    core: int = 5,
    users: int = SyntheticConfig.users,
    items: int = SyntheticConfig.items,
    maxlen: int = SASRecConfig.maxlen,
    width: int = SASRecConfig.width,
    blocks: int = SASRecConfig.blocks,
    heads: int = SASRecConfig.heads,
    dropout: float = SASRecConfig.dropout,
    batch: int | None = None,
    device: str | torch.device = "cpu",
) -> Task[Sequences]:
    """Create the task of `next_item_task` from a file of interactions, or from synthetic ones.

    Args:
        data: A file of interactions; `format` and `core` are as in `read_interactions`. By default synthetic
            ones, of `users` users and `items` items.
        maxlen, width, blocks, heads, dropout: The model's sizes, see `SASRecConfig`.
        batch: Users per step; by default 128 as in the paper (synthetic data: 64).

    Raises:
        LabError: the file cannot be read, or a size does not fit.
    """
    model = SASRecConfig(maxlen=maxlen, width=width, blocks=blocks, heads=heads, dropout=dropout)
    synthetic = SyntheticConfig(users=users, items=items)
    found = generate(synthetic) if data is None else read_interactions(data, format, core)
    return next_item_task(found, model, batch=batch, device=device)


def next_item_task(
    data: Interactions | Synthetic,
    model: SASRecConfig | None = None,
    *,
    batch: int | None = None,
    device: str | torch.device = "cpu",
) -> Task[Sequences]:
    """Create a task that trains SASRec on these interactions, with `batch` users per step.

    Each user's last item is the test target, and the one before it the validation target; the history of a
    test target includes the validation item. The weights with the best validation NDCG@10 are tested. The
    task has 1200 steps, or on other than synthetic data 100 epochs if these are more.
    """
    synthetic = isinstance(data, Synthetic)
    interactions = data.interactions if isinstance(data, Synthetic) else data
    config = model or SASRecConfig()
    stream = TrainingData(interactions, config.maxlen, batch or (64 if synthetic else 128), device)
    width = min(config.maxlen, int(interactions.lengths.max()) - 1)
    held_out = {
        "validation": HeldOut(interactions, 2, width, device),
        "test": HeldOut(interactions, 1, width, device),
    }

    def metrics(model: Any, split: Split) -> dict[str, float]:
        return evaluate(lambda cases: model.score(cases.histories), held_out[split], loss=True)

    return Task(
        name="sasrec",
        make=lambda seed: SASRec(interactions.count, config).to(device),
        batches=stream.batches,
        loss=lambda model, batch: cast(SASRec, model).loss(*batch),
        evaluate=metrics,
        metrics=METRICS,
        steps=_STEPS if synthetic else max(_STEPS, _EPOCHS * (interactions.users // stream.batch)),
        keep_best=True,
        config={
            "data": interactions.source,
            "fingerprint": interactions.fingerprint,
            "users": interactions.users,
            "items": interactions.count,
            "interactions": len(interactions.items),
            "batch": stream.batch,
            **asdict(config),
        },
    )


def reversal_task(
    data: SyntheticConfig | None = None,
    model: SASRecConfig | None = None,
    *,
    batch: int | None = None,
    steps: int = _STEPS,
    evaluations: int = 40,
    device: str | torch.device = "cpu",
) -> Task[Sequences]:
    """Create a task on synthetic data whose successor tables are reversed after half of the steps.

    Its metrics are those on the reversed data, and `NDCG@10 before` on the data as it was before.
    """
    data = data or SyntheticConfig()
    original, task = (
        next_item_task(generate(replace(data, reverse=reverse)), model, batch=batch, device=device)
        for reverse in (False, True)
    )

    def batches(seed: int) -> Iterator[Sequences]:
        yield from islice(original.batches(seed), steps // 2)
        yield from task.batches(seed + 1)

    def evaluate(model: nn.Module, split: Split) -> Mapping[str, float]:
        forgotten = original.evaluate(model, split)["NDCG@10"]
        return {**task.evaluate(model, split), "NDCG@10 before": forgotten}

    return replace(
        task,
        name="sasrec-reversal",
        batches=batches,
        evaluate=evaluate,
        steps=steps,
        metrics=(*METRICS, Metric(name="NDCG@10 before", lower_is_better=False)),
        evaluations=evaluations,
        keep_best=False,
        config={**task.config, "reversed_after": steps // 2},
    )


class TrainingData:
    """Batches of `batch` users' training sequences, everything but their last two items, on `device`."""

    def __init__(self, data: Interactions, maxlen: int, batch: int, device: str | torch.device) -> None:
        self.batch = min(batch, data.users)
        width = min(maxlen, max(1, int(data.lengths.max()) - 3))
        self._sequences = data.histories(2, width + 1).to(device)
        self._stride = data.count + 1
        users, items = data.seen(2)
        self._seen = torch.unique(users * self._stride + items).to(device)

    def batches(self, seed: int) -> Iterator[Sequences]:
        """Yield batches without end; each epoch drops an incomplete last batch."""
        device = self._sequences.device
        generator = torch.Generator(device).manual_seed(seed)
        while True:
            order = torch.randperm(len(self._sequences), generator=generator, device=device)
            whole = order[: len(order) // self.batch * self.batch]
            for users in whole.view(-1, self.batch):
                sequences = self._sequences[users]
                yield sequences[:, :-1], sequences[:, 1:], self._negatives(users, generator)

    def _negatives(self, users: Tensor, generator: torch.Generator) -> Tensor:
        """Draw items uniformly, and draw again where the user's training items contain them."""
        shape = (_REDRAWS + 1, len(users), self._sequences.shape[1] - 1)
        draws = torch.randint(1, self._stride, shape, generator=generator, device=users.device)
        negatives = draws[0]
        # A fixed number of times: to ask whether any is left would wait for the device.
        for redrawn in draws[1:]:
            keys = users.unsqueeze(1) * self._stride + negatives
            found = torch.searchsorted(self._seen, keys).clamp(max=len(self._seen) - 1)
            negatives = torch.where(self._seen[found] == keys, redrawn, negatives)
        return negatives
