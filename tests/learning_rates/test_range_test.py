"""suggest_lr finds the best learning rate where it is known, and leaves everything as it was."""

import random
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import Parameter

import steepest
from steepest.learning_rates import Suggestion


class Bowl(nn.Module):
    """½·h·(w² + b²), for which gradient descent is best at a learning rate of 1/h."""

    def __init__(self, curvature: float = 1.0):
        super().__init__()
        self.curvature = curvature
        self.w, self.b = Parameter(torch.ones(3)), Parameter(torch.ones(3))

    def forward(self, batch):
        return 0.5 * self.curvature * (self.w.square() + self.b.square()).sum()


def loss(model, batch):
    return model(batch)


class Noisy(nn.Module):
    """Everything that a training step may change: buffers, dropout's noise, all random generators."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)

    def forward(self, batch):
        hidden = nn.functional.dropout(self.norm(self.first(batch)).relu(), 0.5, self.training)
        return self.last(hidden + random.random() + np.random.rand())  # noqa: NPY002


def everything(model, optimizer):
    """What must be the same afterwards, as a flat list."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    return [
        *(value.clone() for value in model.state_dict().values()),
        *(None if param.grad is None else param.grad.clone() for param in model.parameters()),
        *(module.training for module in model.modules()),
        *(value.clone() for state in optimizer.state.values() for value in state.values()),
        *({**group, "params": [*map(id, group["params"])]} for group in optimizer.param_groups),
        torch.get_rng_state(),
        python,
        numpy[0],
        numpy[1].tolist(),
        numpy[2:],
    ]


def assert_same(before, after):
    assert len(before) == len(after)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("curvature", [0.03, 1.0, 700.0])
@pytest.mark.parametrize("start", [0.3, 3.0])
def test_it_finds_the_best_learning_rate_of_a_quadratic(curvature, start):
    model = Bowl(curvature)
    optimizer = steepest.SGD(model.parameters(), lr=start / curvature)
    suggestion = steepest.suggest_lr(model, optimizer, [None], loss, steps=8)
    assert 1 / 1.8 < suggestion.lr * curvature < 1.8  # the learning rates tried differ by 3.2
    assert not suggestion.at_edge
    assert suggestion.initial_loss == pytest.approx(3 * curvature)


@pytest.mark.parametrize("make", [torch.optim.AdamW, steepest.AdamW, steepest.Simba])
def test_nothing_changes(make):
    torch.manual_seed(3)
    model = Noisy()
    model.norm.eval()
    optimizer = make(model.parameters(), lr=0.01)
    data = [torch.randn(5, 4) for _ in range(3)]
    objective = lambda model, batch: model(batch).square().mean()  # noqa: E731
    objective(model, data[0]).backward()
    optimizer.step()
    before = everything(model, optimizer)
    shuffled = torch.utils.data.DataLoader(data, batch_size=None, shuffle=True)  # draws from the generator
    first = steepest.suggest_lr(model, optimizer, shuffled, objective, steps=3)
    assert_same(before, everything(model, optimizer))
    second = steepest.suggest_lr(model, optimizer, shuffled, objective, steps=3)
    assert first == second


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_nothing_changes_if_it_is_interrupted(error):
    model = Noisy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    calls = 0

    def interrupted(model, batch):
        nonlocal calls
        calls += 1
        if calls == 6:
            raise error("now")
        return model(batch).square().mean()

    data = [torch.randn(5, 4)]
    before = everything(model, optimizer)
    with pytest.raises(error, match="now"):
        steepest.suggest_lr(model, optimizer, data, interrupted, steps=4)
    assert calls == 6
    assert_same(before, everything(model, optimizer))


def test_every_training_sees_the_same_batches_and_the_same_noise():
    seen = []

    def recorded(model, batch):
        seen.append((batch, torch.rand(1).item(), random.random()))
        return model(None)

    model = Bowl()
    optimizer = steepest.SGD(model.parameters(), lr=1e-3)
    endless = iter(range(10**9))
    steepest.suggest_lr(model, optimizer, endless, recorded, low=1e-3, high=1e-1, steps=3)
    assert len(seen) == 15
    assert seen[:3] == seen[3:6] == seen[12:]
    assert [batch for batch, *_ in seen[:3]] == [0, 1, 2]
    assert next(endless) == 3
    seen.clear()
    steepest.suggest_lr(model, optimizer, ["a", "b"], recorded, low=1e-3, high=1e-1, steps=3)
    assert [batch for batch, *_ in seen[:3]] == ["a", "b", "a"]


def test_groups_keep_their_ratios():
    model = Bowl()
    groups = [{"params": [model.w], "lr": torch.tensor(0.25)}, {"params": [model.b], "lr": 0.025}]
    optimizer = steepest.SGD(groups, lr=0.1)
    suggestion = steepest.suggest_lr(model, optimizer, [None], loss, steps=4)
    assert suggestion.group_lrs == (suggestion.lr, pytest.approx(suggestion.lr / 10))
    assert 0.3 < suggestion.lr < 10  # w is best at 1, b at 10
    assert "groups" in str(suggestion)


def test_independent_decay_does_not_grow_with_the_learning_rate():
    # λ = ½ halves the weights in every step, at any learning rate; scaled with it they would diverge.
    model = Bowl(1e-6)
    optimizer = steepest.SGD(
        model.parameters(), lr=0.1, weight_decay=0.5, weight_decay_method="independent"
    )  # fmt: skip
    suggestion = steepest.suggest_lr(model, optimizer, [None], loss, steps=2)
    assert suggestion.losses == pytest.approx([0.25 * suggestion.initial_loss] * 13, rel=1e-2)


def test_the_edges_of_the_range_are_told():
    model = Bowl()
    optimizer = steepest.SGD(model.parameters(), lr=0.1)
    low = steepest.suggest_lr(model, optimizer, [None], loss, low=1e-4, high=1e-2, steps=4)
    assert (low.at_edge, low.lr) == (True, pytest.approx(1e-2))
    assert low.lrs == pytest.approx([10 ** (k / 2) for k in range(-8, -3)])
    assert "the highest tried: widen the range" in str(low)
    high = steepest.suggest_lr(model, optimizer, [None], loss, low=1.9, high=500, steps=12)
    assert (high.at_edge, high.lr) == (True, 1.9)
    assert "the lowest tried" in str(high)
    assert str(high).count("diverged") == len(high.lrs) - 1


def test_it_draws_a_picture(tmp_path):
    model = Bowl()
    optimizer = steepest.SGD(model.parameters(), lr=0.1)
    suggestion = steepest.suggest_lr(model, optimizer, [None], loss, steps=4)
    suggestion.plot(tmp_path / "lr.png")
    assert (tmp_path / "lr.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_it_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    suggestion = Suggestion(1.0, (1.0,), (1.0,), (1.0,), 1.0, True)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        suggestion.plot("lr.png")


def zero_lr(model):
    return steepest.SGD(model.parameters(), lr=0.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, "steps must be an integer ≥ 1"),
        ({"low": -1.0}, "low must be a finite number > 0"),
        ({"low": 1.0, "high": 0.5}, "high must be above low"),
        ({"batches": []}, "there are no batches"),
        ({"loss": lambda model, batch: 1.0}, "must return a tensor of one element"),
        ({"loss": lambda model, batch: model.w}, "must return a tensor of one element"),
        ({"loss": lambda model, batch: model(None) * torch.nan}, "diverged at every learning rate"),
        (
            {"optimizer": torch.optim.SGD([Parameter(torch.zeros(1))], lr=0.1)},
            "none of the model's parameters",
        ),
        ({"optimizer": zero_lr}, "first group's lr must be > 0"),
    ],
)
def test_errors(change, words):
    model = Bowl()
    given = {"optimizer": steepest.SGD(model.parameters(), lr=0.1), "batches": [None], "loss": loss, **change}
    if given["optimizer"] is zero_lr:
        given["optimizer"] = zero_lr(model)
    with pytest.raises(ValueError, match=words):
        steepest.suggest_lr(model, **given)


def test_a_loss_of_the_original_model_is_refused_and_leaves_no_gradients_there():
    model = Bowl()
    optimizer = steepest.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="does not depend on the model that"):
        steepest.suggest_lr(model, optimizer, [None], lambda _, batch: model(batch))
    assert model.w.grad is None
