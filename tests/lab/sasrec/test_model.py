from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from steepest.lab.tasks.sasrec.model import SASRec, SASRecConfig


@pytest.fixture
def model() -> SASRec:
    torch.manual_seed(0)
    model = SASRec(30, SASRecConfig(maxlen=12, width=16, heads=2))
    for parameter in model.parameters():  # larger than at the start, so that attention is not uniform
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.3)
    return model.eval()


@torch.no_grad()
def test_a_later_item_changes_nothing_before_it(model: SASRec) -> None:
    histories = torch.randint(1, 31, (4, 12))
    for place in (0, 5, 11):
        other = histories.clone()
        other[:, place] = other[:, place] % 30 + 1
        changed = (model(other) - model(histories)).abs().amax((0, 2)) > 0
        assert changed.tolist() == [False] * place + [True] * (12 - place)


@torch.no_grad()
def test_padding_changes_nothing(model: SASRec) -> None:
    items = torch.randint(1, 31, (4, 5))
    padded = F.pad(items, (7, 0))
    torch.testing.assert_close(model(padded)[:, -5:], model(items))
    # Nor does the padding's embedding.
    before = model(padded)[:, -5:]
    model.embedding.weight[0] = 3.0
    torch.testing.assert_close(model(padded)[:, -5:], before)


@torch.no_grad()
def test_the_attention_is_the_paper_s(model: SASRec) -> None:
    attention, x = model.blocks[0].attention, torch.randn(2, 6, 16)
    heads = []
    for columns in (slice(0, 8), slice(8, 16)):
        q, k, v = (
            (x @ layer.weight.T)[..., columns] for layer in (attention.query, attention.key, attention.value)
        )
        logits = (q @ k.mT / math.sqrt(8)).masked_fill(torch.ones(6, 6).triu(1) > 0, -math.inf)
        heads.append(logits.softmax(-1) @ v)
    visible = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    torch.testing.assert_close(attention(x, visible), torch.cat(heads, -1))


def test_the_loss_starts_at_chance_and_ignores_padding() -> None:
    torch.manual_seed(0)
    model = SASRec(200)
    histories, targets, negatives = torch.randint(1, 201, (3, 32, 50))
    assert model.loss(histories, targets, negatives).item() == pytest.approx(2 * math.log(2), abs=0.02)
    model.eval()
    histories[:, :20] = targets[:, :19] = 0
    kept = model.loss(histories[:, 19:], targets[:, 19:], negatives[:, 19:])
    torch.testing.assert_close(model.loss(histories, targets, negatives), kept)


@torch.no_grad()
def test_the_loss_is_of_the_scores(model: SASRec) -> None:
    history, target, negative = (
        torch.tensor([[3, 4, 5]]),
        torch.tensor([[0, 0, 7]]),
        torch.tensor([[1, 1, 9]]),
    )
    scores = model.score(history)[0]
    by_hand = -F.logsigmoid(scores[7]) - F.logsigmoid(-scores[9])
    torch.testing.assert_close(model.loss(history, target, negative), by_hand)


def test_the_padding_has_no_gradient(model: SASRec) -> None:
    model.train()
    model.loss(torch.tensor([[0, 3, 4]]), torch.tensor([[0, 4, 5]]), torch.tensor([[1, 2, 6]])).backward()
    assert model.embedding.weight.grad is not None
    assert not model.embedding.weight.grad[0].any()
    assert model.embedding.weight.grad[1:7].any(1).tolist() == [False, True, True, True, True, True]


@pytest.mark.parametrize("sizes", [{"width": 0}, {"width": 10, "heads": 3}])
def test_sizes_that_do_not_fit_are_rejected(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="width"):
        SASRecConfig(**sizes)  # type: ignore[arg-type]
