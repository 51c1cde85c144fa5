"""Full ranking of all unseen items, HR@k and NDCG@k, and rankings that need no training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .interactions import Interactions
from .model import PADDING
from .synthetic import Synthetic


class Cases(NamedTuple):
    """Some users and their held-out items, `targets`, both of shape (batch,)."""

    users: Tensor
    histories: Tensor
    """The last items before the target, padded with 0 on the left, shape (batch, width)."""
    targets: Tensor
    seen: Tensor
    """Whether an item is in the whole history, or is 0, the padding; shape (batch, items + 1)."""


Scorer = Callable[[Cases], Tensor]
"""Returns the score of each item, shape (batch, items + 1); the highest is ranked first."""


class HeldOut:
    """Each user's item `back` places from the end, and everything before it, `chunk` users at a time.

    Histories are cut to `width` items. Everything lies on `device`.
    """

    def __init__(
        self, data: Interactions, back: int, width: int, device: str | torch.device = "cpu", chunk: int = 512
    ) -> None:
        self.users, self._items = data.users, data.count
        users, items = data.seen(back)
        sizes = torch.searchsorted(users, torch.arange(0, data.users + chunk, chunk)).diff().tolist()
        cases = (torch.arange(data.users), data.histories(back, width), data.held_out(back))
        parts = [torch.split(each, chunk) for each in cases]
        # The row of each seen item within its chunk, and the item.
        parts += [torch.split(each, sizes) for each in (users % chunk, items)]
        self._chunks = [[part.to(device) for part in chunk] for chunk in zip(*parts, strict=True)]

    def __iter__(self) -> Iterator[Cases]:
        for user, history, target, rows, items in self._chunks:
            seen = torch.zeros(len(user), self._items + 1, dtype=torch.bool, device=user.device)
            seen[:, PADDING] = True
            seen[rows, items] = True
            yield Cases(user, history, target, seen)


def evaluate(scorer: Scorer, held_out: HeldOut, *, loss: bool = False) -> dict[str, float]:
    """Rank all unseen items for each user, and return the means of HR@10 and NDCG@10.

    With the target at rank r ≤ 10, HR@10 is 1 and NDCG@10 is 1/log₂(r + 1); below that both are 0. The target
    itself is a candidate even if the user has seen it. Ties are broken at random, and the metrics are the
    expectations over that, so a constant score gives those of a random order. NaN ties with everything.

    With `loss`, for scores that are logits, also the loss: the mean of −log σ of the target's score, plus
    that of −log(1 − σ) over all unseen items, which is the expectation over one sampled negative.
    """
    totals: list[Tensor] = []
    for cases in held_out:
        scores = scorer(cases).double()
        others = ~cases.seen
        others.scatter_(1, cases.targets.unsqueeze(1), False)
        target = scores.gather(1, cases.targets.unsqueeze(1))
        better = ((scores > target) & others).sum(1)
        not_worse = (~(scores < target) & others).sum(1)
        sums = list(expected_at(10, better, not_worse))
        if loss:
            others_loss = (F.softplus(scores) * others).sum(1) / others.sum(1).clamp(min=1)
            sums.append(F.softplus(-target[:, 0]) + others_loss)
        totals.append(torch.stack(sums).sum(1))
    means = torch.stack(totals).sum(0) / held_out.users
    return dict(zip(("NDCG@10", "HR@10", "loss"), means.tolist(), strict=False))


def expected_at(k: int, better: Tensor, not_worse: Tensor) -> tuple[Tensor, Tensor]:
    """Return the expected NDCG@k and HR@k of a target that ties with some others.

    `better` counts the other candidates with a higher score, `not_worse` also those with the same.
    """
    places = torch.arange(k + 1, dtype=torch.float64, device=better.device)
    gains = torch.where(places > 0, 1 / torch.log2(places + 1), 0).cumsum(0)
    # The target is at each of the ranks from better + 1 to not_worse + 1 with the same probability.
    first, last = better.clamp(max=k), (not_worse + 1).clamp(max=k)
    tied = not_worse - better + 1
    return (gains[last] - gains[first]) / tied, (last - first) / tied


def popularity(data: Interactions) -> Scorer:
    """Score an item by its number of training interactions."""
    counts = _counts(data)
    return lambda cases: counts.to(cases.seen.device).expand(cases.seen.shape)


def markov(data: Interactions) -> Scorer:
    """Score an item by how often it followed the last one in training, and ties by popularity."""
    users, items = data.seen(2)
    pairs = torch.stack((items[:-1], items[1:]))[:, users[:-1] == users[1:]]
    size = (data.count + 1, data.count + 1)
    followed = torch.sparse_coo_tensor(pairs, torch.ones(pairs.shape[1]), size, check_invariants=True)
    followed = followed.coalesce()
    counts = _counts(data)
    share = counts / (counts.sum() + 1)  # less than one transition

    def score(cases: Cases) -> Tensor:
        rows = followed.index_select(0, cases.histories[:, -1].cpu()).to_dense() + share
        return rows.to(cases.seen.device)

    return score


def baselines(data: Interactions | Synthetic) -> dict[str, dict[str, float]]:
    """Return the test metrics of oracle (only for synthetic data), markov, popularity and random."""
    scorers: dict[str, Scorer] = {}
    if isinstance(data, Synthetic):
        tables, data = data.tables, data.interactions
        scorers["oracle"] = lambda cases: tables.probabilities(
            cases.users, cases.histories[:, -1], cases.seen
        )
    scorers |= {"markov": markov(data), "popularity": popularity(data)}
    scorers["random"] = lambda cases: torch.zeros(cases.seen.shape, device=cases.seen.device)
    held_out = HeldOut(data, back=1, width=1)
    return {name: evaluate(scorer, held_out) for name, scorer in scorers.items()}


def _counts(data: Interactions) -> Tensor:
    return torch.bincount(data.seen(2)[1], minlength=data.count + 1).float()
