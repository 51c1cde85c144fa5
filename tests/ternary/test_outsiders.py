"""Packed weights that something averaged, and votes that nobody takes."""

from __future__ import annotations

import copy
import gc
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import steepest
from steepest.ternary import BinaryLinear, TernaryFlip, TernaryLinear, vote_buffer

MESSAGE = r"TernaryLinear\(64, 64\): packed holds the code 10.*AveragedModel\(use_buffers=False\)"


def made() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(TernaryLinear(64, 64), nn.ReLU(), TernaryLinear(64, 64))


def train(model: nn.Module, flip: TernaryFlip, *averages: AveragedModel) -> None:
    for _ in range(5):
        model(torch.randn(8, 64)).square().sum().backward()
        flip.step()
        flip.zero_grad()
        for average in averages:
            average.update_parameters(model)


AVERAGES = {
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "default": {},
    "by hand": {"avg_fn": lambda old, new, count: 0.5 * old + 0.5 * new},
}


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("training", [True, False])
def test_averaged_buffers_are_refused_and_copied_ones_are_not(average: str, training: bool):
    model = made()
    flip = TernaryFlip(model, threshold=1)
    bad, good = (AveragedModel(model, **AVERAGES[average], use_buffers=use) for use in (True, False))
    train(model, flip, bad, good)
    x = torch.randn(4, 64)
    bad.train(training)
    layer = bad.module[0]
    for use in (bad, lambda x: layer.dense(), lambda x: layer.unpack(), lambda x: bad.state_dict()):
        for _ in range(2):  # it does not get used to it
            with pytest.raises(RuntimeError, match=MESSAGE):
                use(x)
    with pytest.raises(RuntimeError, match=MESSAGE):
        bad.module[2].to_linear()
    for ours, theirs in zip(good.module[::2], model[::2], strict=True):
        assert torch.equal(ours.packed, theirs.packed)
    good(x)
    good.state_dict()
    # For a post-mortem.
    assert torch.equal(dict(bad.module.named_buffers())["0.packed"], layer.packed)
    # Loading repairs it.
    bad.module.load_state_dict(model.state_dict())
    assert torch.equal(bad.eval()(x), model.eval()(x))


def test_an_averaged_state_dict_is_refused():
    """As timm's ModelEmaV2 makes one in place."""
    model = made()
    flip = TernaryFlip(model, threshold=1)
    ema = copy.deepcopy(model).eval()
    averages = ema.state_dict()
    for _ in range(4):
        train(model, flip)
        for ours, theirs in zip(averages.values(), model.state_dict().values(), strict=True):
            ours.copy_(0.9 * ours + 0.1 * theirs)
    for use in (lambda: ema(torch.randn(4, 64)), ema.state_dict):
        with pytest.raises(RuntimeError, match=MESSAGE):
            use()
    with pytest.raises(RuntimeError, match="packed holds the code 10"):
        model.load_state_dict(averages)


@pytest.mark.parametrize("kind", [TernaryLinear, BinaryLinear])
def test_a_state_dict_of_empty_memory_can_be_filled(kind: type[TernaryLinear]):
    """As a distributed checkpoint fills that of a model made on the meta device."""
    layer = kind(64, 64, device="meta").to_empty(device="cpu").eval()
    garbage = torch.full_like(layer.packed, 0b10101010)
    assert garbage._version == 0
    layer.packed = garbage
    saved = kind(64, 64)
    for name, value in layer.state_dict().items():
        value.copy_(saved.state_dict()[name])
    x = torch.randn(4, 64)
    assert torch.equal(layer(x), saved.eval()(x))


def test_weights_that_a_callback_swaps_in_are_looked_at():
    """As Lightning's weight averaging swaps them for validation."""
    model = made()
    flip = TernaryFlip(model, threshold=1)
    average = AveragedModel(model, use_buffers=True)
    train(model, flip, average)
    x = torch.randn(4, 64)
    model.eval()(x)
    for ours, theirs in zip(model.buffers(), average.module.buffers(), strict=True):
        ours.copy_(theirs)
    with pytest.raises(RuntimeError, match=MESSAGE):
        model(x)


def test_t_is_scanned_only_when_it_has_changed(monkeypatch: pytest.MonkeyPatch):
    scans: list[str] = []
    from steepest.ternary import layer

    real = layer.check_packed
    monkeypatch.setattr(layer, "check_packed", lambda *given: (scans.append(""), real(*given))[1])
    model = made()
    flip, x = TernaryFlip(model, threshold=1), torch.randn(4, 64)
    train(model, flip)
    assert len(scans) == 0
    for expected in (2, 2):
        model.eval()(x)
        assert len(scans) == expected
    model.train()
    train(model, flip)
    assert len(scans) == 2
    model.state_dict()
    assert len(scans) == 4
    for _ in range(3):
        model.eval()(x)
    assert len(scans) == 4
    with torch.inference_mode():
        copy.deepcopy(model)(x)


# -- votes that nobody takes


@pytest.fixture(autouse=True)
def _not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vote_buffer, "_told", False)


def messages(model: nn.Module, times: int = 2) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            model(torch.randn(4, 64)).square().sum().backward()
    return [str(each.message) for each in caught if "votes" in str(each.message)]


@pytest.mark.parametrize("kind", [TernaryLinear, BinaryLinear])
def test_an_optimizer_that_knows_of_no_votes_is_warned_of_once(kind: type[TernaryLinear]):
    model = nn.Sequential(kind(64, 64), nn.ReLU(), kind(64, 4))
    torch.optim.AdamW(model.parameters())
    (message,) = messages(model)
    assert "no optimizer takes their votes" in message
    assert "steepest.build(model, ...)" in message
    assert messages(model) == []


def test_a_trainer_that_is_gone_is_warned_of():
    model = made()
    flip = TernaryFlip(model, threshold=1)
    assert messages(model) == []
    del flip
    gc.collect()
    (message,) = messages(model)
    assert "no optimizer takes their votes" in message


def test_no_warning_where_no_votes_are_to_be_had():
    model = made()
    model.eval()
    assert messages(model) == []
    model.train()
    with torch.no_grad():
        model(torch.randn(4, 64))
    for layer in model[::2]:
        layer.votes.requires_grad_(False)
    assert messages(model) == []
    other = made()
    optimizer = steepest.build(other, "lion")
    assert messages(other) == []
    del optimizer
