from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from steepest.lab.tasks.sasrec.metrics import baselines
from steepest.lab.tasks.sasrec.synthetic import Synthetic, SyntheticConfig, generate

CONFIG = SyntheticConfig(users=1000, items=200, clusters=5, successors=3, max_length=16, seed=3)


@pytest.fixture(scope="module")
def data() -> Synthetic:
    return generate(CONFIG)


def transitions(data: Synthetic) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All transitions as users, last items, next items, and which items had been seen by then."""
    rows = []
    for user, sequence in enumerate(data.interactions.items.split(data.interactions.lengths.tolist())):
        seen = torch.zeros(len(sequence), data.interactions.count + 1, dtype=torch.bool)
        seen[:, 0] = True
        for place, item in enumerate(sequence[:-1].tolist()):
            seen[place + 1 :, item] = True
        rows.append((torch.full((len(sequence) - 1,), user), sequence[:-1], sequence[1:], seen[1:]))
    users, last, following, seen = (torch.cat(column) for column in zip(*rows, strict=True))
    return users, last, following, seen


def test_each_source_has_its_share(data: Synthetic) -> None:
    users, last, following, seen = transitions(data)
    assert not seen.gather(1, following.unsqueeze(1)).any()
    successors = torch.zeros_like(seen).scatter_(1, data.tables.successors[last], True) & ~seen
    interesting = (data.tables.interests[users] @ data.tables.popularity > 0) & ~seen
    open_ = successors.any(1)  # transitions with a successor left
    # A successor comes by all three sources, other items of the interests by two, and the rest by one.
    popular = (data.tables.interests[users] @ data.tables.popularity).masked_fill(seen, 0)
    popular /= popular.sum(1, keepdim=True)
    uniform = (~seen).float() / (~seen).sum(1, keepdim=True)
    drawn = torch.nn.functional.one_hot(following, seen.shape[1]).bool()
    for group, share in (
        (successors, 0.6),
        (interesting & ~successors, 0.0),
        (~interesting & ~successors, 0.0),
    ):
        chance = share + 0.3 * (popular * group).sum(1) + 0.1 * (uniform * group).sum(1)
        expected, variance = chance[open_].sum(), (chance * (1 - chance))[open_].sum()
        assert abs((drawn & group).any(1)[open_].sum() - expected) < 4 * variance.sqrt()
        assert expected > 300


def test_the_probabilities_are_those_of_the_sources(data: Synthetic) -> None:
    # A user with all but 30 items seen, so that some of the sources are exhausted.
    seen = torch.ones(1, 201, dtype=torch.bool)
    seen[0, 1:31] = False
    for last in range(1, 201):
        by_hand = torch.zeros(201, dtype=torch.float64)
        sources = [torch.zeros(201, dtype=torch.float64) for _ in range(2)]
        for successor, weight in zip(
            data.tables.successors[last].tolist(), data.tables.weights.tolist(), strict=True
        ):
            sources[0][successor] += weight
        for cluster, share in enumerate(data.tables.interests[7].tolist()):
            sources[1] += share * data.tables.popularity[cluster]
        for source, share in zip(sources, (0.6, 0.3), strict=True):
            source[seen[0]] = 0
            by_hand += share * (source / source.sum() if source.sum() > 0 else (~seen[0]).double() / 30)
        by_hand += 0.1 * (~seen[0]).double() / 30
        measured = data.tables.probabilities(torch.tensor([7]), torch.tensor([last]), seen)[0]
        torch.testing.assert_close(measured.double(), by_hand, atol=1e-6, rtol=1e-5)
        assert measured.sum().item() == pytest.approx(1, abs=1e-5)


def test_sizes_interests_and_popularity(data: Synthetic) -> None:
    lengths = data.interactions.lengths
    assert (lengths.min(), lengths.max(), len(lengths)) == (8, 16, 1000)
    interests = (data.tables.interests > 0).sum(1)
    assert interests.unique().tolist() == [2, 3]
    assert interests.double().mean().item() == pytest.approx(2.5, abs=4 * 0.5 / 1000**0.5)
    ranked = data.tables.popularity[0].sort(descending=True).values
    torch.testing.assert_close(ranked[0] / ranked[:40], torch.arange(1.0, 41.0))
    assert not ranked[40:].any()
    home = data.tables.popularity.argmax(0)  # a successor is in the item's cluster
    inside = [data.tables.popularity[:, item].argmax() for item in range(1, 201)]
    assert all(
        (home[data.tables.successors[item + 1]] == cluster).all() for item, cluster in enumerate(inside)
    )


def test_a_better_informed_ranking_is_better(data: Synthetic) -> None:
    measured = baselines(data)
    assert list(measured) == ["oracle", "markov", "popularity", "random"]
    for metric in ("NDCG@10", "HR@10"):
        values = [measured[name][metric] for name in measured]
        assert values == sorted(values, reverse=True)
        assert values[0] > values[1] + 0.02
        assert values[1] > values[2] + 0.2
    assert list(baselines(data.interactions)) == ["markov", "popularity", "random"]
    assert measured["random"]["HR@10"] == pytest.approx(10 / 189, rel=0.02)  # about 11 items are seen


def test_a_reversed_table_leads_back(data: Synthetic) -> None:
    reverse = generate(replace(CONFIG, reverse=True))
    for rank in range(CONFIG.successors):
        items = torch.arange(1, 201)
        assert torch.equal(reverse.tables.successors[data.tables.successors[items, rank], rank], items)
        assert torch.equal(data.tables.successors[items, rank].sort().values, items)
    assert torch.equal(reverse.tables.interests, data.tables.interests)
    assert torch.equal(reverse.tables.popularity, data.tables.popularity)
    assert torch.equal(reverse.interactions.lengths, data.interactions.lengths)
    assert "reversed" in reverse.interactions.source
    # In the data too: a transition between i and j that the one makes often, the other makes backwards.
    _, last, following, _ = transitions(data)
    _, reverse_last, reverse_following, _ = transitions(reverse)
    counts, reverse_counts = torch.zeros(201, 201), torch.zeros(201, 201)
    counts.index_put_((last, following), torch.ones(len(last)), accumulate=True)
    reverse_counts.index_put_(
        (reverse_last, reverse_following), torch.ones(len(reverse_last)), accumulate=True
    )
    frequent = counts >= 8
    assert reverse_counts.T[frequent].mean() > 4 * reverse_counts[frequent].mean()


def test_the_seed_decides_everything(data: Synthetic) -> None:
    assert generate(CONFIG).interactions.fingerprint == data.interactions.fingerprint
    assert generate(replace(CONFIG, seed=4)).interactions.fingerprint != data.interactions.fingerprint
    assert data.interactions.source == "synthetic data, seed 3"


@pytest.mark.parametrize("sizes", [{"items": 201}, {"items": 10, "clusters": 2}, {"min_length": 2}])
def test_sizes_that_do_not_fit_are_rejected(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"clusters|lengths"):
        replace(CONFIG, **sizes)
