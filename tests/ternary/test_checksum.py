"""The checksum of binary weights: averages of buffers break it, and whatever writes T on purpose keeps it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from steepest.ternary import BinaryLinear, TernaryFlip, TernaryLinear
from steepest.ternary.checksum import checksum

MESSAGE = r"BinaryLinear\(64, 64\): packed does not match its checksum.*AveragedModel\(use_buffers=False\)"
AVERAGES = {
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "slow ema": {"avg_fn": get_ema_avg_fn(0.9999)},
    "default": {},
    "by hand": {"avg_fn": lambda old, new, count: 0.5 * old + 0.5 * new},
}


def made() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(BinaryLinear(64, 64), nn.ReLU(), BinaryLinear(64, 64))


def train(model: nn.Module, flip: TernaryFlip, *averages: AveragedModel) -> None:
    for _ in range(5):
        model(torch.randn(8, 64)).square().sum().backward()
        flip.step()
        flip.zero_grad()
        for average in averages:
            average.update_parameters(model)


@pytest.mark.parametrize("average", AVERAGES)
def test_averaged_buffers_are_refused_and_copied_ones_are_not(average: str):
    model = made()
    flip = TernaryFlip(model, threshold=1)
    bad, good = (AveragedModel(model, **AVERAGES[average], use_buffers=use) for use in (True, False))
    train(model, flip, bad, good)
    x = torch.randn(4, 64)
    layer = bad.module[0]
    for use in (bad, lambda x: layer.dense(), lambda x: layer.unpack(), lambda x: bad.state_dict()):
        for _ in range(2):
            with pytest.raises(RuntimeError, match=MESSAGE):
                use(x)
    good(x)
    for ours, theirs in zip(good.module[::2], model[::2], strict=True):
        assert torch.equal(ours.packed, theirs.packed)
    with pytest.raises(RuntimeError, match="ternary layer '0': packed does not match its checksum"):
        model.load_state_dict({**model.state_dict(), **dict(bad.module.named_buffers())})
    bad.module.load_state_dict(model.state_dict())
    assert torch.equal(bad.eval()(x), model.eval()(x))


def test_an_average_of_two_models_is_refused():
    """A soup of two checkpoints, as weights are merged by hand."""
    one, other = made(), made()
    for model, seed in ((one, 1), (other, 2)):
        torch.manual_seed(seed)
        train(model, TernaryFlip(model, threshold=1))
    theirs = other.state_dict()
    soup = {name: ((a.double() + theirs[name]) / 2).to(a.dtype) for name, a in one.state_dict().items()}
    with pytest.raises(RuntimeError, match="packed does not match its checksum"):
        one.load_state_dict(soup)


def test_frozen_weights_pass_averages_that_leave_them_alone():
    model = made()
    model.requires_grad_(False)
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.5), use_buffers=True)
    for _ in range(3):
        average.update_parameters(model)
    x = torch.randn(4, 64)
    assert torch.equal(average(x), model(x))


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: layer.reset_parameters(),
        lambda layer: layer.set_ternary(-layer.unpack()),
        lambda layer: layer.load_base3(BinaryLinear(13, 5).to_base3()),
        lambda layer: layer.load_state_dict(BinaryLinear(13, 5).state_dict()),
        lambda layer: layer.load_state_dict(BinaryLinear(13, 5).state_dict(), assign=True),
        lambda layer: (layer.packed.zero_(), layer.seal()),
    ],
    ids=["reset", "set", "base 3", "load", "assign", "seal"],
)
def test_whatever_writes_t_on_purpose_is_no_average(write):
    layer = BinaryLinear(13, 5).eval()
    x, before = torch.randn(2, 13), layer.unpack()
    write(layer)
    assert (layer.unpack() != before).any()
    layer(x)
    copy.deepcopy(layer)(x)


@pytest.mark.parametrize("limit", [1.0, 0.1])
def test_a_step_keeps_the_checksum(limit: float):
    model = made()
    flip = TernaryFlip(model, threshold=1, max_flip_fraction=limit)
    before = model[0].unpack()
    train(model, flip)
    model.eval()(torch.randn(4, 64))
    assert (model[0].unpack() != before).any()


def test_state_dicts_without_it_load():
    model, other = made(), nn.Sequential(BinaryLinear(64, 64), nn.ReLU(), BinaryLinear(64, 64))
    old = {name: value for name, value in model.state_dict().items() if not name.endswith("checksum")}
    assert len(old) == len(model.state_dict()) - 2
    other.load_state_dict(old)
    x = torch.randn(4, 64)
    assert torch.equal(other.eval()(x), model.eval()(x))
    on_meta = BinaryLinear(64, 64, device="meta")
    on_meta.load_state_dict({name[2:]: value for name, value in old.items() if name[0] == "0"}, assign=True)
    assert torch.equal(on_meta.unpack(), model[0].unpack())


@pytest.mark.parametrize("kind", [BinaryLinear, TernaryLinear])
def test_layers_pickled_without_it_load(kind: type[TernaryLinear]):
    layer = kind(64, 64)
    old = copy.copy(layer)
    old._buffers = {name: value for name, value in layer._buffers.items() if name != "checksum"}
    loaded = pickle.loads(pickle.dumps(old)).eval()
    x = torch.randn(4, 64)
    assert torch.equal(loaded(x), layer.eval()(x))
    assert loaded.state_dict().keys() == layer.state_dict().keys()


def test_ternary_layers_have_none():
    assert TernaryLinear(8, 8).checksum is None
    assert "checksum" not in TernaryLinear(8, 8).state_dict()


def test_every_bit_and_place_counts_whatever_the_layout():
    torch.manual_seed(0)
    whole = torch.randint(0, 256, (5, 7), dtype=torch.uint8)
    found = {int(checksum(whole))}
    for place in range(35):
        for bit in range(8):
            other = whole.clone()
            other.view(-1)[place] ^= 1 << bit
            found.add(int(checksum(other)))
    for swap in range(34):
        order = torch.arange(35)
        order[[swap, swap + 1]] = order[[swap + 1, swap]]
        found.add(int(checksum(whole.view(-1)[order])))
    assert len(found) == 1 + 35 * 8 + 34
    padded = torch.zeros(5, 11, dtype=torch.uint8)
    padded[:, 3:10] = whole
    assert torch.equal(checksum(padded[:, 3:10]), checksum(whole))
    for numel in (32, 33):
        shifted = torch.cat([torch.zeros(3, dtype=torch.uint8), whole.view(-1)[:numel]])[3:]
        assert torch.equal(checksum(shifted), checksum(whole.view(-1)[:numel].clone()))
