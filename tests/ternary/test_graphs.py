"""Votes under checkpointing, torch.compile and autocast, which rewrite backward."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from steepest.compile.available import compiler_available
from steepest.random import derive_key
from steepest.ternary import TernaryFlip, TernaryLinear, pack
from steepest.ternary.flipping import flip_layer

from .models import assert_same, mixed_model, small_model, snapshot

compiled_only = pytest.mark.skipif(not compiler_available("cpu"), reason="needs a C++ compiler")


def votes(trainer):
    return {name: vote_buffer.pending for name, vote_buffer in trainer.targets.buffers.items()}


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_votes_once_and_the_same(reentrant):
    found = []
    for checkpointed in (False, True):
        model = small_model()
        trainer = TernaryFlip(model, votes="magnitude")
        torch.manual_seed(1)
        x = torch.randn(4, 6, requires_grad=True)
        y = checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
        y.square().sum().backward()
        found.append({**votes(trainer), "x": x.grad, "scale": model[0].scale.grad})
    assert_same(*found)


@compiled_only
@pytest.mark.parametrize("kind", ["sign", "magnitude"])
@pytest.mark.parametrize(
    ("make", "autocast"), [(small_model, False), (small_model, True), (mixed_model, False)]
)
def test_a_compiled_model_votes_as_an_eager_one(kind, make, autocast):
    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        model = make()
        trainer = TernaryFlip(model, 2, votes=kind)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        run = torch.compile(model, fullgraph=True) if compiled else model
        # Exact numbers: whatever the compiler fuses, signs and sums come out the same.
        for step in range(3):
            x = torch.randint(-2, 3, (4, 6), generator=torch.Generator().manual_seed(step)).float()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = run(x).float().square().sum()
            loss.backward()
            if step < 2:
                optimizer.step()
                trainer.step()
                optimizer.zero_grad()
        found.append((votes(trainer), snapshot(model), trainer))
    (one, weights, _), (other, others, trainer) = found
    assert trainer.targets.buffers["0"].passes == 1
    assert trainer.stats().step == 2
    for name in one:
        same = (one[name] == other[name]).float().mean()
        assert same > (0.9 if autocast else 0.97)
    for name in weights:
        if name.endswith("packed"):
            assert (others[name] == weights[name]).float().mean() > 0.9
        else:
            torch.testing.assert_close(others[name], weights[name], atol=1e-2, rtol=0.1)


@compiled_only
def test_compiled_passes_may_come_in_any_order_and_be_switched_off():
    torch._dynamo.reset()
    layer = TernaryLinear(4, 4, bias=False)
    model = torch.compile(nn.Sequential(layer, nn.ReLU(), layer), fullgraph=True)
    trainer = TernaryFlip(model)
    vote_buffer = trainer.targets.buffers["0"]
    first, second = model(torch.randn(3, 4)).sum(), model(torch.randn(3, 4)).sum()
    second.backward()
    first.backward()
    assert vote_buffer.passes == 4
    model.eval()
    model(torch.randn(3, 4)).sum().backward()
    assert vote_buffer.passes == 4
    model.train()
    # An optimizer made later is found by the graph compiled before.
    later = TernaryFlip(model)
    model(torch.randn(3, 4)).sum().backward()
    assert vote_buffer.passes == 4
    assert later.targets.buffers["0"].passes == 2


@compiled_only
def test_a_compiled_graph_keeps_a_backward_that_only_votes():
    torch._dynamo.reset()
    layer = TernaryLinear(4, 4)
    layer.scale.requires_grad_(False)
    trainer = TernaryFlip(layer)
    torch.compile(layer, fullgraph=True)(torch.randn(3, 4)).sum().backward()
    assert trainer.targets.buffers[""].passes == 1


@compiled_only
def test_compiled_checkpointing_votes_once():
    torch._dynamo.reset()
    model = small_model()
    trainer = TernaryFlip(model)

    @torch.compile
    def run(x):
        return checkpoint(model, x, use_reentrant=False)

    run(torch.randn(4, 6, requires_grad=True)).sum().backward()
    assert [vote_buffer.passes for vote_buffer in trainer.targets.buffers.values()] == [1, 1]


@compiled_only
@pytest.mark.parametrize("options", [{}, {"zero_pull": 0.2, "outward": "drop"}, {"at_most": 9}])
def test_flips_compiled_are_the_same(options):
    found = []
    given = {"zero_pull": 0.0, "outward": "cancel", "at_most": None, **options}
    for compiled in (False, True):
        generator = torch.Generator().manual_seed(0)
        values = torch.randint(-1, 2, (9, 33), generator=generator, dtype=torch.int8)
        packed, a = pack(values), torch.zeros(9, 33, dtype=torch.int8)
        for step in range(4):
            pending = torch.randint(-3, 4, (9, 33), generator=generator, dtype=torch.int8)
            flips = flip_layer(
                packed, a, pending, threshold=4, key=derive_key(0, step), compiled=compiled, **given
            )
        assert int(flips) > 0
        found.append({"packed": packed, "a": a})
    assert_same(*found)


@compiled_only
def test_rounding_votes_compiled_draws_the_same():
    found = []
    for compile in (False, True):
        torch.manual_seed(0)
        layer = TernaryLinear(33, 9)
        trainer = TernaryFlip(layer, votes="magnitude", compile=compile, seed=5)
        layer(torch.randn(7, 33)).square().sum().backward()
        found.append(votes(trainer))
    assert_same(*found)
