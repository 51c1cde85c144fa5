"""Rankings that need no training, for comparison with the models."""

from __future__ import annotations

import torch
from torch import Tensor

from .interactions import Interactions
from .metrics import Cases, HeldOut, Scorer, evaluate
from .synthetic import Synthetic


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


def uniform(cases: Cases) -> Tensor:
    """Score all items the same, which ranks them at random."""
    return torch.zeros(cases.seen.shape, device=cases.seen.device)


def oracle(synthetic: Synthetic) -> Scorer:
    """Score an item by its true probability."""
    return lambda cases: synthetic.tables.probabilities(cases.users, cases.histories[:, -1], cases.seen)


def baselines(data: Interactions | Synthetic) -> dict[str, dict[str, float]]:
    """Return the test metrics of oracle (only for synthetic data), markov, popularity and random."""
    scorers: dict[str, Scorer] = {}
    if isinstance(data, Synthetic):
        scorers["oracle"] = oracle(data)
        data = data.interactions
    scorers |= {"markov": markov(data), "popularity": popularity(data), "random": uniform}
    held_out = HeldOut(data, back=1, width=1)
    return {name: evaluate(scorer, held_out) for name, scorer in scorers.items()}


def _counts(data: Interactions) -> Tensor:
    return torch.bincount(data.seen(2)[1], minlength=data.count + 1).float()
