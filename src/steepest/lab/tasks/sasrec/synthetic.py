"""Made-up interactions with a known structure, so that the best possible ranking is known too."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import LabError
from .interactions import MIN_LENGTH, Interactions

SUCCESSOR, CLUSTER, UNIFORM = 0.6, 0.3, 0.1
"""Probabilities with which the next item is a successor of the last one, comes from a cluster of interest by
popularity, or is any item."""


@dataclass(frozen=True)
class SyntheticConfig:
    """The sizes of a synthetic data set; ``LabError`` if they do not fit together."""

    users: int = 2000
    items: int = 400
    """A multiple of `clusters`."""
    clusters: int = 4
    """Each user is interested in 2 or 3 of them."""
    successors: int = 2
    """Of each item, in its cluster, with weights ∝ 1/rank."""
    min_length: int = 8
    """The numbers of items of a user are uniform between this, at least 3, and the next."""
    max_length: int = 24
    seed: int = 0
    reverse: bool = False
    """Whether every successor table is reversed: where i was followed by j, j is followed by i. Interests,
    popularities and lengths stay as they are."""

    def __post_init__(self) -> None:
        if self.items % self.clusters or self.clusters < 3:
            raise LabError(f"{self.items} items do not fill {self.clusters} clusters, at least 3, evenly")
        if not MIN_LENGTH <= self.min_length <= self.max_length < self.items:
            raise LabError(
                f"lengths {self.min_length} to {self.max_length} must be at least {MIN_LENGTH} "
                f"and fewer than {self.items} items"
            )


@dataclass(frozen=True)
class Tables:
    """What decides each user's next item."""

    successors: Tensor
    """Successors of each item, int64 of shape (items + 1, successors); row 0 is not used."""
    weights: Tensor
    """Probability of each successor."""
    popularity: Tensor
    """Probability of each item in each cluster, shape (clusters, items + 1)."""
    interests: Tensor
    """Probability of each cluster for each user, shape (users, clusters)."""

    def probabilities(self, users: Tensor, last: Tensor, seen: Tensor) -> Tensor:
        """Return the true probability of each item as the next one, shape (batch, items + 1).

        No item comes twice: each of the three sources draws from what is not seen yet, and one that is
        exhausted leaves its share to all items. `users` and their `last` items have the shape (batch,);
        `seen` says which items each has seen, 0, the padding, included: shape (batch, items + 1).
        """
        device = seen.device
        uniform = _unseen(torch.ones(seen.shape, device=device), seen)
        following = torch.zeros_like(uniform)
        weights = self.weights.to(device).expand(len(last), -1)
        following.scatter_add_(1, self.successors.to(device)[last], weights)
        popular = self.interests.to(device)[users] @ self.popularity.to(device)
        total = UNIFORM * uniform
        for share, source in ((SUCCESSOR, following), (CLUSTER, popular)):
            unseen = _unseen(source, seen)
            total += share * torch.where(unseen.isnan(), uniform, unseen)
        return total


@dataclass(frozen=True)
class Synthetic:
    """Synthetic interactions and the tables that made them."""

    tables: Tables
    interactions: Interactions


def generate(config: SyntheticConfig | None = None) -> Synthetic:
    """Generate users, items and interactions.

    Items are in clusters, and the r-th most popular of a cluster has a popularity ∝ 1/r (Zipf). The first
    item is a popular one of the user's interests; `Tables.probabilities` has each next one.

    Example:
        >>> data = generate(SyntheticConfig(users=50, items=30, clusters=3, max_length=10))
        >>> data.interactions.users, data.interactions.source
        (50, 'synthetic data, seed 0')
    """
    config = config or SyntheticConfig()
    generator = torch.Generator().manual_seed(config.seed)
    members = (torch.randperm(config.items, generator=generator) + 1).view(config.clusters, -1)
    successors = torch.zeros(config.items + 1, config.successors, dtype=torch.long)
    for rank in range(config.successors):
        for cluster in members:
            # A cycle through the cluster: each item has one successor and one predecessor of each rank,
            # so a reversed table is a table as well.
            cycle = cluster[torch.randperm(len(cluster), generator=generator)]
            successors[cycle, rank] = cycle.roll(1 if config.reverse else -1)
    weights = _zipf(config.successors)
    popularity = torch.zeros(config.clusters, config.items + 1)
    popularity.scatter_(1, members, _zipf(members.shape[1]).expand_as(members))
    order = torch.rand(config.users, config.clusters, generator=generator).argsort(1).argsort(1)
    chosen = (order < torch.randint(2, 4, (config.users, 1), generator=generator)).float()
    lengths = torch.randint(config.min_length, config.max_length + 1, (config.users,), generator=generator)

    tables = Tables(successors, weights, popularity, chosen / chosen.sum(1, keepdim=True))
    users = torch.arange(config.users)
    seen = torch.zeros(config.users, config.items + 1, dtype=torch.bool)
    seen[:, 0] = True
    items = [torch.multinomial(tables.interests @ popularity, 1, generator=generator)]
    for _ in range(config.max_length - 1):
        seen.scatter_(1, items[-1], True)
        chances = tables.probabilities(users, items[-1][:, 0], seen)
        items.append(torch.multinomial(chances, 1, generator=generator))
    drawn = torch.cat(items, 1)[torch.arange(config.max_length) < lengths.unsqueeze(1)]
    source = f"synthetic data, seed {config.seed}" + ", reversed" * config.reverse
    interactions = Interactions(drawn, lengths, config.items, source)
    return Synthetic(tables, interactions)


def _unseen(weights: Tensor, seen: Tensor) -> Tensor:
    """Normalize the weights of unseen items; NaN where there are none."""
    weights = weights.masked_fill(seen, 0)
    return weights / weights.sum(1, keepdim=True)


def _zipf(count: int) -> Tensor:
    weights = 1 / torch.arange(1, count + 1)
    return weights / weights.sum()
