from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from steepest.lab.tasks.sasrec.interactions import Interactions
from steepest.lab.tasks.sasrec.metrics import Cases, HeldOut, evaluate, expected_at, markov


def naive(data: Interactions, scores: Tensor, back: int, k: int = 10) -> tuple[float, float]:
    """Sort each user's candidates; average over every order of those with the same score."""
    ndcg = hits = 0.0
    for user, sequence in enumerate(data.items.split(data.lengths.tolist())):
        *seen, target = sequence.tolist()[: len(sequence) - back + 1]
        candidates = [item for item in range(1, data.count + 1) if item not in seen and item != target]
        own = scores[user, target].item()
        others = [scores[user, item].item() for item in candidates]
        above, equal = sum(s > own for s in others), sum(s == own for s in others)
        for rank in range(above + 1, above + equal + 2):
            if rank <= k:
                hits += 1 / (equal + 1)
                ndcg += 1 / math.log2(rank + 1) / (equal + 1)
    return ndcg / data.users, hits / data.users


@pytest.fixture
def data() -> Interactions:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 20, (101,), generator=generator)
    # Items may repeat, so a target may have been seen.
    items = torch.randint(1, 31, (int(lengths.sum()),), generator=generator)
    return Interactions(items, lengths, 30, "random")


@pytest.mark.parametrize("back", [1, 2])
@pytest.mark.parametrize("levels", [1, 4, 1_000_000])  # many ties, or none
def test_ranking_agrees_with_sorting_each_user(data: Interactions, back: int, levels: int) -> None:
    scores = torch.randint(levels, (data.users, 31), generator=torch.Generator().manual_seed(1)).float()
    held_out = HeldOut(data, back, width=5, chunk=16)
    measured = evaluate(lambda cases: scores[cases.users], held_out)
    assert (measured["NDCG@10"], measured["HR@10"]) == pytest.approx(naive(data, scores, back))


def one_user(target_score: float, others: list[float], seen: tuple[int, ...] = (1, 2)) -> dict[str, float]:
    """Rank item 3 after a history of `seen`, with the scores of items 4, 5, … given."""
    data = Interactions(torch.tensor([*seen, 3]), torch.tensor([len(seen) + 1]), 3 + len(others), "one user")
    scores = torch.tensor([[99.0, 50.0, 60.0, target_score, *others]])
    return evaluate(lambda cases: scores, HeldOut(data, 1, 2), loss=True)


def test_rank_ten_counts_and_rank_eleven_does_not() -> None:
    others = [float(score) for score in range(20)]
    tenth, eleventh = one_user(10.5, others), one_user(9.5, others)
    assert tenth["HR@10"] == 1
    assert tenth["NDCG@10"] == pytest.approx(1 / math.log2(11))
    assert eleventh["HR@10"] == eleventh["NDCG@10"] == 0


def test_neither_seen_items_nor_padding_compete() -> None:
    # Items 0, 1 and 2 have the highest scores.
    assert one_user(1.0, [0.0] * 30)["NDCG@10"] == 1


def test_a_target_seen_before_is_still_ranked() -> None:
    assert one_user(1.0, [0.0] * 30, seen=(1, 2, 3))["HR@10"] == 1


@pytest.mark.parametrize("value", [0.0, math.nan, -math.inf])
def test_a_constant_scorer_is_a_random_order(value: float) -> None:
    measured = one_user(value, [value] * 39)
    assert measured["HR@10"] == pytest.approx(10 / 40)
    assert measured["NDCG@10"] == pytest.approx(sum(1 / math.log2(r + 1) for r in range(1, 11)) / 40)


def test_the_loss_is_the_expectation_over_a_sampled_negative() -> None:
    others = [0.3, -1.0, 2.0]
    by_hand = math.log1p(math.exp(-0.7)) + sum(math.log1p(math.exp(s)) for s in others) / 3
    assert one_user(0.7, others)["loss"] == pytest.approx(by_hand)


def test_a_tie_across_the_tenth_place() -> None:
    ndcg, hits = expected_at(10, torch.tensor([8]), torch.tensor([12]))  # ranks 9 to 13, a fifth each
    assert hits.item() == pytest.approx(2 / 5)
    assert ndcg.item() == pytest.approx((1 / math.log2(10) + 1 / math.log2(11)) / 5)


def test_markov_counts_the_training_transitions_within_a_user() -> None:
    # Each user's last two items, here 9, are held out.
    items = torch.tensor([1, 2, 1, 2, 9, 9, 3, 1, 2, 9, 9])
    data = Interactions(items, torch.tensor([6, 5]), 9, "two users")
    (cases,) = HeldOut(data, 2, width=1)
    scores = markov(data)(cases._replace(histories=torch.tensor([[2], [1]])))
    assert scores.floor()[:, :4].tolist() == [[0, 1, 0, 0], [0, 0, 3, 0]]  # not 2 → 3, between the users
    assert scores.floor().sum() == 4
    # Ties go to the more popular: 1 and 2 thrice, 3 once, out of 7.
    torch.testing.assert_close(scores.frac()[0, :4], torch.tensor([0, 3 / 8, 3 / 8, 1 / 8]))


def test_no_target_is_in_its_history(data: Interactions) -> None:
    distinct = Interactions(torch.arange(1, 41), torch.tensor([3, 17, 20]), 40, "no item twice")
    ends = [3, 20, 40]
    for back in (1, 2):
        (cases,) = HeldOut(distinct, back, width=4)
        assert isinstance(cases, Cases)
        assert cases.targets.tolist() == [end - back + 1 for end in ends]
        assert cases.histories[1:, -1].tolist() == [end - back for end in ends[1:]]
        assert not cases.seen.gather(1, cases.targets.unsqueeze(1)).any()
        assert cases.seen.sum(1).tolist() == [1 + n - back for n in (3, 17, 20)]
