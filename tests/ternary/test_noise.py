"""Noise is keyed by step, pass, weight, and the name of the layer."""

import torch
from torch import nn

from steepest.ternary import TernaryFlip, TernaryLinear

from .models import (
    accumulators,
    assert_same,
    small_model,
)


def test_noise_differs_between_passes_steps_and_layers():
    # The same dT everywhere, nowhere a whole number of rms: what differs is the rounding.
    torch.manual_seed(0)
    model = nn.ModuleList([TernaryLinear(200, 4, bias=False) for _ in range(2)])
    trainer = TernaryFlip(model, 120, votes="magnitude", outward="cancel")
    x = torch.randn(1, 200)

    def votes(index):
        layer, vote_buffer = model[index], list(trainer.targets.buffers.values())[index]
        before = 0 if vote_buffer.pending is None else vote_buffer.pending.clone()
        layer.scale.data.fill_(1.0)
        layer(x).sum().backward()
        return vote_buffer.pending - before

    draws = [votes(0), votes(0), votes(1)]
    trainer.step()
    draws.append(votes(0))
    for at, one in enumerate(draws):
        for other in draws[:at]:
            assert not torch.equal(one, other)
            # Each is the gradient rounded up or down.
            assert (one - other).abs().max() == 1


def test_the_pull_toward_zero_differs_between_steps_and_layers():
    model = nn.Sequential(TernaryLinear(200, 200, bias=False), TernaryLinear(200, 200, bias=False))
    for layer in model:
        layer.set_ternary(torch.ones(200, 200))
    trainer = TernaryFlip(model, 100, zero_pull=0.5)
    pulls, before = [], [torch.zeros(200, 200, dtype=torch.int8)] * 2
    for _ in range(2):
        model(torch.zeros(1, 200)).sum().backward()
        trainer.step()
        now = [a.clone() for a in accumulators(trainer).values()]
        pulls += [one - other for one, other in zip(now, before, strict=True)]
        before = now
    # Two that are drawn apart agree in half of the places.
    for at, one in enumerate(pulls):
        for other in pulls[:at]:
            assert abs((one == other).float().mean().item() - 0.5) < 0.02


def test_noise_depends_on_a_layers_name_not_on_its_trainer():
    # Two trainers of one seed, and one for both: each layer draws what it draws there.
    def pulls(*parts):
        model = nn.ModuleDict({name: TernaryLinear(200, 50, bias=False) for name in ("a", "b")})
        for layer in model.values():
            layer.set_ternary(torch.ones(50, 200))
        found = {}
        for part in parts:
            trainer = TernaryFlip(nn.ModuleDict({name: model[name] for name in part}), 100, zero_pull=0.5)
            for name in part:
                model[name](torch.zeros(1, 200)).sum().backward()
            trainer.step()
            found |= {name: a.clone() for name, a in accumulators(trainer).items()}
        return found

    apart, together = pulls("a", "b"), pulls("ab")
    assert_same(apart, together)
    # Two that are drawn apart agree in half of the places.
    assert abs((apart["a"] == apart["b"]).float().mean().item() - 0.5) < 0.03


def test_noise_is_the_same_within_torchs_wrappers():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = small_model()
    names = TernaryFlip(model).targets.layers.keys()
    model[3] = checkpoint_wrapper(model[3])
    assert TernaryFlip(torch.compile(model)).targets.layers.keys() == names
